"""Calls with prices: bounded, refused with their place, and only for those who may send them."""

import asyncio
import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.tokens import hash_token
from server.bands.book import Price
from server.errors import Refused, Situation
from server.front.dataplane import MOST_RECORDING
from server.front.dialects.actuals import MOST_PRICES, Actuals, parse_actuals
from server.front.dialects.forecasts import STATUS
from server.front.exchange import HttpRequest
from server.ipc.operations import ActualsReply, ObservedPrices, PairedCounts, RecordActuals
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, stay_connected
from tests.server.front.auth.test_permissions import make_app

AU, DE = "au/nsw1.mar", "de/lu.mar"


def write_call(*models: str, stamp: str = "2026-01-01 00:00:00", price: object = 1.5) -> bytes:
    """A call with one price of each model."""
    items = [{"target_model": model, "stamps": [stamp], "prices": [price]} for model in models]
    return json.dumps({"actuals": items}).encode()


def test_stamps_are_read_with_and_without_offset() -> None:
    """Seconds since 1970 on a wall clock or in UTC; null is left out."""
    assert parse_actuals(write_call(AU)) == [ObservedPrices(AU, [Price(1767225600, False, 1.5)])]
    (item,) = parse_actuals(write_call(AU, stamp="2026-01-01T01:00:00+01:00"))
    assert item.prices == [Price(1767225600, True, 1.5)]
    assert parse_actuals(write_call(AU, price=None)) == [ObservedPrices(AU, [])]


def test_a_product_is_named_beside_the_model_and_told_again() -> None:
    """In the call, and in the counts of its item; an item without one has none."""
    item = {"target_model": DE, "product": "energy", "stamps": ["2026-01-01"], "prices": [1.5]}
    body = json.dumps({"actuals": [item, {key: item[key] for key in ("target_model", "stamps", "prices")}]}).encode()
    assert [(each.model, each.product, each.strict) for each in parse_actuals(body)] == [
        (DE, "energy", True),
        (DE, "", True),
    ]

    async def record(items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        del deadline
        return ActualsReply([PairedCounts(1, 0, 0)] * len(items), adapted=True, unheard=[])

    made = make_app(Worker(lambda _: b""))
    made.plane.record_actuals = record  # type: ignore[method-assign]
    answered = asyncio.run(ask(made, "POST", "/v1/actuals", body, {}))
    counts = {"paired": 1, "repeated": 0, "unmatched": 0}
    assert json.loads(answered.body)["results"] == [
        {"target_model": DE, "product": "energy", **counts},
        {"target_model": DE, **counts},
    ]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (write_call(AU, stamp="soon"), "actuals[0].stamps[0]"),
        (write_call(AU, AU, price=1e300), "actuals[0].prices[0]"),
        (b'{"actuals": [{"target_model": "m", "product": 1, "stamps": [], "prices": []}]}', "actuals[0].product"),
        (
            b'{"actuals": [{"target_model": "m", "product": "%s", "stamps": [], "prices": []}]}' % (b"p" * 201),
            "actuals[0].product",
        ),
        (write_call(AU, "../x"), "actuals[1].target_model"),
        (b'{"actuals": [{"target_model": "m", "stamps": ["2026-01-01"], "prices": []}]}', "actuals[0]"),
        (b'{"actuals": [{"target_model": "m", "stamps": [], "prices": ["1"]}]}', "actuals[0].prices[0]"),
        (b'{"actuals": []}', "actuals"),
    ],
)
def test_what_is_wrong_names_its_place(body: bytes, place: str) -> None:
    """Nothing of such a call is taken."""
    with pytest.raises(Refused) as refused:
        parse_actuals(body)
    assert refused.value.detail.field == place


def test_a_call_has_so_many_prices_at_most() -> None:
    """Over all items together."""
    count = MOST_PRICES // 2 + 1
    item = {"target_model": AU, "stamps": ["2026-01-01"] * count, "prices": [1.0] * count}
    with pytest.raises(Refused, match="10000 prices at most, not 10002"):
        parse_actuals(json.dumps({"actuals": [item, item]}).encode())


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_whatever_comes_is_parsed_or_refused(body: bytes) -> None:
    """No other exception for any bytes."""
    with contextlib.suppress(Refused):
        assert all(item.model for item in parse_actuals(body))


def test_every_situation_has_a_status() -> None:
    """And the body of all its errors is that of `/v1/forecasts`."""
    dialect = Actuals(Settings.model_validate({"store": "models", "overload_status": 429}))
    request = HttpRequest("POST", "/v1/actuals", {}, stay_connected)
    for situation in STATUS:
        reply = dialect.refused(Refused(situation, "why"), request)
        assert reply.status == (429 if situation is Situation.OVERLOADED else STATUS[situation])
        assert json.loads(reply.body)["error"]["message"] == "why"
    with pytest.raises(Refused):
        dialect.match("GET", "/v1/actuals")
    assert dialect.match("POST", "/v1/forecasts") is None


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """One that may only ask, and one that may send prices of `au/` too."""
    path = tmp_path / "tokens.toml"
    rows = (("desk", '"invoke"'), ("feed", '"invoke", "actuals"'))
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "{name}"\nsha256 = "{hash_token(f"{name}-secret".encode())}"\n'
            f'scopes = [{scopes}]\nmodels = ["au/"]\n'
            for name, scopes in rows
        )
    )
    return path


def test_prices_need_the_scope_for_each_model(tokens: Path) -> None:
    """403 for a token without it, and for a call with one model that is not the token's; then nothing is recorded."""
    recorded = list[str]()

    async def record(items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        del deadline
        recorded.extend(item.model for item in items)
        return ActualsReply([PairedCounts(1, 0, 0)] * len(items), adapted=True, unheard=[])

    made = make_app(Worker(lambda _: b""), tokens=tokens)
    made.plane.record_actuals = record  # type: ignore[method-assign]

    def send(name: str, *models: str) -> Answered:
        sent = {"Authorization": f"Bearer {name}-secret"}
        return asyncio.run(ask(made, "POST", "/v1/actuals", write_call(*models), sent))

    assert send("desk", AU).status == 403
    assert send("feed", AU, DE).status == 403
    assert recorded == []
    answered = send("feed", AU)
    assert (answered.status, recorded) == (200, [AU])
    assert json.loads(answered.body)["results"][0]["paired"] == 1


class Slow:
    """A supervisor that answers nothing until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def ask(self, operation: RecordActuals, timeout_s: float) -> ActualsReply:
        """The reply, late."""
        del timeout_s
        await self.go.wait()
        return ActualsReply([PairedCounts(1, 0, 0)] * len(operation.items), adapted=True, unheard=[])


def test_few_calls_are_under_way_at_a_time() -> None:
    """One more is refused with the time to come back, and is taken once others have ended."""

    async def scenario() -> None:
        made, slow = make_app(Worker(lambda _: b"")), Slow()
        made.plane.supervisor = slow  # type: ignore[assignment]
        send = partial(ask, made, "POST", "/v1/actuals", write_call(AU), {})
        calls = [asyncio.create_task(send()) for _ in range(MOST_RECORDING)]
        await asyncio.sleep(0)
        refused = await send()
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        slow.go.set()
        assert [call.status for call in await asyncio.gather(*calls)] == [200] * MOST_RECORDING
        assert (await send()).status == 200

    asyncio.run(scenario())
