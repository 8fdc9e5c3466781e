"""Due: evicts the model whose next request is expected last, by each model's own rhythm. Made for market ticks.

A model that was requested about every 500 requests is expected 500 requests after its last one. In a tick over a fleet
that is larger than the cache this evicts models that were just requested, not those still to come in this tick. So a
stable set stays, whether the order is fixed or shuffled, and the other models replace each other. Under skewed
popularity it comes close to keeping the most popular models. Rhythm and deviation are estimated as TCP estimates its
round-trip time (Jacobson and Karels, "Congestion Avoidance and Control", 1988): a model that is some deviations
late has probably stopped, and the longer ago its last request, the later the next one is expected.

The unit of time is one request for any model. A pause between ticks counts as one request for each resident model,
which separates a tick from the next. All pauses count the same, so a night makes no model late.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from itertools import count
from math import inf

from model_store.name_table import NameTable
from model_store.names import ModelName

MAX_GHOSTS, MAX_GHOST_BYTES = 10_000, 16 * 1024 * 1024  #: models that left whose rhythm is known
RHYTHM_BYTES = 384  #: of one rhythm
WINDOW = 32  #: one member in so many was requested so recently that more requests belong to the same visit
GAIN = 0.125  #: weight of the newest gap in the means; while there were fewer gaps than 1 / GAIN, one divided by them
SLACK = 2.5  #: deviations after which a model counts as late
OVERDUE = 0.5  #: an overdue model that is not late yet is expected after this share of the time it is overdue
PAUSE = 16  #: mean waits that make a pause: one random wait in nine million is as long
WAITS = 1024  #: requests over which the mean wait is taken, about
STEADY = 0.125  #: the least deviation, as a share of the gap


@dataclass(slots=True)
class _VisitTimes:
    """When a model's last visit began, the mean gap between visits, and the mean deviation of gaps from it."""

    began: int
    due: float  #: when the next visit is expected
    late: float  #: from then on the model counts as late
    visits: int = 1
    gap: float = 0.0
    deviation: float = 0.0
    ticket: int = 0  #: number of its valid entries in the heaps; 0: it has none

    def visit(self, now: int) -> None:
        """Record that a visit begins: update gap, deviation and the next expected visit."""
        gap, self.began = now - self.began, now
        if self.visits == 1:
            self.gap = self.deviation = gap
        else:
            error, weight = gap - self.gap, max(GAIN, 1 / self.visits)
            self.gap += weight * error
            self.deviation += weight * (abs(error) - self.deviation)
        self.visits += 1
        self.due = now + self.gap
        self.late = self.due + SLACK * max(self.deviation, STEADY * self.gap)


Entry = tuple[float, int, ModelName]


@dataclass(slots=True)
class _Group:
    """The members of one group.

    `window`: the most recently requested, oldest first. All others are in heaps: `by_due`, the latest first, and
    `by_late`; models that are late move to `late`, ordered by their last visit.
    INVARIANT: a heap entry is valid only while its model holds the entry's ticket.
    """

    size: int = 0
    window: OrderedDict[ModelName, None] = field(default_factory=OrderedDict)
    by_due: list[Entry] = field(default_factory=list)
    by_late: list[Entry] = field(default_factory=list)
    late: list[Entry] = field(default_factory=list)


