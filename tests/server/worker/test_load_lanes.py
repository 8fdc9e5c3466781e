"""The lanes of loads, with a clock and a store of the test's own: who asks, who waits, and who waits for nobody."""

import asyncio
import gc
import random
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from model_store.errors import ArchiveInvalid, CodeBusy, LoadError, StoreUnavailable
from model_store.names import ModelName
from server.ipc.pulse import Pulse
from server.worker import load_lanes
from server.worker.load_lanes import (
    CODE_PLACES,
    FETCHED_BYTES,
    MOST_CODE_WAITING,
    SLOW_PLACES,
    SLOW_S,
    SUSPECTED_S,
    LoadLanes,
)
from server.worker.model_loader import AskStore, BuildFetched, LoadedModel, LoadSteps, StartCode
from tests.patience import PATIENCE_S
from tests.server.worker.test_step_loop import FakeLoader, let_loop_run

TIMED_OUT = StoreUnavailable("timed out")


class HeldStore(FakeLoader):
    """A store that answers for a key when the test says so, and a disk with `fresh` and `due` copies."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh, self.due = set[str](), set[str]()
        self.code = set[str]()  #: archives with code, which loads when the test says so
        self.asked: list[str] = []
        self.started: list[str] = []
        self.is_well = False  #: it answers at once
        self.size = 0  #: bytes of what it gives
        self._answers: dict[str, Future[LoadError | None]] = {}

    def answer(self, model: str, error: LoadError | None = None) -> None:
        """Answer the request that the store has for this key, or the next one."""
        self._answers.setdefault(model, Future()).set_result(error)

    def answer_all(self, error: LoadError | None = TIMED_OUT) -> None:
        """Answer whatever asks, for example so that no thread is left."""
        for future in list(self._answers.values()):
            if not future.done():
                future.set_result(error)

    def answer_some(self, rng: random.Random, error: LoadError | None) -> None:
        """Answer a request that the store has, if there is one."""
        asking = [future for future in list(self._answers.values()) if not future.done()]
        if asking:
            rng.choice(asking).set_result(error)

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """From the disk where a copy may be served, else from the store; what this gives is fresh on disk then."""
        if model in self.code:
            yield StartCode()
            future = self._answers.setdefault(model, Future())
            self.started.append(model)
            if (error := future.result(PATIENCE_S)) is not None:
                raise error
            return self.build(model)
        if not revalidate and (model in self.fresh or (stale and model in self.due)):
            return replace(self.build(model), tier="disk", stale=model not in self.fresh)
        yield AskStore(has_copy=not revalidate and model in self.due)
        future = self._answers.setdefault(model, Future())
        self.asked.append(model)
        error = None if self.is_well else future.result(PATIENCE_S)
        self._answers.pop(model, None)
        if error is not None and model not in self.due:
            raise error
        if error is None:
            self.fresh.add(model)
        yield BuildFetched(stale=error is not None, size=self.size)
        return replace(self.build(model), stale=error is not None)


@dataclass
class Owner:
    """What the lanes tell. `clock`: the monotonic time, moved by the test."""

    store: HeldStore
    clock: list[float]
    lanes: LoadLanes = field(init=False)
    ended: dict[str, LoadedModel | LoadError] = field(default_factory=dict)
    room: bool = True
    refusal: LoadError | None = None

    def may_build(self) -> bool:
        """As the test says."""
        return self.room

    def may_start_code(self) -> bool:
        """As the test says."""
        return self.room

    def refuse_asking(self, model: ModelName) -> LoadError | None:
        """As the test says."""
        del model
        return self.refusal

    def end_load(self, model: ModelName, built: LoadedModel | LoadError) -> None:
        """A load ends once."""
        assert model not in self.ended
        self.ended[model] = built

    def start(self, *models: str, stale: bool = False) -> None:
        """Begin loads."""
        for model in models:
            self.lanes.start(ModelName(model), revalidate=False, stale=stale)

    def tiers(self) -> dict[str, str]:
        """Where the loaded models came from."""
        return {model: built.tier for model, built in self.ended.items() if isinstance(built, LoadedModel)}

    async def asking(self, count: int) -> None:
        """Until the store has had so many requests, and the others have come to where they wait."""
        store = self.store
        await let_loop_run(
            lambda: len(store.asked) == count and not self.lanes.disk.running and not self.lanes.waiting_to_build
        )

    async def advance(self, seconds: float) -> list[str]:
        """Let time pass; the models whose copies should be served."""
        self.clock[0] += seconds
        self.lanes.advance()
        return sorted(self.lanes.late(self.clock[0]))


Scenario = Callable[[Owner, HeldStore], Coroutine[Any, Any, None]]


def play(scenario: Scenario, threads: int = 4, asks: int = 0) -> None:
    """Run a scenario on lanes of so many loader threads."""

    async def run() -> None:
        store, clock = HeldStore(), [1_000.0]
        owner = Owner(store, clock)
        owner.lanes = LoadLanes(store, owner, pulse=Pulse(), threads=threads, asks=asks, now=lambda: clock[0])
        try:
            await scenario(owner, store)
        finally:
            owner.lanes.close()
            store.answer_all()

    asyncio.run(run())


def name_models(prefix: str, count: int) -> list[str]:
    """Names of family a, for example a/x0."""
    return [f"a/{prefix}{i}" for i in range(count)]


def test_keys_that_hang_keep_no_model_waiting_that_is_on_disk() -> None:
    """Eight keys hang, twice as many as there are loader threads; forty models on disk are loaded meanwhile."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        store.fresh.update(name_models("disk", 40))
        owner.start(*name_models("hung", 8))
        await owner.asking(4)
        owner.start(*name_models("disk", 40))
        await let_loop_run(lambda: len(owner.ended) == 40)
        assert set(owner.tiers().values()) == {"disk"}
        assert len(store.asked) == 4
        for model in name_models("hung", 8):
            store.answer(model)
        await let_loop_run(lambda: len(owner.ended) == 48)
        assert owner.tiers()["a/hung7"] == "store"

    play(scenario)


