"""Evicts the least frequently used model, the newest of equals first.

If all other residents were hit before, newcomers replace each other in one row. So a stable set stays under a tick in
fixed order. Counts are halved regularly, so that past popularity fades.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from model_store.names import ModelName

MOST = 15  #: the highest count of hits
AGE = 10  #: hits per member after which all counts are halved


def _make_levels() -> list[OrderedDict[ModelName, None]]:
    return [OrderedDict() for _ in range(MOST + 1)]


@dataclass(slots=True)
class _Counts:
    """The members by their number of hits, in the order in which they reached it. `hits`: since the last halving."""

    level: dict[ModelName, int] = field(default_factory=dict)
    levels: list[OrderedDict[ModelName, None]] = field(default_factory=_make_levels)
    hits: int = 0

    def put(self, model: ModelName, level: int) -> None:
        self.level[model] = level
        self.levels[level][model] = None

    def drop(self, model: ModelName) -> int:
        level = self.level.pop(model)
        del self.levels[level][model]
        return level

    def halve(self) -> None:
        before, self.levels, self.hits = self.levels, _make_levels(), 0
        for level, models in enumerate(before):
            for model in models:
                self.put(model, level // 2)


class Lfu:
    """Counts of hits for each group. A model's count is forgotten when it leaves."""

    def __init__(self) -> None:
        self._counts: dict[str | None, _Counts] = {}
        self._group: dict[ModelName, str | None] = {}

    def __repr__(self) -> str:
        return f"<Lfu of {len(self._group)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """Start at zero hits: the next victim, unless it is hit before."""
        self._group[model] = group
        self._counts.setdefault(group, _Counts()).put(model, 0)

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """Count a hit."""
        counts = self._counts[self._group[model]]
        counts.put(model, min(counts.drop(model) + 1, MOST))
        counts.hits += 1
        if counts.hits > AGE * len(counts.level):
            counts.halve()

    def foresee(self, model: ModelName, now: float) -> None:
        """Count an expected request as a request."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forget the model."""
        if model in self._group:
            group = self._group.pop(model)
            self._counts[group].drop(model)
            if not self._counts[group].level:
                del self._counts[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Fewest hits first, the newest of equals first."""
        if group in self._counts:
            for models in self._counts[group].levels:
                yield from reversed(models)

    def worth(self, model: ModelName) -> float:
        """The model's hits, plus the request that loaded it."""
        return 1 + self._counts[self._group[model]].level[model] if model in self._group else inf
