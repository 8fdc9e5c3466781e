"""Aliases and rollbacks in a front: which arm a request gets, who may ask by which name, and what is counted."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_store.names import ModelName, at_version
from server.access.tokens import hash_token
from server.bands.book import Price
from server.errors import Situation
from server.front.app import App
from server.front.inference import InferRequest, InferResponse
from server.front.inference_plane import PlaneInFront
from server.front.releases import MOST_FOLLOWED, ReleasedPlane, Releases, make_plane
from server.ipc.operations import ActualsReply, ObservedPrices, PairedCounts, ReleaseArm
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach

NAME = ModelName("au/nsw1.mar")
OLD = at_version(NAME, "old")
ALIAS = "au/nsw1@stable"
Table = Mapping[str, Sequence[ReleaseArm]]

HELD: Table = {NAME: [ReleaseArm(OLD, "old", 1.0)]}
CANARY: Table = {ALIAS: [ReleaseArm(OLD, "old", 0.9), ReleaseArm(NAME, "", 0.1)]}


class House:
    """An app over one worker, which answers as it was asked."""

    def __init__(self, table: Table, **settings: object) -> None:
        self.worker, self.metrics = Worker(lambda asked: asked.model.encode()), FrontMetrics()
        self.app = App(Settings.model_validate({"store": "models", **settings}), self.metrics)
        attach(self.app.plane, self.worker)
        self.app.releases.replace(table)

    def ask(self, name: str, ident: str = "1", token: str = "") -> Answered:
        """One request by the SageMaker dialect."""
        headers = {"X-Amzn-SageMaker-Target-Model": name, "X-Request-Id": ident}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        return asyncio.run(ask(self.app, "POST", "/invocations", b"{}", headers))

    def counted(self) -> dict[tuple[str, str, str], float]:
        """Requests by target, version and result."""
        families = text_string_to_metric_families(self.metrics.text())
        return {
            (sample.labels["target"], sample.labels["version"], sample.labels["result"]): sample.value
            for family in families
            for sample in family.samples
            if sample.name == "fleetcast_release_requests_total" and sample.value
        }


def test_a_model_that_is_rolled_back_is_asked_at_its_version() -> None:
    """By its own name; other names are asked as they are, and are not counted."""
    house = House(HELD)
    assert house.ask(NAME).body == OLD.encode()
    assert house.ask("au/vic1.mar").body == b"au/vic1.mar"
    assert house.counted() == {(NAME, "old", "ok"): 1}


def test_an_empty_table_is_not_in_the_way() -> None:
    """No plane is put before the data plane, so that requests take the way they took."""
    house = House({})
    assert make_plane(house.app.plane, None, house.app.releases) is house.app.plane
    house.app.releases.replace(HELD)
    assert isinstance(make_plane(house.app.plane, None, house.app.releases), ReleasedPlane)
    house.app.releases.replace({})
    assert house.ask(NAME).body == NAME.encode()


def test_a_name_is_looked_up_when_its_request_is_here() -> None:
    """A rollback that comes while a client still sends its body holds for the request, as for those after it."""
    house, sent = House({}), list[Mapping[str, object]]()
    headers = [(b"x-amzn-sagemaker-target-model", NAME.encode())]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": headers}

    async def receive() -> Mapping[str, object]:
        house.app.releases.replace(HELD)
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Mapping[str, object]) -> None:
        sent.append(message)

    asyncio.run(house.app(scope, receive, send))  # type: ignore[arg-type]  # messages are made by the test
    assert sent[1]["body"] == OLD.encode()


def test_a_canary_gets_its_share_and_a_request_its_arm() -> None:
    """Of 2,000 ids about a tenth goes to the canary; the same id goes the same way again, by another alias its own."""
    releases = Releases(FrontMetrics())
    releases.replace({**CANARY, "other": CANARY[ALIAS]})
    route, other = releases.routes[ALIAS], releases.routes["other"]
    ids = [b"%06d" % i for i in range(2000)]
    chosen = Counter(route.choose(ident).model for ident in ids)
    assert 140 < chosen[NAME] < 260
    assert [route.choose(ident) for ident in ids] == [route.choose(ident) for ident in ids]
    assert [route.choose(ident).model for ident in ids] != [other.choose(ident).model for ident in ids]


@pytest.mark.parametrize(("share", "model"), [(0.0, OLD), (1.0, NAME)])
def test_the_ends_of_a_share_are_exact(share: float, model: ModelName) -> None:
    """No request of a thousand goes to an arm without a share."""
    releases = Releases(FrontMetrics())
    releases.replace({ALIAS: [ReleaseArm(OLD, "old", 1.0 - share), ReleaseArm(NAME, "", share)]})
    assert {releases.routes[ALIAS].choose(b"%d" % i).model for i in range(1000)} == {model}


def test_failures_are_counted_apart() -> None:
    """A refused request is its version's failure, and takes no time in the histogram."""
    house = House(HELD)
    house.worker.answer = lambda _: (Situation.MODEL_FAILED, b'{"message":"it failed"}')
    assert house.ask(NAME).status == 424
    assert house.counted() == {(NAME, "old", "failed"): 1}
    assert f'release_request_seconds_count{{target="{NAME}",version="old"}} 0.0' in house.metrics.text()


