"""Which forwards have graphs: what runs most, and never in turns."""

import random
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import pytest

from server.worker.engine.graph_choice import (
    AGE_RUNS,
    EAGER_RUNS,
    MAX_GRAPH_BYTES,
    MAX_GRAPHS,
    Key,
    RecentRuns,
    choose_victims,
)

MIB = 2**20


class Player:
    """Captures whatever is chosen, at once: the worst that idle time can do."""

    def __init__(self, size: int = 0) -> None:
        self.runs, self.held, self.captures, self.size = RecentRuns(), dict[Key, int](), 0, size

    def run(self, key: Key) -> None:
        """Run, and capture if it may be."""
        self.runs.record(key)
        if key in self.held:
            self.held[key] = self.held.pop(key)
            return
        victims = choose_victims(key, self.size, self.runs, self.held)
        if victims is not None:
            self.captures += 1
            self.held[key] = self.size
            for victim in victims:
                del self.held[victim]


def list_keys(count: int) -> list[Key]:
    """Forwards of so many families."""
    return [(f"family-{i}", 1) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("forwards", [65, 70, 100, 128, 200, 300, 500, 600, 1000, 1100, 3000])
@pytest.mark.parametrize("size", [0, MAX_GRAPH_BYTES // 20])
def test_forwards_in_turns_never_take_each_others_place(forwards: int, size: int) -> None:
    """However many there are, and whether the number or the bytes of graphs end first."""
    player = Player(size)
    for key in islice(cycle(list_keys(forwards)), 20 * AGE_RUNS):
        player.run(key)
    assert player.captures == len(player.held) <= MAX_GRAPHS
    assert len(player.runs) <= 2 * AGE_RUNS


def draw_popular(chance: random.Random, count: int, shift: int) -> Iterator[Key]:
    """Forwards by Zipf's law; `shift` says who is popular."""
    ranks = [1 / (1 + rank) for rank in range(count)]
    while True:
        for rank in chance.choices(range(count), ranks, k=100):
            yield f"family-{(rank + shift) % count}", 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_popular_ones_have_graphs_and_others_follow_when_they_are(seed: int) -> None:
    """Nine runs of ten of the most popular replay; after a change of taste again, and captures stay few."""
    chance, player = random.Random(seed), Player()
    for shift in (0, 150):
        for key in islice(draw_popular(chance, 300, shift), 10 * AGE_RUNS):
            player.run(key)
        before = player.captures
        asked = list(islice(draw_popular(chance, 300, shift), 2 * AGE_RUNS))
        top = [key for key in asked if key in {(f"family-{(rank + shift) % 300}", 1) for rank in range(40)}]
        assert sum(key in player.held for key in top) > 0.9 * len(top)
        for key in asked:
            player.run(key)
        assert player.captures - before < 20


@pytest.mark.parametrize(
    ("ran", "chosen"),
    [(EAGER_RUNS - 1, None), (EAGER_RUNS + 8, None), (EAGER_RUNS + 9, None), (EAGER_RUNS + 10, [("old", 1)])],
)
def test_who_goes_ran_less_than_half_as_often(ran: int, chosen: list[Key] | None) -> None:
    """And by a margin; of those that ran least, the one that ran longest ago."""
    runs, held = RecentRuns(), {("often", 1): 0, ("old", 1): 0, ("new", 1): 0} | dict.fromkeys(list_keys(61), 0)
    for key in held:
        for _ in range(5 if key[0] in ("old", "new") else 9):
            runs.record(key)
    for _ in range(ran):
        runs.record(("wants", 1))
    assert choose_victims(("wants", 1), 0, runs, held) == chosen


@pytest.mark.parametrize(
    ("size", "chosen"),
    [(10 * MIB, []), (106 * MIB, []), (107 * MIB, [("a", 1)]), (300 * MIB, [("a", 1), ("b", 1)])],
)
def test_bytes_make_way_too(size: int, chosen: list[Key]) -> None:
    """As many as are needed; a graph that alone has more than all may have gets them all."""
    runs, held = RecentRuns(), {("a", 1): 100 * MIB, ("b", 1): 50 * MIB}
    for _ in range(10):
        runs.record(("wants", 1))
    assert choose_victims(("wants", 1), size, runs, held) == chosen


def test_counts_tell_of_late() -> None:
    """What ran once is forgotten at the next turn of the age, and what failed begins anew."""
    runs = RecentRuns()
    record: Callable[[Key], None] = runs.record
    for key in [("once", 1)] + [("often", 1)] * (AGE_RUNS - 1):
        record(key)
    assert (runs["once", 1], runs["often", 1], len(runs)) == (0, (AGE_RUNS - 1) // 2, 1)
    runs.forget(("often", 1))
    assert (runs["often", 1], repr(runs)) == (0, "<RecentRuns of 0 forwards>")