class HeldBytes:
    """Stands for an archive, which a load holds while it builds."""


@pytest.mark.parametrize("error", [ArchiveInvalid("broken"), ValueError("a bug of ours")])
def test_a_load_that_failed_leaves_nothing_to_the_collector(error: Exception) -> None:
    """An error that a frame of its own traceback kept would hold the archive's bytes until the collector comes."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        watched = list[weakref.ref[HeldBytes]]()

        def build(model: ModelName, *, revalidate: bool = False) -> LoadedModel:
            del model, revalidate
            held = HeldBytes()
            watched.append(weakref.ref(held))
            raise type(error)(*error.args)

        store.build = build  # type: ignore[method-assign]
        store.fresh.add("a/broken")
        owner.start("a/broken")
        await let_loop_run(lambda: "a/broken" in owner.ended)
        assert isinstance(owner.ended.pop("a/broken"), LoadError)
        await let_loop_run(lambda: not owner.lanes.disk.running)
        await let_loop_run(lambda: watched[0]() is None)

    gc.disable()
    try:
        play(scenario)
    finally:
        gc.enable()


def test_all_that_ends_is_told_though_one_end_fails() -> None:
    """Steps that end meanwhile are told together; an error in the middle of them, which the loop logs, stops none of
    the others.
    """

    async def scenario(owner: Owner, store: HeldStore) -> None:
        models = name_models("disk", 40)
        store.fresh.update(models)
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
        end_load = owner.end_load

        def fail_once(model: ModelName, built: LoadedModel | LoadError) -> None:
            end_load(model, built)
            if model == models[1]:
                raise RuntimeError("a bug of ours")

        owner.end_load = fail_once  # type: ignore[method-assign]
        owner.start(*models)
        await let_loop_run(lambda: len(owner.ended) == 40)
        await let_loop_run(lambda: not owner.lanes.disk.running)
        assert [str(each["exception"]) for each in errors] == ["a bug of ours"]
        assert not owner.lanes._ended

    play(scenario)


def test_a_request_that_hangs_gives_its_place_to_another() -> None:
    """After SLOW_S, up to a bound. The bound is told, and so are threads that all hang."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        most = 2 * (1 + SLOW_PLACES)
        owner.start(*name_models("hung", most + 3))
        for asked in range(2, most + 1, 2):
            await owner.asking(asked)
            assert owner.lanes.stuck_s(owner.clock[0] + 50) == (50 if asked == most else 0)
            assert owner.lanes.is_doubtful(owner.clock[0]) == (asked > 2)
            await owner.advance(SLOW_S)
        assert owner.lanes.is_doubtful(owner.clock[0])
        assert owner.lanes.store.is_full
        await owner.advance(50)
        assert len(store.asked) == most
        assert owner.lanes.waiting_to_ask == 3
        assert owner.lanes.stuck_s(owner.clock[0]) == 50 + SLOW_S
        store.answer(first := store.asked[0])
        await let_loop_run(lambda: len(store.asked) == most + 1)
        await let_loop_run(lambda: list(owner.tiers()) == [first])

    play(scenario, threads=2)


