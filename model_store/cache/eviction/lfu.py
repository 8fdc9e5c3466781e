"""Least frequently used, newest first: where all that is here was hit before, each newcomer is a guest in one row.

That keeps a stable set under a tick in fixed order. Counts halve after a while, so that old fame fades.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from model_store.names import ModelName

MOST = 15  #: hits that are counted
AGE = 10  #: hits a member, after which all counts halve


def _levels() -> list[OrderedDict[ModelName, None]]:
    return [OrderedDict() for _ in range(MOST + 1)]


@dataclass(slots=True)
class _Counts:
    """The members by hits, each level in the order of arrival there; `hits` since counts last halved."""

    level: dict[ModelName, int] = field(default_factory=dict)
    levels: list[OrderedDict[ModelName, None]] = field(default_factory=_levels)
    hits: int = 0

    def put(self, model: ModelName, level: int) -> None:
        self.level[model] = level
        self.levels[level][model] = None

    def drop(self, model: ModelName) -> int:
        level = self.level.pop(model)
        del self.levels[level][model]
        return level

    def halve(self) -> None:
        before, self.levels, self.hits = self.levels, _levels(), 0
        for level, models in enumerate(before):
            for model in models:
                self.put(model, level // 2)


class Lfu:
    """Counts for each group, forgotten when a model leaves."""

    def __init__(self) -> None:
        self._counts: dict[str | None, _Counts] = {}
        self._group: dict[ModelName, str | None] = {}

    def __repr__(self) -> str:
        return f"<Lfu of {len(self._group)}>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:  # noqa: ARG002 -- for Due
        """No hit yet: the next to go, unless it is hit before."""
        self._group[model] = group
        self._counts.setdefault(group, _Counts()).put(model, 0)

    def hit(self, model: ModelName, now: float) -> None:  # noqa: ARG002 -- for Due
        """One more."""
        counts = self._counts[self._group[model]]
        counts.put(model, min(counts.drop(model) + 1, MOST))
        counts.hits += 1
        if counts.hits > AGE * len(counts.level):
            counts.halve()

    def foresee(self, model: ModelName, now: float) -> None:
        """As good as asked."""
        self.hit(model, now)

    def leave(self, model: ModelName) -> None:
        """Forgotten."""
        if model in self._group:
            group = self._group.pop(model)
            self._counts[group].drop(model)
            if not self._counts[group].level:
                del self._counts[group]

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Fewest hits first, the newest of them first."""
        if group in self._counts:
            for models in self._counts[group].levels:
                yield from reversed(models)

    def worth(self, model: ModelName) -> float:
        """Its hits, and the request that brought it."""
        return 1 + self._counts[self._group[model]].level[model] if model in self._group else inf
