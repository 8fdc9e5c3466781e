"""Calls for many models: every byte of an item arrives, every fault names its place, errors have one shape."""

import json
import re
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.call_items import Item
from server.front.dialects import forecasts
from server.front.dialects.forecasts import MAX_CONFIGURATION_BYTES, STATUS, Forecasts, build_answer, summarise_items
from server.front.exchange import HttpRequest, Limit
from server.front.fan_out import MultiModelCall, Prediction
from server.front.inference import InferStats
from server.front.raw_json import MAX_ITEMS, build_request, extract_prediction
from server.front.slices import AT_ONCE, UNIT, finish_slices
from server.settings import Settings
from tests.server.front.answering import stay_connected
from tests.server.front.counted import count_work

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


LIMIT = Limit(6 * 2**20, "max_body_bytes")


def parse_call(body: bytes, limit: Limit = LIMIT) -> MultiModelCall:
    """The call, without a pause."""
    return finish_slices(forecasts.parse_call(body, limit))


def make_dialect(**settings: object) -> Forecasts:
    """The dialect under these settings."""
    return Forecasts(Settings.model_validate({"store": "models", **settings}))


def make_stats(
    cache: str = "hit", *, queue_us: int = 0, load_us: int | None = None, inference_us: int = 0
) -> InferStats:
    """What happened to an item that was answered."""
    return InferStats(cache, queue_us, load_us, inference_us, "disk", "v")


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(), VALUES), min_size=1, max_size=8), st.dictionaries(st.text(), VALUES))
def test_an_item_is_the_one_instance_of_its_request(items: list[dict[str, Any]], configuration: dict[str, Any]) -> None:
    """Whatever fields it has, in whatever spelling: the model's request holds the very item and configuration."""
    configuration.pop("joint", None)
    asked = [{**item, "target_model": f"m{i}.mar"} for i, item in enumerate(items)]
    body = json.dumps({"requests": asked, "configuration": configuration}, indent=1).encode()
    found = parse_call(body)
    assert found.joint is None
    for i, (item, each) in enumerate(zip(asked, found.items, strict=True)):
        assert isinstance(each, Item)
        assert each.model == f"m{i}.mar"
        assert json.loads(build_request(cast("bytes", each.instance), found.configuration)) == {
            "instances": [item],
            "configuration": configuration,
        }


@pytest.mark.slow
@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_no_body_breaks_the_slicing(body: bytes) -> None:
    """Arbitrary bytes and arbitrary JSON are sliced or refused as a bad request."""
    situation = None
    try:
        assert parse_call(body).items
    except Refused as refused:
        situation = refused.situation
    assert situation in (None, Situation.BAD_REQUEST)


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        (b"", "not a call for forecasts: it ends before its JSON does", None),
        (b"[]", "not a call for forecasts: expected an object, not a list", None),
        (b"{}", "it is missing", "requests"),
        (b'{"requests": 3}', "expected a list, not a whole number", "requests"),
        (b'{"requests": []}', f"a call has 1 to {MAX_ITEMS} requests, not 0", "requests"),
        (
            b'{"requests": [' + b"{}," * MAX_ITEMS + b"{}]}",
            f"1 to {MAX_ITEMS} requests, not more",
            "requests",
        ),
        (b'{"requests": [{}], "configuration": 1}', "expected an object, not a whole number", "configuration"),
        (
            b'{"requests": [{}], "configuration": {"joint": 1}}',
            "expected true or false, not a whole number",
            "configuration.joint",
        ),
        (b'{"requests": ' + b"[" * 100_000, "not a call for forecasts", None),
        (b'{"requests": [{}]} x', "it is not JSON at byte 20", None),
        (b'{"requests": [{}], "config": {}}', "there are requests, configuration", "config"),
    ],
)
def test_a_body_that_is_no_call(body: bytes, message: str, field: str | None) -> None:
    """The whole call is refused, with what was wrong and where."""
    with pytest.raises(Refused) as caught:
        parse_call(body)
    assert message in str(caught.value)
    assert caught.value.detail.field == field


@pytest.mark.parametrize(
    ("item", "situation", "message"),
    [
        ({}, Situation.BAD_REQUEST, "it is missing"),
        (3, Situation.BAD_REQUEST, "expected an object, not a whole number"),
        ({"target_model": 3}, Situation.BAD_REQUEST, "expected text, not a whole number"),
        ({"target_model": "../x"}, Situation.BAD_NAME, ".."),
        ({"target_model": ""}, Situation.BAD_NAME, ""),
    ],
)
def test_a_bad_item_is_refused_alone(item: object, situation: Situation, message: str) -> None:
    """Its neighbours go on; its error names the field."""
    good = {"target_model": "au/m.mar"}
    first, bad, last = parse_call(json.dumps({"requests": [good, item, good]}).encode()).items
    assert isinstance(first, Item)
    assert isinstance(last, Item)
    assert isinstance(bad, Refused)
    assert (bad.situation, bad.detail.field) == (situation, "target_model")
    assert message in str(bad)


