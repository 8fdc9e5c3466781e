"""When a model will be asked next, by its own rhythm, learnt from its calls. Pure: the clock is an argument.

A market's clock asks every model of a product at each tick: every five minutes, every hour. Other traffic comes at any
time. So a model that is still a stranger has the beginnings of its last HISTORY *visits* remembered (calls with less
than QUIET_S between them are one visit), and as soon as four of them, the newest among them, are in step, as far apart
as each other within TOLERANCE of that, the model has a *rhythm*: a period, and when it is due. Three equal gaps among
independent calls are rare, so noise between the ticks, also for the same models, is mostly passed over; several ticks,
each with its own models, periods and phases, need nothing more. Who knows the ticks of a fleet is nobody: each model's
clock is its own, and models of one tick are those that are due together.

A rhythm follows its calls as an alpha-beta filter does (phase by PHASE_GAIN, period by PERIOD_GAIN of what a call was
off), so that it keeps up with a drifting clock. A call that is off by more than the tolerance is other traffic. Where
none comes the rhythm goes on at its pace and is trusted less; after at most MOST_TRUST such ticks it is forgotten, and
a model that has left the fleet with it. A model is foreseen from a quarter of its period before it is due, at most
MAX_LEAD_S.

Costs: a call takes O(1), two or three microseconds, and where a stranger's visit begins at most HISTORY / 3 comparisons
more; time that passes takes O(1) a tick of a model. Memory is bounded however many names come: MAX_STRANGERS strangers,
those asked longest ago are forgotten first, and MAX_RHYTHMS rhythms, beyond which no new one is learnt; some 40 MB.
Not learnt: a period below QUIET_S, a model with more than four other visits between two ticks (which no cache forgets),
a first rhythm that was every second tick (it stays so until it is missed).
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from model_store.names import ModelName

HISTORY = 16
QUIET_S = 1.0
TOLERANCE, MAX_TOLERANCE_S = 1 / 24, 30.0
LEAD, MAX_LEAD_S = 1 / 4, 60.0
PHASE_GAIN, PERIOD_GAIN = 0.4, 0.1
TRUST, MOST_TRUST = 2, 4  #: of a new rhythm, and the least with which a model is foreseen; ticks that may be missed
MAX_STRANGERS, MAX_RHYTHMS = 50_000, 100_000
BUCKET_S = 0.05  #: how exactly time is kept


class Expected(NamedTuple):
    """A model that is going to be asked, and when: about `due`."""

    model: ModelName
    due: float


@dataclass(slots=True)
class _Visits:
    """When a stranger's visits began, oldest first, and its last call."""

    began: "array[float]"
    last: float


@dataclass(slots=True)
class _Rhythm:
    """Seconds from tick to tick; the next one. `bucket`: when to look at it again; `near`: the tick is to come."""

    period: float
    due: float
    trust: int = TRUST
    bucket: int = 0
    near: bool = False

    @property
    def tolerance(self) -> float:
        return _tolerance(self.period)

    def hit(self, off: float) -> None:
        """A call came `off` seconds after it was due."""
        self.period += PERIOD_GAIN * off
        self.due += self.period + PHASE_GAIN * off
        self.trust = min(self.trust + 1, MOST_TRUST)
        self.near = False

    def miss(self) -> None:
        """None came."""
        self.due += self.period
        self.trust -= 1
        self.near = False