def test_series_go_with_their_entries() -> None:
    """Versions that stay in the table count on; what left it leaves the metrics. One that follows has few of them."""
    house = House(CANARY)
    for i in range(30):
        house.ask(ALIAS, ident=str(i))
    before = house.counted()
    assert set(before) == {(ALIAS, "old", "ok"), (ALIAS, "v1", "ok")}
    house.app.releases.replace({**CANARY, **HELD})
    house.app.releases.replace({ALIAS: [ReleaseArm(OLD, "old", 1.0)]})
    assert house.counted() == {(ALIAS, "old", "ok"): before[ALIAS, "old", "ok"]}
    house.app.releases.replace({})
    assert house.counted() == {}
    releases = Releases(house.metrics)
    releases.replace({"follows": [ReleaseArm(NAME, "", 1.0)]})
    route = releases.routes["follows"]
    for i in range(50):
        route.count(route.choose(b""), f"v{i}", 0.1)
    assert len(house.counted()) == 1 + MOST_FOLLOWED
    assert ("follows", "v49", "ok") in house.counted()


def test_what_follows_counts_on_whatever_else_changes() -> None:
    """Another alias is set, or an arm gets another share: no counter of a version that was answered starts anew, and a
    failure without a version is the last one's.
    """
    house, follows = House({}), {ALIAS: [ReleaseArm(NAME, "", 1.0)]}
    releases = house.app.releases
    releases.replace(follows)
    for version in ("v6", "v7"):
        releases.routes[ALIAS].count(releases.routes[ALIAS].choose(b"1"), version, 0.1)
    releases.replace({**follows, **HELD})
    assert house.counted() == {(ALIAS, "v6", "ok"): 1, (ALIAS, "v7", "ok"): 1}
    releases.routes[ALIAS].count(releases.routes[ALIAS].choose(b"1"), "", None)
    assert house.counted()[ALIAS, "v7", "failed"] == 1


def test_a_request_under_way_leaves_no_series_of_what_was_removed() -> None:
    """Neither of an alias nor of an arm: its answer comes when the table has changed, and is not counted."""
    house = House(CANARY)
    releases = house.app.releases
    route = releases.routes[ALIAS]
    old, new = route._arms
    releases.replace({ALIAS: [ReleaseArm(NAME, "", 1.0)]})
    route.count(old, "old", 0.1)
    assert house.counted() == {}
    route.count(new, "v1", 0.1)
    assert house.counted() == {(ALIAS, "v1", "ok"): 1}
    releases.replace({})
    route.count(new, "v1", 0.1)
    assert house.counted() == {}


@pytest.mark.parametrize(
    ("models", "answered"),
    [((), 200), (("au/",), 200), (("au/nsw1@",), 403), (("au/nsw1.mar",), 403), (("de/",), 403)],
)
def test_a_token_must_allow_the_alias_and_the_model(tmp_path: Path, models: Sequence[str], answered: int) -> None:
    """Both: else an alias would open another's model, or a model another's alias. Else nothing reaches a worker."""
    path = tmp_path / "tokens.toml"
    hashed, prefixes = hash_token(b"secret"), json.dumps(models)
    path.write_text(f'[[tokens]]\nname = "desk"\nsha256 = "{hashed}"\nscopes = ["invoke"]\nmodels = {prefixes}\n')
    house = House({ALIAS: [ReleaseArm(OLD, "old", 1.0)]}, tokens=path)
    assert house.ask(ALIAS, token="secret").status == answered
    assert len(house.worker.asked) == (answered == 200)
    assert house.ask(ALIAS, token="wrong").status == 401


class TakenPrices(PlaneInFront):
    """A plane that takes prices: two archives have forecasts for them."""

    def __init__(self, house: House) -> None:
        super().__init__(house.app.plane)
        self.models, self.items = list[str](), list[ObservedPrices]()

    async def infer(self, request: InferRequest) -> InferResponse:
        """See InferencePlane."""
        return await self._plane.infer(request)

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """See InferencePlane."""
        del deadline
        self.models, self.items = [item.model for item in items], list(items)
        paired = {NAME: PairedCounts(1, 0, 0), "au/vic1.mar": PairedCounts(0, 1, 0)}
        return ActualsReply([paired.get(item.model, PairedCounts(0, 0, 1)) for item in items], True, [])


def test_each_archive_of_a_name_gets_its_prices_once() -> None:
    """Whichever versions an alias or a rollback names: they share what their archive has learnt. The count is that of
    the archive which had a forecast.
    """
    canary = [ReleaseArm(OLD, "old", 0.8), ReleaseArm(NAME, "", 0.1), ReleaseArm("au/vic1.mar", "", 0.1)]
    house = House({ALIAS: canary, **HELD})
    taken = TakenPrices(house)
    plane, prices = ReleasedPlane(taken, house.app.releases), [Price(0, False, 1.0)]
    items = [ObservedPrices(name, prices) for name in (ALIAS, NAME, "de/lu.mar")]
    reply = asyncio.run(plane.record_actuals(items, 1e9))
    assert taken.models == [NAME, "au/vic1.mar", NAME, "de/lu.mar"]
    assert reply.counts == [PairedCounts(1, 0, 0), PairedCounts(1, 0, 0), PairedCounts(0, 0, 1)]


def test_an_alias_of_several_archives_may_have_one_without_the_product() -> None:
    """The product goes to each archive; of one archive, whichever its versions, a product that it lacks is refused."""
    canary = [ReleaseArm(OLD, "old", 0.8), ReleaseArm(NAME, "", 0.1), ReleaseArm("au/vic1.mar", "", 0.1)]
    house = House({ALIAS: canary, **HELD})
    taken = TakenPrices(house)
    plane = ReleasedPlane(taken, house.app.releases)
    asyncio.run(plane.record_actuals([ObservedPrices(name, [], "energy") for name in (ALIAS, NAME)], 1e9))
    assert [(each.model, each.product, each.strict) for each in taken.items] == [
        (NAME, "energy", False),
        ("au/vic1.mar", "energy", False),
        (NAME, "energy", True),
    ]