def test_a_large_call_is_cut_in_slices() -> None:
    """No slice reads more than a small call has at once, whatever the call is full of; every item arrives whole."""
    numbers = b",".join(b"%d.25" % i for i in range(40_000))
    item = b'{"target":[' + numbers + b'], "target_model" : "au\\u002fm.mar", "dynamic_feat":[[1,"]}"],{"}":[]}]}'
    body = b' { "configuration": {"seed": 3},"requests" :[ ' + b" , ".join([item] * 5) + b" ,{}, 7]} "
    call, works = count_work(forecasts.parse_call(body, LIMIT))
    assert max(works) <= AT_ONCE
    assert sum(works) >= 2 * len(body), "all bytes are counted, for the call and for its items"
    assert call.configuration == b'{"seed": 3}'
    *whole, without, number = call.items
    assert [(each.model, bytes(cast("bytes", each.instance))) for each in whole if isinstance(each, Item)] == [
        ("au/m.mar", item)
    ] * 5
    assert [each.situation for each in (without, number) if isinstance(each, Refused)] == [Situation.BAD_REQUEST] * 2


def test_an_item_has_the_limit_of_a_request_to_its_model() -> None:
    """The item above it is refused alone, with the numbers."""
    small, large = (b'{"target_model":"m.mar","x":"%b"}' % (b"y" * size) for size in (3 * AT_ONCE, 4 * AT_ONCE))
    call = parse_call(b'{"requests":[' + small + b"," + large + b"]}", Limit(len(small), "max_body_bytes"))
    first, second = call.items
    assert isinstance(first, Item)
    assert isinstance(second, Refused)
    assert second.situation is Situation.TOO_LARGE
    assert f"{len(large)} bytes, the limit of a request to one model is {len(small)} (max_body" in str(second)


def test_a_large_answer_is_built_in_slices() -> None:
    """Small answers in tens of thousands and single large ones: no slice joins more than its share."""
    found: list[Prediction | Refused] = [Prediction(b"1" * 300, make_stats())] * MAX_ITEMS
    found += [Prediction(b"2" * 10 * UNIT, make_stats())]
    answer, works = count_work(build_answer(found))
    assert max(works) <= 2 * UNIT
    assert sum(works) >= len(answer) > 300 * MAX_ITEMS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"requests":[%b 1 2]}', "expected `,` or `]`"),
        (b'{"requests":[%b1}', "expected `,` or `}`"),
        (b'{"requests":[%b[1]', "the text ends inside"),
        (b'{"requests":[%b[1', "the text ends inside"),
        (b'{"requests":[%b"1', "the text ends inside"),
        (b'{"requests":[%b' + b"[" * 1000, "more than 500 nested"),
        (b'{"requests":[%b1],"a"=1}', "expected a field's name"),
        (b'{"requests":[%b1]} x', "trailing characters"),
        (b'{"requests":[%b,1]}', "expected a value"),
        (b'{"requests":{"a":%b1}}', "expected an array at byte 0"),
        (b"[%b1]", "expected an object at byte 0"),
        (b'{"a":[%b1],' + b'"a":1,' * 1000 + b'"requests":[1]}', "more than 1000 fields"),
        (b'{"requests":[1' + b" " * AT_ONCE + b"]}%.0b", "expected `,` or `]`"),
        (b'{"requests":[1' + b"1" * AT_ONCE + b"]}%.0b", "a number or white space of more than"),
    ],
)  # fmt: skip
def test_a_large_body_that_is_no_call(body: bytes, message: str) -> None:
    """What is wrong is said as for a small one, with the place."""
    filling = b"[" + b"1," * AT_ONCE + b"1],"
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        parse_call(body % filling if body.count(b"%b") else body % b"")
    assert caught.value.situation is Situation.BAD_REQUEST


def test_a_configuration_is_bounded() -> None:
    """It goes to every model, so a large one is refused whatever else it asks for."""
    for size, refused in ((MAX_CONFIGURATION_BYTES - 9, False), (MAX_CONFIGURATION_BYTES, True)):
        body = b'{"requests":[{"target_model":"m"}],"configuration":{"x":"%b"}}' % (b"y" * size)
        if refused:
            with pytest.raises(Refused, match="are the most"):
                parse_call(body)
        else:
            assert len(parse_call(body).items) == 1


def test_the_answer_in_order() -> None:
    """Predictions as they came, errors in their places, the number of failures, a status for each item's count."""
    raw = finish_slices(extract_prediction(b'{"predictions":[ {"mean": [1.50, 2e0]} ]}'))
    assert raw == b'{"mean": [1.50, 2e0]}'
    refused = Refused(Situation.NOT_FOUND, "no archive", field="target_model")
    found: list[Prediction | Refused] = [Prediction(raw, make_stats()), refused, Prediction(raw, make_stats())]
    answer = json.loads(finish_slices(build_answer(found)))
    error = {"code": "not_found", "message": "target_model: no archive", "field": "target_model"}
    assert answer == {"predictions": [{"mean": [1.5, 2]}, {"error": error}, {"mean": [1.5, 2]}], "failed": 1}
    assert b'{"mean": [1.50, 2e0]}' in finish_slices(build_answer(found))
    assert make_dialect().statuses(found) == [200, 400, 200]


