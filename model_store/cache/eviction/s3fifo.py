"""S3-FIFO: a newcomer enters a small queue; it moves to the main queue if it is used twice there or comes back soon.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from model_store.names import ModelName

SMALL = 10  #: the small queue holds one model in so many
MOST_USES = 3
MAX_GHOSTS = 10_000


@dataclass(slots=True)
class _Queues:
    """Both queues, oldest first. The values count uses since the model entered, or since it was last spared."""

    small: OrderedDict[ModelName, int] = field(default_factory=OrderedDict)
    main: OrderedDict[ModelName, int] = field(default_factory=OrderedDict)

    def part(self, model: ModelName) -> OrderedDict[ModelName, int]:
        return self.small if model in self.small else self.main

    def turn(self) -> Iterator[OrderedDict[ModelName, int]]:
        """Both queues, first the one whose oldest member is the next victim.

        Members with enough uses are moved on the way; amortised over these uses that costs O(1).
        """
        while True:
            size = len(self.small) + len(self.main)
            if self.small and (len(self.small) >= max(1, size // SMALL) or not self.main):
                model, uses = next(iter(self.small.items()))
                if uses <= 1:
                    return iter((self.small, self.main))
                del self.small[model]
                self.main[model] = 0
            else:
                model, uses = next(iter(self.main.items()))
                if not uses:
                    return iter((self.main, self.small))
                self.main[model] = uses - 1
                self.main.move_to_end(model)


class S3Fifo:
    """Two queues for each group, and one record of models that left. Groups are compared by recency, as in LRU."""

    def __init__(self) -> None:
        self._clock = 0
        self._queues: dict[str | None, _Queues] = {}
        self._here: dict[ModelName, tuple[str | None, int]] = {}  # group, clock of the last use
        self._ghosts: OrderedDict[ModelName, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<S3Fifo of {len(self._here)}, {len(self._ghosts)} ghosts>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """Enter the small queue, or the main one if the model left the small one recently."""
        self._clock += 1
        self._here[model] = group, self._clock - len(self._here)  # for `worth`: as if used once a round
        queues = self._queues.setdefault(group, _Queues())
        known = model in self._ghosts
        self._ghosts.pop(model, None)
        (queues.main if known else queues.small)[model] = 0

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """Count a use."""
        self._clock += 1
        group = self._here[model][0]
        self._here[model] = group, self._clock
        part = self._queues[group].part(model)
        part[model] = min(part[model] + 1, MOST_USES)

    def foresee(self, model: ModelName, now: float) -> None:
        """Count an expected request as a request."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forget the model; one that leaves the small queue is recorded, up to as many as there are members."""
        if model not in self._here:
            return
        group, _ = self._here.pop(model)
        queues = self._queues[group]
        if model in queues.small:
            self._ghosts[model] = None
        del queues.part(model)[model]
        if not (queues.small or queues.main):
            del self._queues[group]
        while len(self._ghosts) > min(MAX_GHOSTS, len(self._here) + 1):
            self._ghosts.popitem(last=False)

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Oldest first, of the queue whose turn it is, then of the other."""
        if group in self._queues:
            for part in self._queues[group].turn():
                yield from part

    def worth(self, model: ModelName) -> float:
        """The reciprocal of the number of uses since the model's last one."""
        return 1 / (self._clock + 1 - self._here[model][1]) if model in self._here else inf
