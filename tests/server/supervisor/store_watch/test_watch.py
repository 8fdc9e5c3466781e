"""Resident models follow the store: rounds of comparison, events, what is left alone. The store is a real folder."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from model_store.errors import StoreUnavailable
from model_store.names import ModelName
from model_store.stores.object_store import Source, open_source
from server.errors import Situation
from server.ipc.control import ControlError
from server.metrics import HostMetrics
from server.supervisor.store_watch import watch as store_watch
from server.supervisor.store_watch.lookups import StoreLookups
from server.supervisor.store_watch.watch import StoreWatch, TooManyEvents

A, B, C = ModelName("au/a.mar"), ModelName("au/b.mar"), ModelName("c.mar")


class Workers:
    """Workers that hold models and load them from a source; `bad` versions are refused as their archives would be."""

    def __init__(self, source: Source, workers: int = 2) -> None:
        self.source = source
        self.held: dict[int, dict[ModelName, str]] = {worker: {} for worker in range(workers)}
        self.reloads: list[tuple[ModelName, int]] = []
        self.refusal: ControlError | None = None
        self.silent: set[int] = set()
        self.running = self.most_running = 0

    def hold(self, models: Sequence[ModelName], workers: Iterable[int] = (0,)) -> None:
        """Load the models as they are now."""
        for worker in workers:
            for model in models:
                self.held[worker][model] = self.source.read_version(model)

    async def list_versions(self) -> dict[ModelName, dict[int, str]]:
        """See Fleet."""
        found: dict[ModelName, dict[int, str]] = {}
        for worker, models in self.held.items():
            if worker in self.silent:
                continue
            for model, version in models.items():
                found.setdefault(model, {})[worker] = version
        return found

    def has_listed_all(self) -> bool:
        """See Fleet."""
        return not self.silent

    async def reload_at(self, worker: int, model: ModelName) -> str:
        """See Fleet."""
        self.reloads.append((model, worker))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await asyncio.sleep(0)
        self.running -= 1
        if self.refusal is not None:
            raise self.refusal
        self.held[worker][model] = self.source.read_version(model)
        return self.held[worker][model]

    def take_reloads(self) -> list[tuple[ModelName, int]]:
        """Those since the last time, in order of names."""
        taken, self.reloads = sorted(self.reloads), []
        return taken


class House:
    """A folder with archives, workers and their watch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for model in (A, B, C):
            self.write(model, b"first")
        self.source = open_source(str(folder))
        self.workers, self.metrics = Workers(self.source), HostMetrics()
        self.watch = StoreWatch(self.workers, self.metrics, revalidate_s=0.01, lanes=2, polls=True)
        self.lookups = StoreLookups(self.source)

    def write(self, model: ModelName, data: bytes) -> None:
        """As a publisher does."""
        (self.folder / model).parent.mkdir(exist_ok=True)
        (self.folder / model).write_bytes(data)

    def round(self) -> list[tuple[ModelName, int]]:
        """One round of comparison: what it had reloaded."""
        asyncio.run(self.watch.follow_store(self.lookups))
        return self.workers.take_reloads()

    def checks(self) -> dict[str, float]:
        """The metric, without what was never counted."""
        counted = {result: series._value.get() for result, series in self.metrics.checks.items()}
        return {result: count for result, count in counted.items() if count}


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Three archives; nothing is resident."""
    return House(tmp_path)


def test_every_holder_of_a_changed_archive_reloads_it_once(house: House) -> None:
    """Held by two workers: both reload in the next round, others do not; the round after that finds no change."""
    house.workers.hold([A, B], workers=(0, 1))
    house.workers.hold([C])
    assert house.round() == []
    house.write(A, b"second")
    assert house.round() == [(A, 0), (A, 1)]
    assert house.round() == []
    assert house.checks() == {"unchanged": 3 + 2 + 3, "changed": 1}


def test_what_is_not_resident_is_not_asked_for(house: House) -> None:
    """A change of an archive that no worker holds reloads nothing and is no check."""
    house.write(A, b"second")
    assert house.round() == []
    assert house.checks() == {}


def test_a_removed_archive_goes_on_serving(house: House) -> None:
    """It is counted and left alone; written again, it is a change."""
    house.workers.hold([A, B])
    (house.folder / A).unlink()
    assert house.round() == []
    assert house.checks() == {"unchanged": 1, "removed": 1}
    house.write(A, b"back")
    assert house.round() == [(A, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("situation", [Situation.ARCHIVE_FAILED, Situation.STORE_FAILED])
def test_a_bad_version_is_left_alone_and_a_passing_failure_tried_again(house: House, situation: Situation) -> None:
    """A bad archive is tried once, and once more when it is written anew; what the store failed at, in each round."""
    house.workers.hold([A])
    house.write(A, b"bad")
    house.workers.refusal = ControlError("refused", situation)
    assert house.round() == [(A, 0)]
    assert bool(house.round()) == (situation is Situation.STORE_FAILED)
    house.workers.refusal = None
    house.write(A, b"better")
    assert house.round() == [(A, 0)]


@pytest.mark.slow
def test_a_released_model_is_tried_again(house: House) -> None:
    """Refused for its quarantine and then released by an operator: the next round loads it; in any case the tenth."""
    house.workers.hold([A])
    house.write(A, b"second")
    house.workers.refusal = ControlError("quarantined", Situation.ARCHIVE_FAILED)
    assert house.round() == [(A, 0)]
    house.watch.release(A)
    assert house.round() == [(A, 0)]
    assert sum(bool(house.round()) for _ in range(store_watch.SETTLED_ROUNDS)) == 1


def test_a_store_that_names_versions_otherwise_in_listings_costs_two_reloads(house: House) -> None:
    """A listing's version that no load ever gives: the holder finds its version unchanged, once more, and is left in
    peace. Once alone says nothing: the store may have failed between the two requests.
    """
    house.workers.hold([A])
    serving = house.workers.held[0][A]
    house.workers.source = open_source(str(house.folder))
    house.source.read_version = lambda name: f"listed-{name}"  # type: ignore[method-assign]
    assert house.round() == [(A, 0)]
    assert house.round() == [(A, 0)]
    assert house.workers.held[0][A] == serving
    assert house.round() == []


@pytest.mark.slow
def test_rounds_are_rarer_while_the_store_is_gone(house: House) -> None:
    """Each failed round doubles the pause up to ten minutes, checks count as failed; the first good one ends it."""
    house.workers.hold([A, B])
    asks = []

    def fail(name: ModelName) -> str:
        asks.append(name)
        raise StoreUnavailable("gone")

    read, house.source.read_version = house.source.read_version, fail  # type: ignore[method-assign]
    first = house.watch.pause_s()
    pauses = []
    for _ in range(30):
        assert house.round() == []
        pauses.append(house.watch.pause_s())
    assert pauses[:2] == [2 * first, 4 * first]
    assert pauses[-1] == store_watch.MOST_PAUSE_S
    assert house.checks() == {"failed": 2 * 30}
    house.source.read_version = read  # type: ignore[method-assign]
    house.round()
    assert house.watch.pause_s() == first


def test_loader_threads_are_left_for_requests(house: House) -> None:
    """A hundred archives change at once: a worker gets two at a time, and all in the end."""
    models = [ModelName(f"many/{i:03}.mar") for i in range(100)]
    for model in models:
        house.write(model, b"first")
    house.workers.hold(models)
    for model in models:
        house.write(model, b"second")
    assert house.round() == [(model, 0) for model in models]
    assert house.workers.most_running == 2


def test_an_event_reloads_what_is_resident_at_once(house: House) -> None:
    """Told of three names, of which one is held by two workers: both reload it, without a question to the store."""
    house.workers.hold([A], workers=(0, 1))
    house.workers.hold([B])
    house.source.read_version = lambda name: pytest.fail(f"{name} was asked for")  # type: ignore[method-assign]
    house.workers.source = open_source(str(house.folder))
    house.watch.tell([A, C])
    asyncio.run(house.watch.follow_events())
    assert house.workers.take_reloads() == [(A, 0), (A, 1)]


@pytest.mark.parametrize("missed", ["store", "worker", "copy"])
def test_an_event_is_followed_until_it_has_an_effect(
    house: House, monkeypatch: pytest.MonkeyPatch, missed: str
) -> None:
    """Where nothing is compared: the store failed a holder, gave it no answer so that it took its copy, or the worker
    was silent. The event was answered, so that nobody sends it again; once it has been followed, all is quiet.
    """
    monkeypatch.setattr(store_watch, "RETRY_S", 0.0)
    watch = StoreWatch(house.workers, house.metrics, revalidate_s=60.0, lanes=2, polls=False)
    house.workers.hold([A], workers=(0, 1))
    if missed == "copy":
        watch.tell([A])
        asyncio.run(watch.follow_events())
    house.write(A, b"second")
    if missed == "store":
        house.workers.refusal = ControlError("503", Situation.STORE_FAILED)
    elif missed == "worker":
        house.workers.silent = {1}
    if missed != "copy":
        watch.tell([A])
        asyncio.run(watch.follow_events())
    house.workers.refusal, house.workers.silent = None, set()
    house.workers.take_reloads()
    second = house.source.read_version(A)
    asyncio.run(watch.follow_events())
    assert {held[A] for held in house.workers.held.values()} == {second}
    for _ in range(store_watch.MOST_TRIES):
        asyncio.run(watch.follow_events())
    house.workers.take_reloads()
    asyncio.run(watch.follow_events())
    assert house.workers.take_reloads() == []


def test_a_watch_that_runs_follows_an_event_again_by_itself(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another event; an archive that is bad is not tried again."""
    monkeypatch.setattr(store_watch, "RETRY_S", 0.01)
    watch = StoreWatch(house.workers, house.metrics, revalidate_s=60.0, lanes=2, polls=False)
    house.workers.hold([A])

    async def count_reloads(situation: Situation, enough: int) -> int:
        house.workers.refusal = ControlError("refused", situation)
        watch.tell([A])
        running = asyncio.create_task(watch.run(lambda: house.source))
        for _ in range(3000):
            await asyncio.sleep(0.01)
            if len(house.workers.reloads) >= enough:
                break
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return len(house.workers.take_reloads())

    async def scenario() -> tuple[int, int]:
        return await count_reloads(Situation.ARCHIVE_FAILED, 1), await count_reloads(Situation.STORE_FAILED, 3)

    bad, passing = asyncio.run(scenario())
    assert bad == 1
    assert passing >= 3


def test_events_are_bounded(house: House) -> None:
    """More names than are kept are refused whole, so that the sender tries again."""
    house.watch.tell(ModelName(f"{i}.mar") for i in range(store_watch.MOST_TOLD))
    with pytest.raises(TooManyEvents, match=f"{store_watch.MOST_TOLD} changed archives wait"):
        house.watch.tell([A])
