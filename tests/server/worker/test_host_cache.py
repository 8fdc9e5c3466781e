"""The ring of the host memory tier, compared with a plain list of its expected contents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import build_family
from handlers.kinds import RowModel
from model_store.cache.slots import Slot, State
from model_store.names import ModelName
from server.worker.host_cache import HostCache

FAMILY = build_family("mlp", {"features": 1, "context_length": 4, "prediction_length": 1, "quantiles": 1})
BODY = RowModel(FAMILY, FamilyCodec(FAMILY))
CAPACITY = 100


def make_slot(model: str, floats: int, version: str = "v1") -> Slot:
    """A model that is about to leave a row of so many floats."""
    return Slot(ModelName(model), version, FAMILY.key, floats * 4, 0, State.RETIRING, 0.0)


def keep(shelf: HostCache, model: str, floats: int, mark: float = 0.0, validated_at: float = 0.0) -> bool:
    """Shelve a row of marks; whether there was a place."""
    numbers = shelf.keep(make_slot(model, floats), BODY, validated_at)
    if numbers is not None:
        assert len(numbers) == floats
        numbers.fill_(mark)
    return numbers is not None


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.sampled_from("abcdefgh"), st.integers(1, 60)),
        st.tuples(st.sampled_from(["take", "drop"]), st.sampled_from("abcdefgh"), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(actions=ACTIONS)
def test_whatever_is_there_is_whole_and_the_youngest_is_there(actions: list[tuple[str, str, int]]) -> None:
    """Rows of any sizes kept, taken and dropped: every row that can be taken has its own numbers, no two overlap, a
    held row is never overwritten, and the row kept last is there unless held rows left it no place.
    """
    shelf = HostCache(torch.zeros(CAPACITY), 60, clock=lambda: 1.0)
    marks: dict[str, float] = {}
    held: set[str] = set()
    for mark, (action, model, floats) in enumerate(actions, 1):
        if action == "keep":
            held.discard(model)
            marks[model] = mark
            assert keep(shelf, model, floats, mark) or held
        elif action == "take":
            if shelf.take(ModelName(model)) is not None:
                held.add(model)
        else:
            shelf.drop(ModelName(model))
            held.discard(model)
        assert all(ModelName(name) in shelf for name in held)
        kept = [shelf.take(ModelName(name)) for name in held]
        for built in kept:
            assert built is not None
            assert built.row is not None
            assert (built.row == marks[built.model]).all()
        for entry in shelf._kept.values():
            assert (entry.numbers == marks[entry.built.model]).all()
        assert shelf.used_bytes == sum(entry.numbers.nbytes for entry in shelf._kept.values()) <= CAPACITY * 4


def test_the_one_evicted_longest_ago_goes() -> None:
    """A full ring gives up its oldest rows, as many as the new one needs, and counts them."""
    shelf = HostCache(torch.zeros(CAPACITY), 60, clock=lambda: 0.0)
    for model in "abcd":
        keep(shelf, model, 25)
    assert keep(shelf, "e", 30)
    assert [name in shelf for name in map(ModelName, "abcde")] == [False, False, True, True, True]
    assert shelf.overwritten == 2
    assert repr(shelf) == "<HostCache 3 models, 0.0 of 0.0 MB>"


def test_a_scan_one_row_larger_than_device_and_shelf_is_the_limit() -> None:
    """Models that come back in the order in which they went all find their row, if the shelf has one row for each."""
    shelf = HostCache(torch.zeros(4 * 25), 60, clock=lambda: 0.0)
    for i in range(4):
        keep(shelf, f"m{i}", 25)
    for i in range(4, 40):
        assert shelf.take(ModelName(f"m{i - 4}")) is not None
        shelf.drop(ModelName(f"m{i - 4}"))
        assert keep(shelf, f"m{i}", 25)
    assert shelf.overwritten == 0


@pytest.mark.parametrize(("age", "fresh"), [(0, True), (59, True), (60, False), (-1, False)])
def test_a_copy_is_served_while_it_is_fresh(age: float, fresh: bool) -> None:
    """Within `revalidate_s` of its validation, and not before it (clocks are set back); `stale` serves it in any case,
    with the version and the body it had.
    """
    shelf = HostCache(torch.zeros(CAPACITY), 60, clock=lambda: 1000.0)
    keep(shelf, "a", 3, 7, validated_at=1000 - age)
    assert (shelf.take(ModelName("a")) is not None) is fresh
    built = shelf.take(ModelName("a"), stale=True)
    assert built is not None
    assert (built.version, built.tier, built.body, built.validated_at) == ("v1", "host", BODY, 1000 - age)
    assert built.row is not None
    assert built.row.tolist() == [7, 7, 7]


def test_no_memory_keeps_nothing() -> None:
    """A shelf of size 0 is no tier; a row larger than the shelf has no place there."""
    assert not keep(HostCache(torch.zeros(0), 60), "a", 1)
    assert not keep(HostCache(torch.zeros(CAPACITY), 60), "a", CAPACITY + 1)
