"""Least recently used. Its worst case is a scan in fixed order over a little more than fits: nothing is ever hit."""

from collections import OrderedDict
from collections.abc import Iterator
from math import inf

from model_store.names import ModelName


class Lru:
    """Recency is counted in uses of any model."""

    def __init__(self) -> None:
        self._clock = 0
        self._used: dict[str | None, OrderedDict[ModelName, int]] = {}
        self._group: dict[ModelName, str | None] = {}

    def __repr__(self) -> str:
        return f"<Lru of {len(self._group)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """The most recently used of all."""
        self._clock += 1
        self._group[model] = group
        self._used.setdefault(group, OrderedDict())[model] = self._clock

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """The most recently used of all."""
        self._clock += 1
        order = self._used[self._group[model]]
        order[model] = self._clock
        order.move_to_end(model)

    def foresee(self, model: ModelName, now: float) -> None:
        """As good as asked."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forgotten."""
        if model in self._group:
            group = self._group.pop(model)
            del self._used[group][model]
            if not self._used[group]:
                del self._used[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """In the order of last use."""
        return iter(self._used.get(group, ()))

    def worth(self, model: ModelName) -> float:
        """The less the more others were used since."""
        if model not in self._group:
            return inf
        return 1 / (self._clock + 1 - self._used[self._group[model]][model])
