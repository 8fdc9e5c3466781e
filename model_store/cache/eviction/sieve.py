"""SIEVE: a queue in the order of arrival, one bit each, and a hand that spares whoever was used since it last came by.

Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from model_store.names import ModelName


@dataclass(slots=True)
class _Queue:
    """Oldest first: those that the hand has passed, then those ahead of it. The values are the bits."""

    passed: OrderedDict[ModelName, bool] = field(default_factory=OrderedDict)
    ahead: OrderedDict[ModelName, bool] = field(default_factory=OrderedDict)

    def part(self, model: ModelName) -> OrderedDict[ModelName, bool]:
        return self.ahead if model in self.ahead else self.passed

    def advance(self) -> None:
        """The hand to the next one that was not used: amortised, since every bit it clears has been a hit."""
        while self.ahead or self.passed:
            if not self.ahead:
                self.ahead, self.passed = self.passed, self.ahead
            model = next(iter(self.ahead))
            if not self.ahead[model]:
                return
            del self.ahead[model]
            self.passed[model] = False


class Sieve:
    """A queue for each group. Between groups recency decides, as in LRU."""

    def __init__(self) -> None:
        self._clock = 0
        self._queues: dict[str | None, _Queue] = {}
        self._here: dict[ModelName, tuple[str | None, int]] = {}  # its group, and when it was used last

    def __repr__(self) -> str:
        return f"<Sieve of {len(self._here)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """At the queue's end, not used."""
        self._clock += 1
        self._here[model] = group, self._clock - len(self._here)  # between groups: asked about once a round
        self._queues.setdefault(group, _Queue()).ahead[model] = False

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """Used: the hand will spare it once."""
        self._clock += 1
        group = self._here[model][0]
        self._here[model] = group, self._clock
        self._queues[group].part(model)[model] = True

    def foresee(self, model: ModelName, now: float) -> None:
        """As good as asked."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forgotten."""
        if model in self._here:
            group, _ = self._here.pop(model)
            queue = self._queues[group]
            del queue.part(model)[model]
            if not (queue.ahead or queue.passed):
                del self._queues[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """From the hand on, once round: first those that were not used."""
        queue = self._queues.get(group)
        if queue is None:
            return
        queue.advance()
        for used in (False, True):
            for model, bit in chain(queue.ahead.items(), queue.passed.items()):
                if bit is used:
                    yield model

    def worth(self, model: ModelName) -> float:
        """The less the more others were used since."""
        return 1 / (self._clock + 1 - self._here[model][1]) if model in self._here else inf
