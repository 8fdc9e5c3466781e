"""Evicts the least recently used model.

Its worst case is a scan in fixed order over slightly more models than fit: then no request is a hit.
"""

from collections import OrderedDict
from collections.abc import Iterator
from math import inf

from model_store.names import ModelName


class Lru:
    """One order of use for each group. Recency is counted in uses of any model."""

    def __init__(self) -> None:
        self._clock = 0
        self._used: dict[str | None, OrderedDict[ModelName, int]] = {}
        self._group: dict[ModelName, str | None] = {}

    def __repr__(self) -> str:
        return f"<Lru of {len(self._group)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """Rank the model as the most recently used."""
        self._clock += 1
        self._group[model] = group
        self._used.setdefault(group, OrderedDict())[model] = self._clock

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """Rank the model as the most recently used."""
        self._clock += 1
        order = self._used[self._group[model]]
        order[model] = self._clock
        order.move_to_end(model)

    def foresee(self, model: ModelName, now: float) -> None:
        """Count an expected request as a request."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forget the model."""
        if model in self._group:
            group = self._group.pop(model)
            del self._used[group][model]
            if not self._used[group]:
                del self._used[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Least recently used first."""
        return iter(self._used.get(group, ()))

    def worth(self, model: ModelName) -> float:
        """The reciprocal of the number of uses since the model's last one."""
        if model not in self._group:
            return inf
        return 1 / (self._clock + 1 - self._used[self._group[model]][model])