def test_what_the_headers_tell() -> None:
    """How often the cache had the model, and the longest time of each kind."""
    found: list[Prediction | Refused] = [
        Prediction(b"1", make_stats(queue_us=1500, inference_us=10)),
        Prediction(b"1", make_stats("miss", load_us=2000, inference_us=20)),
        Prediction(b"1", make_stats()),
        Refused(Situation.NOT_FOUND, "no"),
    ]
    assert summarise_items(found) == InferStats("hit=2, miss=1", 1500, 2000, 20)
    assert summarise_items(found[3:]) == InferStats("", 0, 0, 0)
    assert msgspec.json.decode(finish_slices(build_answer(found)))["failed"] == 1


def joint_call(**configuration: object) -> bytes:
    """A call of two models for joint scenarios."""
    requests = [{"target_model": "a.mar", "target": [1]}, {"target_model": "b.mar", "target": [2]}]
    return json.dumps({"requests": requests, "configuration": {"joint": True, **configuration}}).encode()


def test_a_joint_call_asks_the_models_for_marginals() -> None:
    """What is drawn is the correlation's to hear, the rest the models'."""
    call = joint_call(
        correlation="j.mar", num_samples=7, seed=3, output_types=["samples", "mean", "quantiles"], quantiles=["0.5"]
    )
    found = parse_call(call)
    assert found.joint is not None
    assert found.joint.correlation == "j.mar"
    item = found.items[1]
    assert isinstance(item, Item)
    assert json.loads(build_request(cast("bytes", item.instance), found.configuration)) == {
        "instances": [{"target_model": "b.mar", "target": [2]}],
        "configuration": {"output_types": ["mean", "quantiles", "marginal"], "quantiles": ["0.5"]},
    }
    assert {name: json.loads(bytes(value)) for name, value in found.joint.drawn.items()} == {
        "num_samples": 7,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("configuration", "situation", "field"),
    [
        ({}, Situation.BAD_REQUEST, "configuration.correlation"),
        ({"correlation": "../j.mar"}, Situation.BAD_NAME, "configuration.correlation"),
        ({"correlation": 3}, Situation.BAD_REQUEST, "configuration.correlation"),
        ({"correlation": "j.mar", "output_types": ["mean"]}, Situation.BAD_REQUEST, "configuration.output_types"),
        ({"correlation": "j.mar", "output_types": "samples"}, Situation.BAD_REQUEST, "configuration.output_types"),
    ],
)
def test_a_joint_call_that_cannot_be(configuration: dict[str, object], situation: Situation, field: str | None) -> None:
    """No correlation named, a bad name, nothing to draw: refused before any model is asked."""
    with pytest.raises(Refused) as caught:
        parse_call(joint_call(**configuration))
    assert (caught.value.situation, caught.value.detail.field) == (situation, field)


def test_every_situation_has_a_status() -> None:
    """Nothing but success is missing from the table."""
    assert STATUS.keys() == set(Situation) - {Situation.OK}


@pytest.mark.parametrize(
    ("refused", "status", "error"),
    [
        (Refused(Situation.NOT_FOUND, "no"), 400, {"code": "not_found", "message": "no"}),
        (
            Refused(Situation.BAD_REQUEST, "odd", 0, "target"),
            400,
            {"code": "bad_request", "message": "requests[0].target: odd", "instance": 0, "field": "target"},
        ),
        (Refused(Situation.MODEL_FAILED, "nan"), 424, {"code": "model_failed", "message": "nan"}),
    ],
)
def test_the_error_of_a_call(refused: Refused, status: int, error: dict[str, object]) -> None:
    """One object with code, message and, where there is one, the place; no header of another protocol's."""
    reply = make_dialect().refused(refused, HttpRequest("POST", "/v1/forecasts", {}, stay_connected))
    assert (reply.status, json.loads(reply.body), reply.headers) == (status, {"error": error}, [])


def test_overload_says_when_to_retry() -> None:
    """By the standard header; the operator chooses between 503 and 429."""
    for chosen in (503, 429):
        reply = make_dialect(overload_status=chosen).refused(
            Refused(Situation.OVERLOADED, "full"), HttpRequest("POST", "/v1/forecasts", {}, stay_connected)
        )
        assert (reply.status, reply.headers) == (chosen, [(b"retry-after", b"1")])
    late = Refused(Situation.DEADLINE, "late", retry_ms=1234)
    reply = make_dialect().refused(late, HttpRequest("POST", "/v1/forecasts", {}, stay_connected))
    assert (reply.status, reply.headers) == (424, [(b"retry-after", b"2")])