def test_keys_that_timed_out_have_half_of_the_lane() -> None:
    """Asked again they wait for one another, while other keys of the same store are fetched; an answer clears a key."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        owner.start(*name_models("hung", 4))
        await owner.asking(4)
        await owner.advance(SLOW_S)  # a quick failure is no time-out
        for model in name_models("hung", 4):
            store.answer(model, TIMED_OUT)
        await let_loop_run(lambda: len(owner.ended) == 4)
        owner.ended.clear()
        owner.start(*name_models("hung", 4))
        await owner.asking(6)
        owner.start("a/x", "a/y", "a/z")
        await owner.asking(8)
        assert set(store.asked[4:6]) < set(name_models("hung", 4))
        assert set(store.asked[6:]) < {"a/x", "a/y", "a/z"}
        for model in ("a/x", "a/y", "a/z"):
            store.answer(model)
        await let_loop_run(lambda: len(owner.ended) == 3)
        assert all(owner.lanes.prefers_copy(ModelName(model), owner.clock[0]) for model in name_models("hung", 4))
        for model in name_models("hung", 4):
            store.answer(model)
        await let_loop_run(lambda: len(owner.ended) == 7)
        assert not owner.lanes.prefers_copy(ModelName("a/hung0"), owner.clock[0])

    play(scenario)


def test_a_suspicion_passes() -> None:
    """After a minute a key that timed out is asked as any other."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        owner.start("a/hung")
        await owner.asking(1)
        await owner.advance(SLOW_S)
        store.answer("a/hung", TIMED_OUT)
        await let_loop_run(lambda: "a/hung" in owner.ended)
        assert isinstance(owner.ended["a/hung"], StoreUnavailable)
        assert owner.lanes.prefers_copy(ModelName("a/hung"), owner.clock[0])
        assert not owner.lanes.prefers_copy(ModelName("a/hung"), owner.clock[0] + SUSPECTED_S)

    play(scenario)


def test_suspected_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may name keys without end while the store hangs: the oldest suspicion goes."""
    monkeypatch.setattr(load_lanes, "MAX_SUSPECTS", 3)

    async def scenario(owner: Owner, store: HeldStore) -> None:
        owner.start(*name_models("hung", 4))
        await owner.asking(4)
        await owner.advance(SLOW_S)
        for model in name_models("hung", 4):
            store.answer(model, TIMED_OUT)
        await let_loop_run(lambda: len(owner.ended) == 4)
        assert sum(owner.lanes.prefers_copy(ModelName(model), owner.clock[0]) for model in name_models("hung", 4)) == 3

    play(scenario)


def test_a_due_copy_is_served_while_the_store_is_slow() -> None:
    """The load ends with the copy; its request goes on, says so, and what it brings is fresh on disk then."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        store.due.update({"a/due", "a/waits"})
        owner.start("a/due", "a/cold")
        await owner.asking(2)
        assert await owner.advance(SLOW_S / 2) == []
        assert await owner.advance(SLOW_S / 2) == ["a/due"]
        owner.lanes.serve_copy(ModelName("a/due"))
        await let_loop_run(lambda: "a/due" in owner.ended)
        built = owner.ended["a/due"]
        assert isinstance(built, LoadedModel)
        assert built.stale
        assert await owner.advance(0) == []
        assert owner.lanes.prefers_copy(ModelName("a/due"), owner.clock[0])
        store.answer("a/due")
        await let_loop_run(lambda: not owner.lanes.prefers_copy(ModelName("a/due"), owner.clock[0]))
        assert "a/due" in store.fresh
        assert list(owner.ended) == ["a/due"]

    play(scenario)


def test_a_request_that_has_not_begun_is_forgotten_with_its_load() -> None:
    """Of many due copies that are served instead, those wait for the store that have asked, and no others."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        models = name_models("due", 20)
        store.due.update(models)
        owner.start(*models)
        await owner.asking(4)
        for model in await owner.advance(SLOW_S):
            owner.lanes.serve_copy(ModelName(model))
        await let_loop_run(lambda: len(owner.ended) == 20)
        asked = len(store.asked)
        assert asked <= 12
        assert owner.lanes.waiting_to_ask == 0
        assert sum(owner.lanes.prefers_copy(ModelName(model), owner.clock[0]) for model in models) == asked
        for model in store.asked:
            store.answer(model)
        await let_loop_run(lambda: not owner.lanes.store.running)
        assert store.fresh == set(store.asked)

    play(scenario)


def test_the_store_wins_where_it_answers_before_the_copy_is_built() -> None:
    """Then the load ends with what the store gave, once."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        store.due.add("a/due")
        owner.start("a/due")
        await owner.asking(1)
        owner.clock[0] += SLOW_S
        owner.room = False
        owner.lanes.serve_copy(ModelName("a/due"))
        store.answer("a/due")
        await let_loop_run(lambda: owner.lanes.waiting_to_build == 2)
        owner.room = True
        owner.lanes.advance()
        await let_loop_run(lambda: not owner.lanes.disk.running)
        built = owner.ended["a/due"]
        assert isinstance(built, LoadedModel)
        assert not built.stale
        assert not owner.lanes.prefers_copy(ModelName("a/due"), owner.clock[0])

    play(scenario)


