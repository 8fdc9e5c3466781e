"""The cache's decisions: examples, then a machine that plays a worker at random against a simple model of memory."""

import copy
from collections.abc import Iterable
from types import UnionType

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model_store.cache.cache import MAX_FAILURE_BYTES, Cache, FailedLoad, Load, Placed, Placement
from model_store.cache.eviction import POLICIES, make_policy
from model_store.cache.slots import Slot, State
from model_store.cache.victim_selection import Evict, Moves, Refuse, Wait
from model_store.errors import ArchiveInvalid, ModelNotFound, StoreUnavailable
from model_store.names import ModelName

SLAB = 1000
BROKEN = ArchiveInvalid("a test says so")


def name_model(text: str) -> ModelName:
    """A model name, unchecked."""
    return ModelName(text)


class InstantWorker:
    """Plays the step thread at once: no device to wait for, so a victim's room is free as soon as it is asked to go."""

    def __init__(self, slabs: int, extra: int = 0, policy: str = "lru") -> None:
        self.cache = Cache(slabs * SLAB + extra, SLAB, policy=make_policy(policy))
        self.now = 0.0
        self.moves = 0

    def place(self, model: str, charge: int, family: str | None, version: str = "1") -> tuple[Placement, list[str]]:
        """Ask until the answer is final; who went on the way."""
        gone: list[str] = []
        for _ in range(100):
            answer = self.cache.place(name_model(model), version, charge, self.now, family)
            if isinstance(answer, Evict):
                gone += [victim.model for victim in answer.victims]
                assert all(self.cache.retired(victim) for victim in answer.victims)
            elif isinstance(answer, Moves):
                self.moves += len(answer.moves)
                for slot, offset in answer.moves:
                    self.cache.moved(slot, offset)
            else:
                return answer, gone
        raise AssertionError(f"no end after 100 answers: {answer}")

    def load(self, model: str, charge: int, family: str | None = None, version: str = "1") -> list[str]:
        """Load to the end, which must succeed; returns who had to go."""
        assert isinstance(self.cache.want(name_model(model), self.now, reload=True), Load)
        answer, gone = self.place(model, charge, family, version)
        assert isinstance(answer, Placed), answer
        old = self.cache.ready(answer.slot, self.now)
        assert old is None or self.cache.retired(old)
        return gone

    def fill(self, models: Iterable[str], charge: int, family: str | None = None) -> None:
        """Load each; nobody has to go."""
        for model in models:
            assert self.load(model, charge, family) == []

    def use(self, *models: str) -> None:
        """A request for each, from its start to its end."""
        for model in models:
            self.cache.release(self.hold(model))

    def hold(self, model: str) -> Slot:
        """A request that has not ended."""
        slot = self.cache.lease(name_model(model), self.now)
        assert slot is not None, f"{model} is not here"
        return slot


def list_served(cache: Cache) -> set[str]:
    """The names that are served."""
    return {str(slot.model) for slot in cache}


# --- who goes --------------------------------------------------------------------------------------------------------


def test_one_family_loses_its_least_recently_used_model_first() -> None:
    """Victims within a family come in the exact order of last use, uses and loads alike."""
    worker = InstantWorker(slabs=2)
    worker.fill("abcdef", 300, "f")
    worker.use("b", "a", "e")
    assert [worker.load(model, 300, "f") for model in "123456"] == [["c"], ["d"], ["f"], ["b"], ["a"], ["e"]]


def test_a_family_takes_its_own_coldest_row_when_nothing_else_is_colder() -> None:
    """The other family's slab costs warmer models, so the load costs one row of its own family."""
    worker = InstantWorker(slabs=2)
    worker.fill("abc", 300, "f")
    worker.fill("xyz", 300, "g")
    assert worker.load("d", 300, "f") == ["a"]


def test_a_family_takes_a_colder_slab_of_another_one_once_it_has_use_for_it() -> None:
    """Three models for one is a bad trade, for as many as the family had to let go lately a good one."""
    worker = InstantWorker(slabs=2)
    worker.fill("xyz", 300, "g")
    worker.fill("abc", 300, "f")
    assert [worker.load(model, 300, "f") for model in "de"] == [["a"], ["x", "y", "z"]]


def test_one_warm_model_saves_its_slab() -> None:
    """A slab counts as warm as the warmest model that would have to go: here that is warmer than the family's own."""
    worker = InstantWorker(slabs=2)
    worker.fill("xyz", 300, "g")
    worker.fill("abc", 300, "f")
    worker.use("z")
    assert worker.load("d", 300, "f") == ["a"]


def test_a_single_goes_when_it_is_the_coldest() -> None:
    """Singles and rows are compared by last use, whatever they are."""
    worker = InstantWorker(slabs=2)
    worker.load("s", SLAB)
    worker.fill("abc", 300, "f")
    assert worker.load("d", 300, "f") == ["s"]
    worker.use("a", "b", "c", "d")
    assert worker.load("t", SLAB) == ["a"]  # four rows on two slabs: one goes, three lie together


