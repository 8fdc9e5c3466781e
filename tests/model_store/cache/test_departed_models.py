"""The memory that a miss would have needed, beside a larger cache that is really run."""

import random

from hypothesis import given
from hypothesis import strategies as st

from model_store.cache.departed_models import MOST_BYTES, DepartedModels
from model_store.names import ModelName


class SimpleLru:
    """Models of one byte each in a cache of so many."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.models: dict[ModelName, None] = {}

    def ask(self, model: ModelName) -> tuple[bool, ModelName | None]:
        """Whether it was there, and which model left for it."""
        was_there = model in self.models
        self.models.pop(model, None)
        self.models[model] = None
        if len(self.models) <= self.room:
            return was_there, None
        oldest = next(iter(self.models))
        del self.models[oldest]
        return was_there, oldest


@given(seed=st.integers(0, 10_000), room=st.integers(1, 8), more=st.integers(1, 8), names=st.integers(2, 20))
def test_a_shortfall_is_never_too_low(seed: int, room: int, more: int, names: int) -> None:
    """Where it says that `more` bytes are enough, a cache with so much more has the model; it forgets no name."""
    drawn = random.Random(seed)
    small, large, departed = SimpleLru(room), SimpleLru(room + more), DepartedModels()
    for _ in range(200):
        model = ModelName(f"m{drawn.randrange(names)}")
        held_by_large, _ = large.ask(model)
        hit, left = small.ask(model)
        shortfall = None if hit else departed.find_shortfall(model)
        if shortfall is not None and shortfall <= more:
            assert held_by_large
        if left is not None:
            departed.note_evicted(left, 1)


def test_a_cycle_needs_what_is_missing_of_it() -> None:
    """Ten models in turn in room for six: each miss would have been a hit with four more, and none with three."""
    small, departed = SimpleLru(6), DepartedModels()
    found = set()
    for turn in range(50):
        model = ModelName(f"m{turn % 10}")
        hit, left = small.ask(model)
        shortfall = None if hit else departed.find_shortfall(model)
        if left is not None:
            departed.note_evicted(left, 1)
        if turn >= 20:
            found.add(shortfall)
    assert found == {4}


def test_names_are_bounded() -> None:
    """A million names that left take no more than the bound; the oldest are forgotten."""
    departed = DepartedModels()
    for i in range(60_000):
        departed.note_evicted(ModelName("n" * 900 + str(i)), 1)
    assert departed._left_at.used_bytes <= MOST_BYTES
    assert departed.find_shortfall(ModelName("n" * 900 + "0")) is None
    assert departed.find_shortfall(ModelName("n" * 900 + "59999")) == 1