def test_archives_in_memory_are_few() -> None:
    """While nothing may be built, no more archives are fetched than there are loader threads."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        models = name_models("x", 12)
        for model in models:
            store.answer(model)
        owner.start(*models[:4])
        owner.room = False
        owner.start(*models[4:])
        await let_loop_run(lambda: owner.lanes.waiting_to_build == 12 and len(store.asked) == 4)
        await owner.advance(10 * SLOW_S)
        assert len(store.asked) == 4
        owner.room = True
        owner.lanes.advance()
        await let_loop_run(lambda: len(owner.ended) == 12)

    play(scenario)


def test_a_quick_store_is_asked_for_many_small_archives_at_a_time() -> None:
    """As many as are allowed once a size is known; before, and where archives are large, as many as loader threads."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        models = name_models("x", 40)
        owner.start(*models)
        await owner.asking(4)
        store.size = 70_000
        store.answer(models[0])
        await owner.asking(1 + 20)
        store.size = FETCHED_BYTES // 6
        store.answer(models[1])
        await let_loop_run(lambda: len(owner.ended) == 2)
        assert len(store.asked) == 21, "19 are under way, and six may be"
        for model in models[2:16]:
            store.answer(model)
        await owner.asking(22)
        store.answer_all(None)
        store.is_well = True
        await let_loop_run(lambda: len(owner.ended) == 40)

    play(scenario, asks=20)


def test_a_store_that_has_slowed_down_is_asked_no_more_than_by_loader_threads() -> None:
    """Twenty requests hang: no further one begins, the lane is full, and that is told."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        models = name_models("x", 40)
        store.size = 70_000
        owner.start(*models)
        await owner.asking(4)
        store.answer(models[0])
        await owner.asking(21)
        await owner.advance(2 * SLOW_S)
        assert len(store.asked) == 21
        assert owner.lanes.stuck_s(owner.clock[0]) == pytest.approx(2 * SLOW_S)
        for model in store.asked[1:]:
            store.answer(ModelName(model))
        await let_loop_run(lambda: len(owner.ended) >= 21)

    play(scenario, asks=20)


def test_a_load_without_a_copy_may_be_refused_before_it_asks() -> None:
    """The owner knows that the store is out: no request is made, and a copy waits for none of this."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        store.due.add("a/due")
        owner.refusal = ArchiveInvalid("as the test says")
        owner.start("a/cold", "a/due")
        await owner.asking(1)
        assert owner.ended == {"a/cold": owner.refusal}
        assert store.asked == ["a/due"]

    play(scenario)


def test_the_expected_time_is_that_of_the_lane() -> None:
    """A copy is expected after a build, a fetch after the requests before it, a due copy after SLOW_S at most."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        store.due.add("a/due")
        owner.lanes.disk.seconds, owner.lanes.store.seconds = 0.5, 30.0
        owner.start(*name_models("x", 8), "a/due")
        assert owner.lanes.expected_s(ModelName("a/x0"), owner.clock[0]) == 0.5
        await owner.asking(4)
        assert owner.lanes.expected_s(ModelName("a/x0"), owner.clock[0]) == 30.5
        assert owner.lanes.expected_s(ModelName("a/x7"), owner.clock[0]) > 37.0
        assert owner.lanes.expected_s(ModelName("a/due"), owner.clock[0]) == SLOW_S + 0.5
        assert owner.lanes.expected_s(ModelName("a/other"), owner.clock[0]) == 0

    play(scenario)


def test_code_that_hangs_keeps_only_code_waiting() -> None:
    """All places of the code lane hang, others wait up to a bound; what has no code is loaded meanwhile."""

    async def scenario(owner: Owner, store: HeldStore) -> None:
        names = name_models("code", CODE_PLACES + MOST_CODE_WAITING + 1)
        store.code.update(names)
        store.fresh.update(name_models("disk", 40))
        owner.start(*names)
        await let_loop_run(lambda: len(store.started) == CODE_PLACES and len(owner.ended) == 1)
        (refused,) = owner.ended.values()
        assert isinstance(refused, CodeBusy)
        owner.start(*name_models("disk", 40))
        await let_loop_run(lambda: len(owner.tiers()) == 40)
        assert owner.lanes.stuck_s(owner.clock[0] + 50) == 0
        owner.room = False
        first = store.started[0]
        store.answer(first, LoadError("it hung"))
        await let_loop_run(lambda: first in owner.ended)
        assert str(owner.ended[first]) == "it hung"
        assert len(store.started) == CODE_PLACES
        owner.room = True
        owner.lanes.advance()
        await let_loop_run(lambda: len(store.started) == CODE_PLACES + 1)
        while len(owner.ended) < len(names) + 40:
            store.answer_all(None)
            await asyncio.sleep(0.001)

    play(scenario)
