"""SIEVE: a queue in the order of arrival, one bit a model, and a hand that spares models used since its last pass.

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
    """Members that the hand has passed and those ahead of it, oldest first. The values are the bits."""

    passed: OrderedDict[ModelName, bool] = field(default_factory=OrderedDict)
    ahead: OrderedDict[ModelName, bool] = field(default_factory=OrderedDict)

    def part(self, model: ModelName) -> OrderedDict[ModelName, bool]:
        return self.ahead if model in self.ahead else self.passed

    def advance(self) -> None:
        """Move the hand to the next unused model. Amortised O(1): each bit that it clears was set by a hit."""
        while self.ahead or self.passed:
            if not self.ahead:
                self.ahead, self.passed = self.passed, self.ahead
            model = next(iter(self.ahead))
            if not self.ahead[model]:
                return
            del self.ahead[model]
            self.passed[model] = False


class Sieve:
    """A queue for each group. Groups are compared by recency, as in LRU."""

    def __init__(self) -> None:
        self._clock = 0
        self._queues: dict[str | None, _Queue] = {}
        self._here: dict[ModelName, tuple[str | None, int]] = {}  # group, clock of the last use

    def __repr__(self) -> str:
        return f"<Sieve of {len(self._here)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """Enter at the queue's end, unused."""
        self._clock += 1
        self._here[model] = group, self._clock - len(self._here)  # for `worth`: as if used once a round
        self._queues.setdefault(group, _Queue()).ahead[model] = False

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """Mark the model as used: the hand spares it once."""
        self._clock += 1
        group = self._here[model][0]
        self._here[model] = group, self._clock
        self._queues[group].part(model)[model] = True

    def foresee(self, model: ModelName, now: float) -> None:
        """Count an expected request as a request."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forget the model."""
        if model in self._here:
            group, _ = self._here.pop(model)
            queue = self._queues[group]
            del queue.part(model)[model]
            if not (queue.ahead or queue.passed):
                del self._queues[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """From the hand on, once around the queue: first unused models, then the others."""
        queue = self._queues.get(group)
        if queue is None:
            return
        queue.advance()
        for used in (False, True):
            for model, bit in chain(queue.ahead.items(), queue.passed.items()):
                if bit is used:
                    yield model

    def worth(self, model: ModelName) -> float:
        """The reciprocal of the number of uses since the model's last one."""
        return 1 / (self._clock + 1 - self._here[model][1]) if model in self._here else inf