class Rhythms:
    """The models' rhythms. `model in rhythms`: it is foreseen to be asked about now, and has not been yet."""

    def __init__(self) -> None:
        self._strangers: OrderedDict[ModelName, _Visits] = OrderedDict()  # asked longest ago first
        self._rhythms: dict[ModelName, _Rhythm] = {}
        self._calendar: dict[int, list[ModelName]] = {}  # by bucket; an entry that its rhythm does not name is void
        self._buckets: list[int] = []  # of the calendar, a heap
        self._done = -1  # up to this bucket

    def __repr__(self) -> str:
        """For example `<Rhythms of 45 models, 300 strangers>`."""
        return f"<Rhythms of {len(self._rhythms)} models, {len(self._strangers)} strangers>"

    def __len__(self) -> int:
        return len(self._rhythms)

    def __contains__(self, model: object) -> bool:
        return isinstance(model, str) and self.near(ModelName(model)) is not None

    def near(self, model: ModelName) -> float | None:
        """When the model is due, where that is about now and it has not been asked yet."""
        rhythm = self._rhythms.get(model)
        return rhythm.due if rhythm is not None and rhythm.near and rhythm.trust >= TRUST else None

    def period(self, model: ModelName) -> float | None:
        """Seconds from one of the model's ticks to the next; None where there is none or it is not known."""
        rhythm = self._rhythms.get(model)
        return None if rhythm is None else rhythm.period

    def note(self, model: ModelName, now: float) -> None:
        """The model is asked."""
        rhythm = self._rhythms.get(model)
        if rhythm is None:
            self._visit(model, now)
            return
        off = now - rhythm.due
        if abs(off) <= rhythm.tolerance:
            rhythm.hit(off)
            self._file(model, rhythm, _opens(rhythm))

    def due(self, now: float) -> list[Expected]:
        """Who has come near its tick since the last call of this; to be called every so often."""
        found: list[Expected] = []
        last = int(now / BUCKET_S)
        while self._buckets and self._buckets[0] <= last:
            bucket = self._done = heappop(self._buckets)
            for model in self._calendar.pop(bucket):
                rhythm = self._rhythms.get(model)
                if rhythm is not None and rhythm.bucket == bucket:
                    self._turn(model, rhythm, now, found)
        self._done = max(self._done, last)
        return found

    def _turn(self, model: ModelName, rhythm: _Rhythm, now: float, found: list[Expected]) -> None:
        """A rhythm's tick has come near, or gone without a call."""
        while rhythm.due + rhythm.tolerance < now and rhythm.trust:
            rhythm.miss()
        if not rhythm.trust:
            del self._rhythms[model]
            return
        if not rhythm.near and _opens(rhythm) <= now:
            rhythm.near = True
            if rhythm.trust >= TRUST:
                found.append(Expected(model, rhythm.due))
        self._file(model, rhythm, rhythm.due + rhythm.tolerance if rhythm.near else _opens(rhythm))

    def _file(self, model: ModelName, rhythm: _Rhythm, at: float) -> None:
        rhythm.bucket = max(int(at / BUCKET_S), self._done) + 1
        models = self._calendar.get(rhythm.bucket)
        if models is None:
            self._calendar[rhythm.bucket] = [model]
            heappush(self._buckets, rhythm.bucket)
        else:
            models.append(model)

    def _visit(self, model: ModelName, now: float) -> None:
        """A stranger is asked: it has a rhythm now, or is remembered."""
        visits = self._strangers.get(model)
        if visits is None:
            self._strangers[model] = _Visits(array("d", (now,)), now)
            if len(self._strangers) > MAX_STRANGERS:
                self._strangers.popitem(last=False)
            return
        self._strangers.move_to_end(model)
        quiet, visits.last = now - visits.last >= QUIET_S, now
        if not quiet:
            return
        visits.began.append(now)
        del visits.began[:-HISTORY]
        period = _in_step(visits.began)
        if period is not None and len(self._rhythms) < MAX_RHYTHMS:
            del self._strangers[model]
            rhythm = self._rhythms[model] = _Rhythm(period, now + period)
            self._file(model, rhythm, _opens(rhythm))


def _tolerance(period: float) -> float:
    return min(period * TOLERANCE, MAX_TOLERANCE_S)


def _opens(rhythm: _Rhythm) -> float:
    """When it is near."""
    return rhythm.due - min(rhythm.period * LEAD, MAX_LEAD_S)


def _in_step(began: "array[float]") -> float | None:
    """The period of the newest of these visits and three before it; None if no three are in step with it.

    Of several periods the one that fits best: by chance one fits as badly as it may. A multiple of one that fits does
    so too, and is none.
    """
    now, best, least = began[-1], None, 1.0
    for first in reversed(began[:-1]):
        guess = now - first
        if now - 3 * guess < began[0] - guess / 2:
            break
        period = (now - _nearest(began, now - 3 * guess)) / 3
        off = max(abs(now - period - first), abs(now - 2 * period - _nearest(began, now - 2 * period)))
        multiple = best is not None and abs(period / best - round(period / best)) <= 2 * TOLERANCE
        if off <= _tolerance(period) and off / period < least / 2 and not multiple:
            best, least = period, off / period
    return best


def _nearest(sorted_times: "array[float]", time: float) -> float:
    at = bisect_left(sorted_times, time)
    around = sorted_times[max(0, at - 1) : at + 1]
    return min(around, key=lambda each: abs(each - time))
