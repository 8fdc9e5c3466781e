"""The hit ratio of an LRU cache by its size, from the requests of an access log. Pure.

A request is a hit in an LRU cache if the models requested since the last request for the same one, together with this
one, fit in it. Their size is its *reuse distance* in bytes (Mattson et al., "Evaluation techniques for storage
hierarchies", 1970). One pass gives the ratio at every size. Only models whose name hashes below a threshold are
followed, and their distances are scaled up; if there are more than SAMPLES of them, the threshold is lowered
("Efficient MRC Construction with SHARDS", Waldspurger et al., 2015). So memory is bounded whatever the log holds, a
request takes O(log SAMPLES), and the ratio is exact for as many models and about a point off for more. Other policies
than LRU do better on ticks that do not fit (`fleetcast-load plan` simulates them); above a tick's size all are alike.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

SAMPLES = 16_384
STEP = 0.05  #: increase of the hit ratio that an advice is about
MIB = 1024 * 1024
_BINS = 64  #: number of distinct sizes in a factor of two
_SPACE = 1 << 64


@dataclass(frozen=True, slots=True)
class Advice:
    """Hit ratios of an LRU cache of `budget_bytes`, of `better_bytes`, and of unlimited size.

    `better_bytes` is the least size with a hit ratio higher by STEP, or by all that is possible if that is less; None
    if no size is better.
    """

    requests: int
    budget_bytes: int
    hit_ratio: float
    better_bytes: int | None
    better_ratio: float
    most_ratio: float

    @property
    def now(self) -> str:
        """Describe the present hit ratio."""
        if not self.requests:
            return "no request in it reached a model"
        if self.better_bytes is None:
            found = f"about {self.hit_ratio:.1%} hits, and no more memory would change that"
        else:
            found = f"about {self.hit_ratio:.1%} hits, {self.most_ratio:.1%} with room for all"
        return f"{self.requests} requests, {_round_up_mb(self.budget_bytes)} of cache: {found}"

    @property
    def next(self) -> str:
        """Describe the size that gives a better hit ratio; empty if none does."""
        if self.better_bytes is None:
            return ""
        points, more = (self.better_ratio - self.hit_ratio) * 100, self.better_bytes - self.budget_bytes
        return (
            f"the next {points:.1f} points of hit ratio cost {_round_up_mb(more)}: with --model-cache-bytes "
            f"{_round_up_mb(self.better_bytes)} about {self.better_ratio:.1%}"
        )


def advise_cache_size(requests: Iterable[tuple[str, int]], budget_bytes: int) -> Advice:
    """Advise from (model, bytes) of each request in the order of time.

    If bytes are 0 (not known), the last known size is used, or the request is left out. `budget_bytes` is the cache of
    all workers together.
    """
    distances = ReuseDistances()
    for model, size in requests:
        distances.ask(model, size)
    return distances.advice(budget_bytes)


class ReuseDistances:
    """Reuse distances of a stream of requests."""

    def __init__(self) -> None:
        self._share = 1.0  # of all models, that are followed
        self._models: dict[str, tuple[int, int, int]] = {}  # -> hash, bytes, place in the tree
        self._recency = _RecencyCounts(2 * SAMPLES)
        self._bins: dict[int, float] = {}  # size -> requests that are hits from there on
        self._first = 0.0
        self._requests = 0

    def __repr__(self) -> str:
        """For example `<ReuseDistances of 12000 requests, 300 models, all followed>`."""
        followed = "all" if self._share == 1 else f"{self._share:.3%}"
        return f"<ReuseDistances of {self._requests} requests, {len(self._models)} models, {followed} followed>"

    def ask(self, model: str, size: int) -> None:
        """Add one request."""
        known = self._models.get(model)
        if known is None:
            if size:
                self._requests += 1
                self._meet(model, size)
            return
        self._requests += 1
        number, before, place = known
        distance = (self._recency.since(place) + before) / self._share
        step = math.ceil(math.log2(distance) * _BINS)
        self._bins[step] = self._bins.get(step, 0.0) + 1
        self._recency.drop(place, before)
        self._enter(model, number, size or before)

    def advice(self, budget_bytes: int) -> Advice:
        """Return the hit ratio of a cache of that size, and the next better size."""
        if not self._first:
            return Advice(0, budget_bytes, 0.0, None, 0.0, 0.0)
        seen = self._requests * self._share
        curve, hits = [], seen - self._first - sum(self._bins.values())  # samples of few popular models are too few
        for step in sorted(self._bins):
            hits += self._bins[step]
            curve.append((math.ceil(2 ** (step / _BINS)), hits / seen))
        most = hits / seen
        now = max((ratio for size, ratio in curve if size <= budget_bytes), default=0.0)
        wanted = min(now + STEP, most)
        better = next(((size, ratio) for size, ratio in curve if size > budget_bytes and ratio >= wanted), None)
        size, ratio = better or (None, now)
        return Advice(self._requests, budget_bytes, now, size, ratio, most)

    def _meet(self, model: str, size: int) -> None:
        """Add the first request for a model. Only its name decides whether it is followed, so it counts too."""
        number = int.from_bytes(blake2b(model.encode(), digest_size=8).digest())
        if number >= self._share * _SPACE:
            return
        self._first += 1
        self._enter(model, number, size)
        if len(self._models) > SAMPLES:
            self._thin()

    def _enter(self, model: str, number: int, size: int) -> None:
        """Make the model the most recently requested one."""
        if self._recency.full:
            order = sorted(self._models, key=lambda each: self._models[each][2])
            self._recency = _RecencyCounts(2 * SAMPLES)
            for each in order:
                if each != model:
                    hashed, weight, _ = self._models[each]
                    self._models[each] = hashed, weight, self._recency.add(weight)
        self._models[model] = number, size, self._recency.add(size)

    def _thin(self) -> None:
        """Follow half as many models, and count as if there had never been more."""
        self._share /= 2
        for model, (number, size, place) in list(self._models.items()):
            if number >= self._share * _SPACE:
                self._recency.drop(place, size)
                del self._models[model]
        self._first /= 2
        self._bins = {step: count / 2 for step, count in self._bins.items()}


class _RecencyCounts:
    """Weights in the order of their arrival, and sums of those after a place, by a Fenwick tree."""

    def __init__(self, places: int) -> None:
        self._sums = [0] * (places + 1)
        self._next = 1
        self._total = 0

    @property
    def full(self) -> bool:
        return self._next == len(self._sums)

    def add(self, weight: int) -> int:
        """Add the newest weight and return its place."""
        place, self._next = self._next, self._next + 1
        self._change(place, weight)
        return place

    def drop(self, place: int, weight: int) -> None:
        self._change(place, -weight)

    def since(self, place: int) -> int:
        """Return the sum of all weights after this place."""
        upto, at = 0, place
        while at:
            upto += self._sums[at]
            at &= at - 1
        return self._total - upto

    def _change(self, place: int, by: int) -> None:
        self._total += by
        while place < len(self._sums):
            self._sums[place] += by
            place += place & -place


def _round_up_mb(size: int) -> str:
    """Round up to KiB, tenths of a MiB, or MiB, in the notation of the settings."""
    if size < MIB:
        return f"{math.ceil(size / 1024)}KiB"
    return f"{math.ceil(10 * size / MIB) / 10:.1f}MiB" if size < 100 * MIB else f"{math.ceil(size / MIB)}MiB"