def test_small_singles_go_only_if_they_are_worth_the_room_together() -> None:
    """Cold singles that are too small to help are not lost on the way to a solution that does not need them."""
    worker = InstantWorker(slabs=3)
    worker.fill("st", 400)
    worker.fill("abcxyz", 300, "f")
    assert [worker.load(model, 300, "f") for model in "de"] == [
        ["a"],
        ["s", "t"],
    ]  # 800 and the 200 that were left: a slab
    worker = InstantWorker(slabs=3)
    worker.fill("st", 400)
    worker.fill("abcxyz", 300, "f")
    worker.use("t")
    assert worker.load("d", 300, "f") == ["a"]


def test_relief_is_the_coldest_idle_singles_and_no_row() -> None:
    """What frees memory outside of the slabs goes, coldest first, until it is enough or nothing idle is left."""
    worker = InstantWorker(slabs=4)
    worker.fill("ab", 300, "f")
    worker.fill("wxyz", 100)
    worker.use("w")
    held = worker.hold("x")
    assert [slot.model for slot in worker.cache.relieve(150)] == ["y", "z"]
    assert worker.cache.relieve(0) == ()
    last = worker.cache.relieve(10**9)
    assert [slot.model for slot in last] == ["w"]
    assert all(worker.cache.retired(slot) for slot in last)
    worker.cache.release(held)
    assert {"a", "b", "x"} <= list_served(worker.cache)


def test_a_single_that_grows_is_counted_and_others_make_room() -> None:
    """What a process takes is measured now and again: the budget counts it, also beyond its end, until others go."""
    worker = InstantWorker(slabs=1)
    worker.fill("abc", 100)
    slot = worker.cache.get(name_model("a"))
    assert slot is not None
    worker.cache.recharge(slot, SLAB)
    assert worker.cache.used_bytes == SLAB + 200
    worker.use("a")
    gone = worker.cache.relieve(worker.cache.used_bytes - worker.cache.budget_bytes)
    assert [victim.model for victim in gone] == ["b", "c"]
    assert all(map(worker.cache.retired, gone))
    worker.cache.recharge(slot, 50)
    assert worker.cache.used_bytes == 50


