"""Predicts when a model is requested next, by a rhythm learnt from its requests. Pure: the clock is an argument.

In a market, every model of a product is requested at each tick, such as every five minutes or every hour; other
requests come at any time. For a model without a rhythm (a *stranger*) the starts of its last HISTORY *visits* are kept;
requests less than QUIET_S apart are one visit. Once four visits, the newest among them, are equally far apart within
TOLERANCE, the model has a *rhythm*: a period and a due time. Three equal gaps among independent requests are rare, so
requests between the ticks are mostly ignored. No tick of the whole fleet is estimated: each model has its own rhythm,
so several ticks with different models, periods and phases need nothing more.

A rhythm follows its requests as an alpha-beta filter does: the phase by PHASE_GAIN and the period by PERIOD_GAIN of a
request's error, so that it follows a drifting clock. A request that is off by more than the tolerance is other traffic.
If no request comes at a tick, the rhythm keeps its period and loses trust; after at most MOST_TRUST such ticks it is
forgotten. A model is expected from a quarter of its period before it is due, at most MAX_LEAD_S before.

Costs: a request takes O(1), two or three microseconds, and at most HISTORY / 3 comparisons more when a stranger's visit
starts; passing time takes O(1) for each tick of a model. Memory is bounded for any names, which clients can make up:
beyond MAX_STRANGER_BYTES the least recently requested stranger is forgotten first; beyond MAX_RHYTHM_BYTES no rhythm is
learnt.

Not learnt: a period below QUIET_S; a model with more than four other visits between two ticks (it stays cached anyway);
and if the first rhythm has twice the true period, it stays so until it is missed.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from model_store.name_table import NameTable, name_bytes
from model_store.names import ModelName

HISTORY = 16
QUIET_S = 1.0
TOLERANCE, MAX_TOLERANCE_S = 1 / 24, 30.0
LEAD, MAX_LEAD_S = 1 / 4, 60.0
PHASE_GAIN, PERIOD_GAIN = 0.4, 0.1
TRUST, MOST_TRUST = 2, 4  #: trust of a new rhythm, which predictions need at least; the most, in ticks it may miss
MAX_STRANGER_BYTES, MAX_RHYTHM_BYTES = 24 * 1024 * 1024, 64 * 1024 * 1024
VISITS_BYTES, RHYTHM_BYTES = 384, 640  #: of one stranger beside its name; of one rhythm and its place in the calendar
BUCKET_S = 0.05  #: resolution of time


class Expected(NamedTuple):
    """A model that is expected to be requested at about `due`."""

    model: ModelName
    due: float


@dataclass(slots=True)
class _Visits:
    """The starts of a stranger's visits, oldest first, and the time of its last request."""

    began: "array[float]"
    last: float


@dataclass(slots=True)
class _Rhythm:
    """A model's rhythm: seconds between ticks and the time of the next one.

    `bucket`: when it is examined next. `near`: the tick is near, and the model has not been requested for it yet.
    """

    period: float
    due: float
    trust: int = TRUST
    bucket: int = 0
    near: bool = False

    @property
    def tolerance(self) -> float:
        return _compute_tolerance(self.period)

    def record_hit(self, off: float) -> None:
        """Record a request that came `off` seconds after it was due."""
        self.period += PERIOD_GAIN * off
        self.due += self.period + PHASE_GAIN * off
        self.trust = min(self.trust + 1, MOST_TRUST)
        self.near = False

    def record_miss(self) -> None:
        """Record that no request came at a tick."""
        self.due += self.period
        self.trust -= 1
        self.near = False


