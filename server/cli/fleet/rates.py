"""What happened between two answers of `GET /fleet/overview`: rates, shares and quantiles. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FIRST_FAILURE = 400  #: the least status of a failure

Reading = Mapping[str, Any]  #: an answer of `GET /fleet/overview`


@dataclass(frozen=True)
class Buckets:
    """A histogram: `counts[i]` observations are at most `bounds[i]`, and the last count is all of them."""

    bounds: Sequence[float]
    counts: Sequence[float]
    sum: float

    @property
    def count(self) -> float:
        """Number of observations."""
        return self.counts[-1] if self.counts else 0.0

    @property
    def mean(self) -> float:
        """Mean of the observations, NaN without any."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, level: float) -> float:
        """The value below which the share `level` lies, by straight lines within buckets; NaN without observations.

        Observations above the last bound are taken to lie on it, as Prometheus' `histogram_quantile` does.
        """
        if not self.count:
            return math.nan
        wanted = level * self.count
        edges = pairwise([(0.0, 0.0), *zip(self.bounds, self.counts[:-1], strict=True)])
        for (low, before), (high, until) in edges:
            if until >= wanted and until > before:
                return low + (high - low) * (wanted - before) / (until - before)
        return self.bounds[-1]


@dataclass(frozen=True)
class Change:
    """What two answers differ by. A server that was started anew between them began at zero."""

    before: Reading
    now: Reading

    @property
    def seconds(self) -> float:
        """The time between them."""
        return max(float(self.now["at"]) - float(self.before["at"]), 1e-3)

    def count(self, family: str, *keys: str) -> float:
        """By how much the values of these keys of a family rose; of all its keys where none is given."""
        return self._risen(self.before[family], self.now[family], keys or tuple(self.now[family]))

    def rate(self, family: str, *keys: str) -> float:
        """The same a second."""
        return self.count(family, *keys) / self.seconds

    def list_failed(self) -> dict[str, float]:
        """How many requests failed, by the status that they were answered with."""
        counts = {code: self.count("requests", code) for code in sorted(self.now["requests"])}
        return {code: count for code, count in counts.items() if int(code) >= FIRST_FAILURE and count}

    def buckets(self, family: str, key: str = "") -> Buckets:
        """The observations of a histogram between the answers; `key`: of one of several, such as a tier."""
        now, before = self.now[family], self.before[family]
        if key:
            now, before = now.get(key), before.get(key)
        if not now or not now["counts"]:
            return Buckets((), (), 0.0)
        if not before or before["bounds"] != now["bounds"] or before["counts"][-1] > now["counts"][-1]:
            return Buckets(now["bounds"], now["counts"], now["sum"])
        risen = [new - old for new, old in zip(now["counts"], before["counts"], strict=True)]
        return Buckets(now["bounds"], risen, now["sum"] - before["sum"])

    def share(self, family: str, key: str) -> float:
        """The share of one key in what a family rose by; NaN where nothing happened."""
        whole = self.count(family)
        return self.count(family, key) / whole if whole else math.nan

    @staticmethod
    def _risen(before: Mapping[str, float], now: Mapping[str, float], keys: Sequence[str]) -> float:
        rises = ((now.get(key, 0.0), before.get(key, 0.0)) for key in keys)
        return sum(new - old if new >= old else new for new, old in rises)