def test_room_for_more_of_one_is_made_of_idle_others_or_of_none() -> None:
    """The coldest go, as few as are needed; neither the one that grows nor one in use; and none where it is no help."""
    worker = InstantWorker(slabs=1)
    worker.fill("abcd", SLAB // 4)
    slot, held = worker.cache.get(name_model("a")), worker.hold("b")
    assert slot is not None
    assert worker.cache.make_room(0, slot) == ()
    assert worker.cache.make_room(3 * SLAB // 4, slot) is None
    assert list_served(worker.cache) == {"a", "b", "c", "d"}
    gone = worker.cache.make_room(SLAB // 4, slot)
    assert gone is not None
    assert [victim.model for victim in gone] == ["c"]
    assert all(map(worker.cache.retired, gone))
    worker.cache.release(held)


def test_a_cold_slab_is_reclaimed_by_moving_its_hot_rows() -> None:
    """Cold rows that lie in different slabs go, hot ones move together, leased ones as well, and keep their leases."""
    worker = InstantWorker(slabs=3)
    worker.fill("abcdefghi", 300, "f")
    worker.use("a", "b", "d", "e", "g", "h")
    held = worker.hold("a")
    assert worker.load("x", 600, "g") == ["c", "f", "i"]
    assert worker.moves == 2
    assert list_served(worker.cache) == set("abdeghx")
    rows = {slot.offset for slot in worker.cache}
    assert len(rows) == 7
    assert held is worker.cache.get(name_model("a"))
    assert held.leases == 1


def test_moves_come_a_few_at_a_time() -> None:
    """Draining a slab of many hot rows is cut into calls, so that requests go on between them."""
    cache = Cache(2 * SLAB, SLAB, moves_per_call=2)
    worker = InstantWorker(2)
    worker.cache = cache
    worker.fill([f"m{i}" for i in range(20)], 100, "f")
    for i in range(10):
        slot = cache.unload(name_model(f"m{2 * i}"))
        assert slot is not None
        assert cache.retired(slot)
    cache.want(name_model("x"), 0)
    answer = cache.place(name_model("x"), "1", SLAB, 0, "g")
    assert isinstance(answer, Moves)
    assert len(answer.moves) == 2
    assert isinstance(worker.place("x", SLAB, "g")[0], Placed)
    assert worker.moves == 5


def test_an_unpinned_model_is_the_most_recently_used() -> None:
    """The end of a pin counts as a use, in its own family and in comparison with others; the end of no pin does not."""
    worker = InstantWorker(slabs=2)
    worker.cache.pin(name_model("x"))
    worker.fill("xyz", 300, "g")
    worker.fill("abc", 300, "f")
    worker.cache.unpin(name_model("x"))
    worker.cache.unpin(name_model("y"))
    assert worker.load("d", 300, "f") == ["a"]
    assert worker.load("w", 300, "g") == ["y"]


# --- leases, waits, refusals -----------------------------------------------------------------------------------------


def test_a_revived_victim_stays_and_the_load_gets_another() -> None:
    """A request for a model on its way out keeps it; the late `retired` is told so, and the load asks again."""
    worker = InstantWorker(slabs=1)
    cache = worker.cache
    worker.fill("abc", 300, "f")
    cache.want(name_model("d"), 0)
    first = cache.place(name_model("d"), "1", 300, 0, "f")
    assert isinstance(first, Evict)
    assert isinstance(cache.place(name_model("d"), "1", 300, 0, "f"), Wait)
    revived = worker.hold("a")
    assert first.victims == (revived,)
    assert cache.retired(revived) is False
    second = cache.place(name_model("d"), "1", 300, 0, "f")
    assert isinstance(second, Evict)
    assert [victim.model for victim in second.victims] == ["b"]
    assert cache.retired(second.victims[0])
    assert isinstance(cache.place(name_model("d"), "1", 300, 0, "f"), Placed)
    assert cache.release(revived) is False
    assert list_served(cache) == {"a", "c"}


def test_a_load_that_would_not_fit_in_the_end_evicts_nobody() -> None:
    """Evicting all that may go would not make room for it: it waits, and everyone keeps their place."""
    worker = InstantWorker(slabs=3)
    worker.fill("abc", 300, "f")
    worker.fill("st", SLAB)
    held = worker.hold("s")
    worker.cache.want(name_model("big"), 0)
    answer, gone = worker.place("big", 2 * SLAB + 1, None)
    assert (answer, gone) == (Wait(), [])
    assert list_served(worker.cache) == set("abcst")
    worker.cache.release(held)
    answer, gone = worker.place("big", 2 * SLAB + 1, None)
    assert isinstance(answer, Placed)
    assert sorted(gone) == ["a", "b", "c", "s", "t"]


def test_a_slab_that_is_being_written_is_not_counted_on() -> None:
    """Rows on their way in cannot move, so slabs that hold one are no room to come: nobody is evicted for them."""
    worker = InstantWorker(slabs=2)
    worker.fill("abcdef", 300, "f")
    for model in ("b", "e"):  # one of each slab
        slot = worker.cache.unload(name_model(model))
        assert slot is not None
        assert worker.cache.retired(slot)
    for model in "xy":
        worker.cache.want(name_model(model), 0)
        assert isinstance(worker.place(model, 300, "f")[0], Placed)
    worker.cache.want(name_model("g"), 0)
    answer, gone = worker.place("g", 700, "g")
    assert (answer, gone) == (Wait(), [])
    assert list_served(worker.cache) == set("acdf")


def test_when_all_room_is_leased_a_load_waits_for_a_release() -> None:
    """Wait, not Refuse, and nobody goes; the first release makes room."""
    worker = InstantWorker(slabs=1)
    worker.fill("abc", 300, "f")
    held = [worker.hold(model) for model in "abc"]
    worker.cache.want(name_model("d"), 0)
    assert worker.place("d", 300, "f") == (Wait(), [])
    assert worker.cache.release(held[1]) is False
    answer, gone = worker.place("d", 300, "f")
    assert isinstance(answer, Placed)
    assert gone == ["b"]


@pytest.mark.parametrize("family", ["f", "g", None])
def test_pins_that_fill_the_budget_refuse_and_say_so(family: str | None) -> None:
    """No patience helps against pins, so the load ends at once; the text has the bytes and what to do."""
    worker = InstantWorker(slabs=2)
    for model in "abcdef":
        worker.cache.pin(name_model(model))
    worker.fill("abcdef", 300, "f")
    worker.cache.want(name_model("x"), 0)
    answer, gone = worker.place("x", 300, family)
    assert answer == Refuse("pinned models hold 2000 of 2000 bytes; unpin some or raise model_cache_bytes")
    assert gone == []
    worker.cache.unpin(name_model("b"))
    answer, gone = worker.place("x", 300, "f")
    assert isinstance(answer, Placed)
    assert gone == ["b"]


def test_pins_scattered_over_slabs_do_not_fill_them() -> None:
    """One pin in each slab blocks no slab: pinned rows move together, and another family gets the room."""
    worker = InstantWorker(slabs=3)
    worker.fill("abcdefghi", 300, "f")
    for model in "adg":
        worker.cache.pin(name_model(model))
    worker.cache.pin(name_model("x"))
    assert worker.load("x", 900, "g") == ["b", "c", "e"]
    assert worker.load("s", 900) == ["f", "h", "i"]
    worker.cache.want(name_model("y"), 0)
    worker.cache.pin(name_model("s"))
    answer, _ = worker.place("y", 900, "g")
    assert isinstance(answer, Refuse)
    assert "pinned models hold 2900 of 3000 bytes" in answer.why


def test_a_family_may_use_the_rows_beside_its_pins() -> None:
    """A slab held by pins has unpinned rows: leased now, so their family waits for them, while others are refused."""
    worker = InstantWorker(slabs=1)
    worker.fill("abc", 300, "f")
    worker.cache.pin(name_model("a"))
    held = [worker.hold("b"), worker.hold("c")]
    worker.cache.want(name_model("d"), 0)
    worker.cache.want(name_model("x"), 0)
    assert worker.place("d", 300, "f") == (Wait(), [])
    assert isinstance(worker.place("x", 300, "g")[0], Refuse)
    worker.cache.release(held[0])
    assert isinstance(worker.place("d", 300, "f")[0], Placed)


@pytest.mark.parametrize(("family", "charge", "what"), [("g", 1001, "slab_bytes"), (None, 2501, "model_cache_bytes")])
def test_what_never_fits_is_refused_at_once(family: str | None, charge: int, what: str) -> None:
    """A row larger than a slab, a single larger than the budget: the text names the setting, and nobody goes."""
    worker = InstantWorker(slabs=2, extra=500)
    worker.fill("abc", 300, "f")
    worker.cache.want(name_model("x"), 0)
    answer, gone = worker.place("x", charge, family)
    assert isinstance(answer, Refuse)
    assert what in answer.why
    assert str(charge) in answer.why
    assert gone == []


def test_a_pin_saves_a_victim_that_has_not_left() -> None:
    """Pinning a model on its way out keeps it, as a lease would."""
    worker = InstantWorker(slabs=1)
    worker.fill("abc", 300, "f")
    worker.cache.want(name_model("d"), 0)
    answer = worker.cache.place(name_model("d"), "1", 300, 0, "f")
    assert isinstance(answer, Evict)
    worker.cache.pin(name_model("a"))
    assert worker.cache.retired(answer.victims[0]) is False
    assert worker.place("d", 300, "f")[1] == ["b"]


# --- unload, swap ----------------------------------------------------------------------------------------------------


def test_an_unloaded_model_leaves_with_its_last_lease() -> None:
    """Unload hides the model at once; its room is held until the last of its requests has ended."""
    worker = InstantWorker(slabs=1)
    worker.fill("a", 300, "f")
    first, second = worker.hold("a"), worker.hold("a")
    assert worker.cache.unload(name_model("a")) is first
    assert worker.cache.lease(name_model("a"), 1) is None
    assert worker.cache.unload(name_model("a")) is None
    assert worker.cache.retired(first) is False
    assert worker.cache.release(second) is False
    assert worker.cache.used_bytes == SLAB
    assert worker.cache.release(first) is True
    assert worker.cache.retired(first) is True
    assert (worker.cache.used_bytes, first.state) == (0, State.EMPTY)


def test_leases_of_a_call_are_taken_and_ended_together() -> None:
    """Each is a lease like any other: it revives a victim, ranks its model, and the last of an unloaded one says so."""
    worker = InstantWorker(slabs=1)
    cache = worker.cache
    worker.fill("abc", 300, "f")
    names = [name_model(each) for each in "aab"]
    slots = cache.lease_all(names, 5)
    assert [(slot.model, slot.leases, slot.used_at) for slot in slots] == [
        (names[0], 2, 5),
        (names[0], 2, 5),
        (names[2], 1, 5),
    ]
    assert cache.unload(names[0]) is slots[0]
    assert cache.release_all(slots[1:]) == []
    assert cache.release_all(slots[:1]) == [slots[0]]
    assert cache.retired(slots[0])
    other = InstantWorker(slabs=1)
    other.fill("ab", SLAB // 2, "f")
    other.cache.want(name_model("c"), 1)
    evict = other.cache.place(name_model("c"), "1", SLAB // 2, 1, "f")
    assert isinstance(evict, Evict)
    (victim,) = evict.victims
    assert other.cache.lease_all([victim.model], 2) == [victim]
    assert victim.state is State.READY
    assert not other.cache.retired(victim)


def test_a_new_version_serves_while_leases_on_the_old_one_run_out() -> None:
    """After the swap new requests get the new row; the old row stays readable until its own leases end."""
    worker = InstantWorker(slabs=1)
    cache = worker.cache
    worker.fill("a", 300, "f")
    old = worker.hold("a")
    cache.want(name_model("a"), 1, reload=True)
    answer, gone = worker.place("a", 300, "f", "2")
    assert isinstance(answer, Placed)
    assert gone == []
    assert worker.hold("a") is old  # until the new numbers are there
    assert cache.ready(answer.slot, 2) is None
    assert worker.hold("a") is answer.slot
    assert (old.offset != answer.slot.offset, old.condemned, old.leases) == (True, True, 2)
    assert [cache.release(old), cache.release(old)] == [False, True]
    assert cache.retired(old)
    assert [slot.version for slot in cache] == ["2"]


def test_a_reload_that_finds_the_same_version_is_over() -> None:
    """`unchanged` ends the load and keeps the slot; another version does not match and the load goes on."""
    worker = InstantWorker(slabs=1)
    cache = worker.cache
    worker.fill("a", 300, "f")
    cache.want(name_model("a"), 1, reload=True)
    assert cache.unchanged(name_model("a"), "2") is None
    assert cache.unchanged(name_model("a"), "1") is cache.get(name_model("a"))
    assert list(cache.loads) == []


def test_an_abandoned_row_is_free_again() -> None:
    """When the numbers never arrive the room goes back, and the failed load leaves nothing but its memory."""
    worker = InstantWorker(slabs=1)
    worker.cache.want(name_model("a"), 0)
    answer, _ = worker.place("a", 300, "f")
    assert isinstance(answer, Placed)
    assert worker.cache.used_bytes == SLAB
    worker.cache.abandon(answer.slot)
    worker.cache.failed(name_model("a"), BROKEN, 0)
    assert (worker.cache.used_bytes, list_served(worker.cache), list(worker.cache.loads)) == (0, set(), [])


# --- failures --------------------------------------------------------------------------------------------------------


def test_one_load_however_many_want_it() -> None:
    """Single flight: the first asker gets the load, all others None until it is over."""
    cache = Cache(SLAB, SLAB)
    assert [isinstance(cache.want(name_model("a"), 0), Load), cache.want(name_model("a"), 0)] == [True, None]
    assert cache.want(name_model("a"), 0, reload=True) is None


def test_back_off_doubles_up_to_its_cap_and_a_success_ends_it() -> None:
    """1, 2, 4 ... 32 s for a broken archive; refused until that is over, tried again after, forgotten once it works."""
    worker = InstantWorker(slabs=1)
    cache = worker.cache
    waits = []
    for _ in range(8):
        assert isinstance(cache.want(name_model("a"), worker.now), Load)
        failure = cache.failed(name_model("a"), BROKEN, worker.now)
        assert cache.want(name_model("a"), failure.until - 0.001) is failure
        waits.append(failure.until - worker.now)
        worker.now = failure.until
    assert waits == [1, 2, 4, 8, 16, 32, 32, 32]
    worker.load("a", 300, "f")
    assert list(cache.failures()) == []


def test_a_missing_model_is_remembered_for_a_second_at_most() -> None:
    """However often it was missing, a new archive is found within a second."""
    cache = Cache(SLAB, SLAB)
    waits = []
    for _ in range(4):
        cache.want(name_model("a"), 100, reload=True)
        waits.append(cache.failed(name_model("a"), ModelNotFound("no such key"), 100).until - 100)
    assert waits == [0.5, 1, 1, 1]


def test_a_failing_store_is_remembered_for_two_seconds_at_most() -> None:
    """However long it failed: what was asked meanwhile is served soon after the store is back."""
    cache = Cache(SLAB, SLAB)
    waits = []
    for _ in range(5):
        cache.want(name_model("a"), 100, reload=True)
        waits.append(cache.failed(name_model("a"), StoreUnavailable("timed out"), 100).until - 100)
    assert waits == [1, 2, 2, 2, 2]


def test_a_reload_ignores_a_remembered_failure() -> None:
    """An operator who asks again gets a new attempt at once; a plain request does not."""
    cache = Cache(SLAB, SLAB)
    cache.want(name_model("a"), 0)
    failure = cache.failed(name_model("a"), BROKEN, 0)
    assert cache.want(name_model("a"), 0.5) is failure
    assert isinstance(cache.want(name_model("a"), 0.5, reload=True), Load)


def test_failures_are_remembered_in_bounded_bytes() -> None:
    """Long made-up names and messages push out the oldest, and repeating one counts it once."""
    cache = Cache(SLAB, SLAB)
    for i in range(2000):
        long = name_model(f"{i:04}" + "x" * 1000)
        for _ in range(2):
            cache.want(long, 0.0, reload=True)
            cache.failed(long, ModelNotFound("y" * 2000), 0.0)
    kept = [model for model, _ in cache.failures()]
    assert 4 * 3004 * len(kept) <= MAX_FAILURE_BYTES
    assert (len(kept) > 300, kept[-1][:4]) == (True, "1999")


def test_failures_are_remembered_in_bounded_number() -> None:
    """A scan of random names cannot fill the memory: the oldest failures are forgotten."""
    cache = Cache(SLAB, SLAB)
    for i in range(10_005):
        cache.want(name_model(f"m{i}"), 0)
        cache.failed(name_model(f"m{i}"), BROKEN, 0)
    assert len(list(cache.failures())) == 10_000
    assert isinstance(cache.want(name_model("m4"), 0), Load)
    assert isinstance(cache.want(name_model("m5"), 0), FailedLoad)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_two_families_that_trade_memory_a_thousand_times_do_not_grow() -> None:
    """Slabs go to and fro without a leak: never above the budget, and all free, with no bank left, in the end."""
    worker = InstantWorker(slabs=4, extra=300)
    for i in range(1000):
        kind = i // 10 % 2
        worker.load(f"m{i % 40}", (250, 490)[kind], "fg"[kind], version=str(i))
        worker.use(f"m{i % 40}")
        assert worker.cache.used_bytes <= worker.cache.budget_bytes
    for slot in list(worker.cache):
        assert worker.cache.unload(slot.model) is slot
        assert worker.cache.retired(slot)
    assert worker.cache.used_bytes == 0
    assert sorted(worker.cache._room._free_slabs) == [0, 1, 2, 3]
    assert worker.cache._room.banks == {}


def test_a_family_with_another_row_size_is_a_mistake_of_ours() -> None:
    """Rows of one family share slabs, so one size per family is an invariant, said before memory is harmed."""
    worker = InstantWorker(slabs=2)
    worker.fill("a", 300, "f")
    worker.cache.want(name_model("b"), 0)
    with pytest.raises(AssertionError, match="family f has rows of 300 bytes, not of 200"):
        worker.place("b", 200, "f")


def test_reprs_say_the_state() -> None:
    """The one-line pictures an operator sees in logs and pings."""
    worker = InstantWorker(slabs=4)
    worker.load("a", 300, "f")
    slot = worker.hold("a")
    assert repr(worker.cache) == "<Cache 1 models, 0 loads, 0 pins, 0.0 of 0.0 MB>"
    assert repr(slot) == "<a@1 ready 1 leases>"
    worker.cache.unload(name_model("a"))
    assert repr(slot) == "<a@1 retiring 1 leases condemned>"


# --- the machine -----------------------------------------------------------------------------------------------------

ROWS = {"f": 250, "g": 490, "h": 333, "i": 1000}
MODELS = strategies.sampled_from([name_model(f"m{i}") for i in range(14)])
PLACES = strategies.one_of(
    strategies.sampled_from(list(ROWS.items())),
    strategies.tuples(strategies.none(), strategies.integers(1, 2500)),
)
PICK = strategies.integers(0, 1000)


def settle(cache: Cache, dying: list[Slot], model: ModelName, version: str, place: tuple[str | None, int]) -> Placement:
    """Ask for room until the answer is final, victims leaving and rows moving meanwhile, and nothing else changing."""
    family, charge = place
    for _ in range(200):
        for slot in dying:
            cache.retired(slot)
        answer = cache.place(model, version, charge, 0, family)
        if isinstance(answer, Evict):
            dying = list(answer.victims)
        elif isinstance(answer, Moves):
            for slot, offset in answer.moves:
                cache.moved(slot, offset)
        else:
            return answer
    raise AssertionError(f"no end after 200 answers: {answer}")


class CacheMachine(RuleBasedStateMachine):
    """A worker at random. `memory` has what lies at each row's offset; `dying` are slots whose `retired` is still to
    come: at once where the device is the host, later as on a GPU. A slot revived and evicted again is in there twice.
    """

    policy = "lru"

    @initialize(late=strategies.booleans(), slabs=strategies.integers(1, 5), extra=strategies.sampled_from([0, 300]))
    def start(self, late: bool, slabs: int, extra: int) -> None:
        """An empty cache."""
        self.late = late
        self.cache = Cache(slabs * SLAB + extra, SLAB, moves_per_call=2, policy=make_policy(self.policy))
        self.memory: dict[int, tuple[ModelName, str]] = {}
        self.live: list[Slot] = []
        self.held: list[Slot] = []
        self.dying: list[Slot] = []
        self.built: dict[ModelName, tuple[str, tuple[str | None, int]]] = {}
        self.loading: dict[ModelName, Slot] = {}
        self.pins: set[ModelName] = set()
        self.failed: dict[ModelName, FailedLoad] = {}
        self.now = 0.0
        self.versions = 0

    # --- requests

    @rule(model=MODELS, place=PLACES)
    def request(self, model: ModelName, place: tuple[str | None, int]) -> None:
        """A leased slot has its model's numbers and is not condemned; an absent model is loaded by one asker only."""
        slot = self.cache.lease(model, self.now)
        if slot is not None:
            assert slot.state is State.READY
            assert not slot.condemned
            assert slot.model == model
            self.held.append(slot)
            return
        wanted = self.cache.want(model, self.now)
        if wanted is None:
            assert model in self.built
        elif isinstance(wanted, FailedLoad):
            assert wanted is self.failed[model]
            assert self.now < wanted.until
        else:
            self._start(model, place)

    @rule(model=MODELS, place=PLACES)
    def reload(self, model: ModelName, place: tuple[str | None, int]) -> None:
        """A reload starts unless a load is running, whatever has failed before."""
        wanted = self.cache.want(model, self.now, reload=True)
        assert (wanted is None) == (model in self.built)
        if wanted is not None:
            self._start(model, place)

    def _start(self, model: ModelName, place: tuple[str | None, int]) -> None:
        assert model not in self.built
        self.versions += 1
        self.built[model] = (str(self.versions), place)

    @rule(model=MODELS, place=PLACES)
    def foresee(self, model: ModelName, place: tuple[str | None, int]) -> None:
        """A load that nobody asked for is placed at once or is over; whoever goes for it can go."""
        if model in self.cache or not isinstance(self.cache.want(model, self.now, speculative=True), Load):
            return
        self._start(model, place)
        version, (family, charge) = self.built[model]
        for _ in range(100):
            answer = self.cache.place(model, version, charge, self.now, family)
            if isinstance(answer, Evict):
                self._evicted(answer)
            elif isinstance(answer, Moves):
                self._moved(answer)
            else:
                break
        if isinstance(answer, Placed):
            self._placed(answer.slot)
            self._finish(model, arrives=True)
        else:
            assert not isinstance(answer, Wait) or self.dying
            del self.built[model]
            self.cache.dismiss(model)

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        """The last lease of a condemned slot says so, no other does."""
        slot = self.held.pop(pick % len(self.held))
        last = self.cache.release(slot)
        assert last == (slot.condemned and slot not in self.held)
        if last:
            self._dies(slot)

    # --- loads

    @precondition(lambda self: self.built.keys() - self.loading.keys())
    @rule(pick=PICK)
    def place(self, pick: int) -> None:
        """One answer for a load in flight."""
        models = sorted(self.built.keys() - self.loading.keys())
        self._place(models[pick % len(models)])

    @rule(models=strategies.lists(MODELS, max_size=6, unique=True), place=PLACES)
    def load_now(self, models: list[ModelName], place: tuple[str | None, int]) -> None:
        """Loads that nothing interrupts, so that memory is full most of the time."""
        for model in models:
            self.reload(model, place)
            while model not in self.loading and self._place(model) in (Placed, Evict, Moves):
                pass
            if model in self.loading:
                self._finish(model, arrives=True)

    def _place(self, model: ModelName) -> type[Placement]:
        """Whatever the answer, it is honest: see the checks."""
        version, (family, charge) = self.built[model]
        answer = self.cache.place(model, version, charge, self.now, family)
        if isinstance(answer, Placed):
            self._placed(answer.slot)
        elif isinstance(answer, Evict):
            self._evicted(answer)
            self._check_succeeds(model)
        elif isinstance(answer, Moves):
            self._moved(answer)
            self._check_succeeds(model)
        elif isinstance(answer, Refuse):
            self._check_after_all_that_may_go_went(model, Refuse)
            del self.built[model]
            self.failed[model] = self.cache.failed(model, BROKEN, self.now)
        else:
            assert self.held or self.dying or self.loading, "it waits for nothing"
            # A load whose victims are still leaving waits for them, though pins may have filled the budget meanwhile.
            self._check_after_all_that_may_go_went(model, Placed | Refuse if self.dying else Placed)
        return type(answer)

    def _placed(self, slot: Slot) -> None:
        """New room overlaps nobody's; the numbers arrive there."""
        assert slot.state is State.LOADING
        self.loading[slot.model] = slot
        self.live.append(slot)
        if slot.family is not None:
            assert slot.offset not in self.memory
            self.memory[slot.offset] = (slot.model, slot.version)

    def _evicted(self, answer: Evict) -> None:
        assert answer.victims
        for slot in answer.victims:
            assert slot.leases == 0
            assert not slot.condemned
            assert slot.model not in self.pins
            assert slot.state is State.RETIRING
            self._dies(slot)

    def _moved(self, answer: Moves) -> None:
        assert 0 < len(answer.moves) <= 2
        for slot, offset in answer.moves:
            assert slot.state is State.READY
            assert offset not in self.memory
            self.memory[offset] = self.memory.pop(slot.offset)
            self.cache.moved(slot, offset)
            assert slot.offset == offset

    def _check_succeeds(self, model: ModelName) -> None:
        """Nobody leaves or moves for nothing: if nothing else changes, the load gets its room."""
        cache, dying = copy.deepcopy((self.cache, self.dying))
        assert isinstance(settle(cache, dying, model, *self.built[model]), Placed)

    def _check_after_all_that_may_go_went(self, model: ModelName, expected: type[Placement] | UnionType) -> None:
        """What an answer claims of the future: with all leases ended, other loads gone and only pins left, it holds."""
        cache, dying, held, loading = copy.deepcopy((self.cache, self.dying, self.held, self.loading))
        for slot in held:
            cache.release(slot)
        for slot in loading.values():
            cache.abandon(slot)
        going = [slot for slot in cache if slot.model not in self.pins]
        for slot in going:
            cache.unload(slot.model)
        answer = settle(cache, dying + held + going, model, *self.built[model])
        assert isinstance(answer, expected)

    @precondition(lambda self: self.loading)
    @rule(pick=PICK, arrives=strategies.booleans())
    def finish(self, pick: int, arrives: bool) -> None:
        """The numbers are there and serve from now on, or never arrive."""
        self._finish(sorted(self.loading)[pick % len(self.loading)], arrives=arrives)

    def _finish(self, model: ModelName, *, arrives: bool) -> None:
        """The version before leaves when it can."""
        slot = self.loading.pop(model)
        del self.built[model]
        if not arrives:
            self.cache.abandon(slot)
            self._gone(slot)
            self.failed[model] = self.cache.failed(model, BROKEN, self.now)
            return
        before = self.cache.get(model)
        old = self.cache.ready(slot, self.now)
        assert self.cache.get(model) is slot
        assert model not in dict(self.cache.failures())
        assert old is (before if before is not None and not before.leases else None)
        if old is not None:
            self._dies(old)

    @precondition(lambda self: self.built.keys() - self.loading.keys())
    @rule(pick=PICK, same=strategies.booleans())
    def end_without_room(self, pick: int, same: bool) -> None:
        """The archive was broken, or a reload found the version that serves."""
        models = sorted(self.built.keys() - self.loading.keys())
        model = models[pick % len(models)]
        serving = self.cache.get(model)
        if same and serving is not None:
            assert self.cache.unchanged(model, serving.version) is serving
        else:
            assert self.cache.unchanged(model, "another") is None
            self.failed[model] = self.cache.failed(model, BROKEN, self.now)
        del self.built[model]

    # --- leaving, pins, time

    @rule(model=MODELS)
    def unload(self, model: ModelName) -> None:
        """The model is not served any more; its room is free once no lease is left."""
        before = self.cache.get(model)
        slot = self.cache.unload(model)
        assert slot is before
        assert model not in self.cache
        if slot is not None and slot.leases == 0:
            self._dies(slot)

    def _dies(self, slot: Slot) -> None:
        self.dying.append(slot)
        if not self.late:
            self.retire(0)

    @precondition(lambda self: self.dying)
    @rule(pick=PICK)
    def retire(self, pick: int) -> None:
        """Room is free exactly when nobody revived the slot, and only once."""
        slot = self.dying.pop(pick % len(self.dying))
        expected = slot.state is State.RETIRING and slot not in self.held
        assert self.cache.retired(slot) == expected
        if expected:
            self._gone(slot)

    def _gone(self, slot: Slot) -> None:
        assert slot.state is State.EMPTY
        self.live.remove(slot)
        if slot.family is not None:
            del self.memory[slot.offset]

    @rule(model=MODELS)
    def pin(self, model: ModelName) -> None:
        """From now on it is nobody's victim."""
        self.pins.add(model)
        self.cache.pin(model)

    @rule(model=MODELS)
    def unpin(self, model: ModelName) -> None:
        """It may go again."""
        self.pins.discard(model)
        self.cache.unpin(model)

    @rule(seconds=strategies.floats(0.1, 40))
    def later(self, seconds: float) -> None:
        """Back-offs end."""
        self.now += seconds

    # --- what is always true

    @invariant()
    def numbers_are_where_slots_say(self) -> None:
        """Every live row has its own model's numbers: nobody wrote over it, no move lost it."""
        rows = [slot for slot in self.live if slot.family is not None]
        assert {slot.offset: (slot.model, slot.version) for slot in rows} == self.memory

    @invariant()
    def rows_lie_apart_in_slabs_of_their_family(self) -> None:
        """No two rows overlap, none crosses a slab's end, no slab has two families."""
        owner: dict[int, str] = {}
        end = 0
        for slot in sorted((slot for slot in self.live if slot.family is not None), key=lambda slot: slot.offset):
            assert slot.family is not None
            assert slot.offset >= end
            end = slot.offset + slot.charge
            assert slot.offset // SLAB == (end - 1) // SLAB
            assert owner.setdefault(slot.offset // SLAB, slot.family) == slot.family
            assert end <= self.cache.budget_bytes

    @invariant()
    def bytes_add_up(self) -> None:
        """What is charged is what is held, and within the budget."""
        slabs = {slot.offset // SLAB for slot in self.live if slot.family is not None}
        singles = sum(slot.charge for slot in self.live if slot.family is None)
        assert self.cache.used_bytes == len(slabs) * SLAB + singles
        assert self.cache.used_bytes <= self.cache.budget_bytes

    @invariant()
    def tables_agree(self) -> None:
        """One serving slot a model; leases, loads, pins as counted; the policy ranks each that is not pinned, once."""
        serving = [slot for slot in self.live if not slot.condemned and slot.state is not State.LOADING]
        assert sorted(self.cache, key=lambda slot: slot.model) == sorted(serving, key=lambda slot: slot.model)
        assert all(slot.leases == self.held.count(slot) for slot in self.live)
        assert set(self.cache.loads) == self.built.keys()
        assert self.cache.pins == self.pins
        ranked = [model for family in (None, *ROWS) for model in self.cache._policy.victims(family)]
        assert sorted(ranked) == sorted(slot.model for slot in serving if slot.model not in self.pins)

    def teardown(self) -> None:
        """After everything has ended nothing is left: no byte, no slab, no bank."""
        if not hasattr(self, "cache"):
            return
        for model in list(self.loading):
            self.cache.abandon(self.loading[model])
        for model in self.built:
            self.cache.failed(model, BROKEN, self.now)
        for slot in list(self.cache):
            self.cache.unload(slot.model)
        for slot in self.held:
            self.cache.release(slot)
        for slot in self.live:
            self.cache.retired(slot)
        assert (self.cache.used_bytes, len(self.cache), list(self.cache.loads)) == (0, 0, [])
        assert sorted(self.cache._room._free_slabs) == list(range(self.cache.budget_bytes // SLAB))
        assert self.cache._room.banks == {}
        assert {slot.state for slot in self.live} <= {State.EMPTY}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_machine_finds_no_fault(policy: str) -> None:
    """Whoever says who goes first: leases, pins, revival, slabs, moves and singles keep their promises."""
    machine = type("Machine", (CacheMachine,), {"policy": policy})
    limits = settings(max_examples=60 if policy == "lru" else 30, stateful_step_count=60, deadline=None)
    run_state_machine_as_test(machine, settings=limits)


def test_a_row_that_lies_there_already_is_adopted_where_its_place_is_empty() -> None:
    """Adopted rows hold their slabs and are evicted as others; a place that is taken, or is no place, is refused."""
    cache = Cache(4 * 100, 100)
    first = cache.adopt(ModelName("a"), "v1", "f", 40, 140, 1.0)
    assert first is not None
    assert (first.offset, first.state, cache.used_bytes) == (140, State.READY, 100)
    refused = [
        cache.adopt(ModelName("b"), "v1", "f", 40, 140, 1.0),  # a's place
        cache.adopt(ModelName("a"), "v1", "f", 40, 100, 1.0),  # a is there
        cache.adopt(ModelName("b"), "v1", "g", 40, 100, 1.0),  # another family's slab
        cache.adopt(ModelName("b"), "v1", "f", 50, 200, 1.0),  # rows of another size
        cache.adopt(ModelName("b"), "v1", "f", 40, 110, 1.0),  # between two rows
        cache.adopt(ModelName("b"), "v1", "f", 40, 180, 1.0),  # beyond the slab's last row
        cache.adopt(ModelName("b"), "v1", "f", 40, 400, 1.0),  # outside of the pool
        cache.adopt(ModelName("b"), "v1", "f", 40, -100, 1.0),
        cache.adopt(ModelName("b"), "v1", "g", 0, 200, 1.0),
        cache.adopt(ModelName("b"), "v1", "g", 101, 200, 1.0),
    ]
    assert refused == [None] * len(refused)
    assert cache.adopt(ModelName("b"), "v1", "f", 40, 100, 2.0) is not None
    cache.unload(ModelName("a"))
    assert cache.retired(first)
    assert (len(cache), cache.used_bytes) == (1, 100)