class Rhythms:
    """The rhythms of all models. `model in rhythms`: a request is expected about now and has not come yet."""

    def __init__(self) -> None:
        #: least recently requested first
        self._strangers: NameTable[_Visits] = NameTable(MAX_STRANGER_BYTES, VISITS_BYTES)
        self._rhythms: dict[ModelName, _Rhythm] = {}
        self._rhythm_bytes = 0
        self._calendar: dict[int, list[ModelName]] = {}  # by bucket; void unless the model's rhythm names that bucket
        self._buckets: list[int] = []  # the calendar's keys, a heap
        self._done = -1  # the last bucket that was examined

    def __repr__(self) -> str:
        """For example `<Rhythms of 45 models, 300 strangers>`."""
        return f"<Rhythms of {len(self._rhythms)} models, {len(self._strangers)} strangers>"

    def __len__(self) -> int:
        return len(self._rhythms)

    def __contains__(self, model: object) -> bool:
        return isinstance(model, str) and self.near_tick(ModelName(model)) is not None

    def near_tick(self, model: ModelName) -> float | None:
        """The model's due time if it is near and the request has not come yet; else None."""
        rhythm = self._rhythms.get(model)
        return rhythm.due if rhythm is not None and rhythm.near and rhythm.trust >= TRUST else None

    def period(self, model: ModelName) -> float | None:
        """Seconds between the model's ticks; None if it has no rhythm."""
        rhythm = self._rhythms.get(model)
        return None if rhythm is None else rhythm.period

    def record_request(self, model: ModelName, now: float) -> None:
        """Record a request for the model."""
        rhythm = self._rhythms.get(model)
        if rhythm is None:
            self._record_stranger(model, now)
            return
        off = now - rhythm.due
        if abs(off) <= rhythm.tolerance:
            rhythm.record_hit(off)
            self._file_in_bucket(model, rhythm, _compute_opening(rhythm))

    def record_requests(self, models: Iterable[ModelName], now: float) -> None:
        """Record requests that come at once. Most are of a visit that goes on."""
        rhythms, get, touch, record = self._rhythms, self._strangers.get, self._strangers.touch, self.record_request
        for model in models:
            visits = None if model in rhythms else get(model)
            if visits is not None and now - visits.last < QUIET_S:
                touch(model)
                visits.last = now
            else:
                record(model, now)

    def collect_due(self, now: float) -> list[Expected]:
        """The models that have come near their tick since the last call. To be called regularly."""
        found: list[Expected] = []
        last = int(now / BUCKET_S)
        while self._buckets and self._buckets[0] <= last:
            bucket = self._done = heappop(self._buckets)
            for model in self._calendar.pop(bucket):
                rhythm = self._rhythms.get(model)
                if rhythm is not None and rhythm.bucket == bucket:
                    self._advance_rhythm(model, rhythm, now, found)
        self._done = max(self._done, last)
        return found

    def _advance_rhythm(self, model: ModelName, rhythm: _Rhythm, now: float, found: list[Expected]) -> None:
        """Examine a rhythm whose tick has come near, or has passed without a request."""
        while rhythm.due + rhythm.tolerance < now and rhythm.trust:
            rhythm.record_miss()
        if not rhythm.trust:
            del self._rhythms[model]
            self._rhythm_bytes -= RHYTHM_BYTES + name_bytes(model)
            return
        if not rhythm.near and _compute_opening(rhythm) <= now:
            rhythm.near = True
            if rhythm.trust >= TRUST:
                found.append(Expected(model, rhythm.due))
        self._file_in_bucket(model, rhythm, rhythm.due + rhythm.tolerance if rhythm.near else _compute_opening(rhythm))

    def _file_in_bucket(self, model: ModelName, rhythm: _Rhythm, at: float) -> None:
        rhythm.bucket = max(int(at / BUCKET_S), self._done) + 1
        models = self._calendar.get(rhythm.bucket)
        if models is None:
            self._calendar[rhythm.bucket] = [model]
            heappush(self._buckets, rhythm.bucket)
        else:
            models.append(model)

    def _record_stranger(self, model: ModelName, now: float) -> None:
        """Record a stranger's request; it may complete a rhythm."""
        visits = self._strangers.get(model)
        if visits is None:
            self._strangers.put(model, _Visits(array("d", (now,)), now))
            return
        self._strangers.touch(model)
        quiet, visits.last = now - visits.last >= QUIET_S, now
        if not quiet:
            return
        visits.began.append(now)
        del visits.began[:-HISTORY]
        period = _in_step(visits.began)
        if period is None:
            return
        size = RHYTHM_BYTES + name_bytes(model)
        if self._rhythm_bytes + size <= MAX_RHYTHM_BYTES:
            self._strangers.pop(model)
            self._rhythm_bytes += size
            rhythm = self._rhythms[model] = _Rhythm(period, now + period)
            self._file_in_bucket(model, rhythm, _compute_opening(rhythm))


def _compute_tolerance(period: float) -> float:
    return min(period * TOLERANCE, MAX_TOLERANCE_S)


def _compute_opening(rhythm: _Rhythm) -> float:
    """From when on the tick counts as near."""
    return rhythm.due - min(rhythm.period * LEAD, MAX_LEAD_S)


def _in_step(began: "array[float]") -> float | None:
    """The period of the newest visit and three earlier ones; None if no three are equally far apart.

    If several periods fit, the best one counts, because a chance match tends to fit badly. A multiple of a period that
    fits is skipped.
    """
    now, best, least = began[-1], None, 1.0
    for first in reversed(began[:-1]):
        guess = now - first
        if now - 3 * guess < began[0] - guess / 2:
            break
        period = (now - _find_nearest(began, now - 3 * guess)) / 3
        off = max(abs(now - period - first), abs(now - 2 * period - _find_nearest(began, now - 2 * period)))
        multiple = best is not None and abs(period / best - round(period / best)) <= 2 * TOLERANCE
        if off <= _compute_tolerance(period) and off / period < least / 2 and not multiple:
            best, least = period, off / period
    return best


def _find_nearest(sorted_times: "array[float]", time: float) -> float:
    at = bisect_left(sorted_times, time)
    around = sorted_times[max(0, at - 1) : at + 1]
    return min(around, key=lambda each: abs(each - time))