class Due:
    """The rhythms of resident models, and of the last MAX_GHOSTS that left."""

    def __init__(self) -> None:
        self._now = 0  # in requests
        self._asked_at = inf  # in seconds
        self._waits = 0
        self._wait = 0.0  # from one request to the next, about, in seconds
        self._since = 0  # models that were last requested before this may have been forgotten
        self._tickets = count(1)
        self._groups: dict[str | None, _Group] = {}
        self._group: dict[ModelName, str | None] = {}
        self._rhythms: dict[ModelName, _VisitTimes] = {}
        self._ghosts: NameTable[_VisitTimes] = NameTable(MAX_GHOST_BYTES, value_bytes=RHYTHM_BYTES)

    def __repr__(self) -> str:
        return f"<Due of {len(self._group)}, {len(self._ghosts)} ghosts>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:
        """Record a visit if there was a request. An unknown model's first gap is all the time that is remembered."""
        if asked:
            self._count(now)
        rhythm = self._ghosts.pop(model)
        if rhythm is None:
            due = self._now + self._horizon()
            rhythm = _VisitTimes(self._now, due, due)
        elif asked:
            rhythm.visit(self._now)
        members = self._groups.setdefault(group, _Group())
        members.size += 1
        self._group[model], self._rhythms[model] = group, rhythm
        if asked:
            self._open(members, model)
        else:
            self._file(members, model)

    def hit(self, model: ModelName, now: float) -> None:
        """Record a visit, unless the request belongs to the model's last one."""
        self._count(now)
        members = self._groups[self._group[model]]
        if model in members.window:
            members.window.move_to_end(model)
        else:
            self._rhythms[model].visit(self._now)
            self._open(members, model)

    def foresee(self, model: ModelName, now: float) -> None:
        """No-op: this policy already predicts the next use."""

    def leave(self, model: ModelName) -> None:
        """Stop ranking the model; its rhythm is kept for a while."""
        if model not in self._group:
            return
        group = self._group.pop(model)
        members = self._groups[group]
        members.size -= 1
        members.window.pop(model, None)
        if not members.size:
            del self._groups[group]
        forgotten = self._ghosts.put(model, self._rhythms.pop(model))
        if len(self._ghosts) > MAX_GHOSTS:
            forgotten.append(self._ghosts.pop_oldest())
        for rhythm in forgotten:
            self._since = max(self._since, rhythm.began)

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """The model whose next request is furthest away first; models that were just requested last."""
        members = self._groups.get(group)
        if members is None:
            return
        while members.by_late and members.by_late[0][0] <= self._now:
            entry = heappop(members.by_late)
            if self._holds(entry):
                _, ticket, model = entry
                heappush(members.late, (self._rhythms[model].began, ticket, model))
        due = (model for model in self._ordered(members.by_due) if self._rhythms[model].late > self._now)
        yield from merge(self._ordered(members.late), due, key=self._away, reverse=True)
        yield from members.window

    def worth(self, model: ModelName) -> float:
        """The reciprocal of the requests until the model is expected; for an unknown one, of all that is remembered."""
        return 1 / max(1.0, self._away(model))

    def _away(self, model: ModelName) -> float:
        """Requests until the model is expected; for a late one, as many as since its last visit."""
        rhythm = self._rhythms.get(model) or self._ghosts.get(model)
        if rhythm is None:
            return self._horizon()
        if rhythm.late <= self._now:
            return self._now - rhythm.began
        away = rhythm.due - self._now
        return away if away > 0 else away * -OVERDUE

    def _count(self, now: float) -> None:
        """Count a request. The wait before it is a pause if it is longer than chance explains."""
        waited = max(0.0, now - self._asked_at)
        self._asked_at = now
        self._now += 1 + (len(self._group) if waited > PAUSE * self._wait else 0)
        self._waits = min(self._waits + 1, WAITS)
        self._wait += (waited - self._wait) / self._waits

    def _horizon(self) -> int:
        return self._now - self._since

    def _open(self, members: _Group, model: ModelName) -> None:
        """Put the model into the window; models that drop out of it can be evicted."""
        self._rhythms[model].ticket = 0
        members.window[model] = None
        while len(members.window) > max(1, members.size // WINDOW):
            self._file(members, members.window.popitem(last=False)[0])

    def _file(self, members: _Group, model: ModelName) -> None:
        """Put the model into the heaps; a heap is rebuilt once most of its entries are void."""
        rhythm = self._rhythms[model]
        ticket = rhythm.ticket = next(self._tickets)
        heappush(members.by_due, (-rhythm.due, ticket, model))
        heappush(members.by_late, (rhythm.late, ticket, model))
        for heap in (members.by_due, members.by_late, members.late):
            if len(heap) > 2 * members.size:
                heap[:] = filter(self._holds, heap)
                heapify(heap)

    def _holds(self, entry: Entry) -> bool:
        _, ticket, model = entry
        rhythm = self._rhythms.get(model)
        return rhythm is not None and rhythm.ticket == ticket

    def _ordered(self, heap: list[Entry]) -> Iterator[ModelName]:
        """The models of a heap's valid entries in order, the first k in O(k log k). Void entries at the top go."""
        while heap and not self._holds(heap[0]):
            heappop(heap)
        front = [(heap[0], 0)] if heap else []
        while front:
            entry, i = heappop(front)
            if self._holds(entry):
                yield entry[2]
            for child in (2 * i + 1, 2 * i + 2):
                if child < len(heap):
                    heappush(front, (heap[child], child))
