"""Chooses which forwards of a device have a captured graph. Pure.

A capture takes tens of milliseconds and a graph keeps memory, so they are for what runs often. Runs are counted by
family and bucket, and the counts halved every AGE_RUNS runs, so that they tell of late. While there is room a forward
needs EAGER_RUNS of them. Without room it takes the place of a graph that ran less than half as often, by EAGER_RUNS:
forwards that take turns, however many they are, differ less and never take each other's place.
"""

from collections.abc import Mapping

Key = tuple[str, int]  #: a family's key and a bucket, the padded rows of a forward

MAX_GRAPHS = 64
MAX_GRAPH_BYTES = 256 * 1024 * 1024  #: of scratch and temporaries that all graphs keep, unless one alone has more
EAGER_RUNS = 3
AGE_RUNS = 1024


class RecentRuns:
    """How often each forward has run of late. At most about 1.5 AGE_RUNS forwards are remembered."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}
        self._since_aged = 0

    def __repr__(self) -> str:
        """For example `<RecentRuns of 12 forwards>`."""
        return f"<RecentRuns of {len(self._counts)} forwards>"

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, key: Key) -> int:
        return self._counts.get(key, 0)

    def record(self, key: Key) -> None:
        """Count a run."""
        self._counts[key] = self[key] + 1
        self._since_aged += 1
        if self._since_aged >= AGE_RUNS:
            self._since_aged = 0
            self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}

    def forget(self, key: Key) -> None:
        """Count from nothing again."""
        self._counts.pop(key, None)


def choose_victims(key: Key, size: int, runs: RecentRuns, held: Mapping[Key, int]) -> list[Key] | None:
    """The graphs that make way for one of `key` that keeps `size` bytes; None if it shall have none.

    `held`: the bytes of each graph, the least recently used first.
    """
    if runs[key] < EAGER_RUNS:
        return None
    victims, count, used = list[Key](), len(held), sum(held.values())
    for victim in sorted(held, key=runs.__getitem__):
        if count < MAX_GRAPHS and used + size <= MAX_GRAPH_BYTES:
            break
        if runs[key] < 2 * runs[victim] + EAGER_RUNS:
            return None
        victims.append(victim)
        count, used = count - 1, used - held[victim]
    return victims
