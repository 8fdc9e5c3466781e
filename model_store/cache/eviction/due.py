"""Due: whoever is expected back last goes first, by the model's own rhythm. Made for the market clock.

A model that was asked about every 500 requests so far is expected 500 requests after it was asked last. In a tick over
a fleet that is larger than the cache this lets those go who have just had their turn, not those who are still to come:
what stays is a stable set, whether the order is fixed or shuffled, and the rest are guests, one after another. Under
skewed popularity it comes close to keeping the most popular. Rhythm and its deviation are learnt as TCP learns its
round-trip time (Jacobson and Karels, "Congestion Avoidance and Control", 1988): what has not come some deviations
after it was expected has probably stopped, and the longer ago it was asked the later it is now expected.

The unit of time is one request for any model. A pause between ticks counts as a request for each model that is here,
which tells a tick from the next; a night is no longer than any pause, and makes nobody late.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from itertools import count
from math import inf

from model_store.names import ModelName

MAX_GHOSTS = 10_000
WINDOW = 32  #: one member in so many has been asked so recently that more requests are the same visit
GAIN = 0.125  #: weight of the newest gap, once there have been as many as that is worth
SLACK = 2.5  #: deviations after which a model counts as late
OVERDUE = 0.5  #: of the time that a model is overdue it is expected to take still, until it counts as late
PAUSE = 16  #: mean waits between requests: at random, one in nine million
WAITS = 1024  #: requests over which the mean wait is taken, about
STEADY = 0.125  #: of its gap that no model's deviation is taken to be less than


@dataclass(slots=True)
class _Rhythm:
    """When its last visit began, the mean gap between visits, and how far gaps deviate from that."""

    began: int
    due: float  #: when it is expected
    late: float  #: from then on it is not
    visits: int = 1
    gap: float = 0.0
    deviation: float = 0.0
    ticket: int = 0  #: of its entries in the heaps; 0: they are void

    def visit(self, now: int) -> None:
        """A visit begins."""
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
    """Members asked last, oldest first; all others in heaps: by due, the last first; by late; once late, by last visit.

    An entry with a ticket that its model does not hold any more is void.
    """

    size: int = 0
    window: OrderedDict[ModelName, None] = field(default_factory=OrderedDict)
    by_due: list[Entry] = field(default_factory=list)
    by_late: list[Entry] = field(default_factory=list)
    late: list[Entry] = field(default_factory=list)


class Due:
    """Rhythms of those here, and of the last MAX_GHOSTS that left."""

    def __init__(self) -> None:
        self._now = 0  # in requests
        self._asked_at = inf  # in seconds
        self._waits = 0
        self._wait = 0.0  # from one request to the next, about, in seconds
        self._since = 0  # who has not been asked since then may be forgotten
        self._tickets = count(1)
        self._groups: dict[str | None, _Group] = {}
        self._group: dict[ModelName, str | None] = {}
        self._rhythms: dict[ModelName, _Rhythm] = {}
        self._ghosts: OrderedDict[ModelName, _Rhythm] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Due of {len(self._group)}, {len(self._ghosts)} ghosts>"

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:
        """A visit if it was asked. A newcomer has not been asked for as long as we remember: that is its first gap."""
        if asked:
            self._count(now)
        rhythm = self._ghosts.pop(model, None)
        if rhythm is None:
            due = self._now + self._horizon()
            rhythm = _Rhythm(self._now, due, due)
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
        """A visit, unless it is in the midst of one."""
        self._count(now)
        members = self._groups[self._group[model]]
        if model in members.window:
            members.window.move_to_end(model)
        else:
            self._rhythms[model].visit(self._now)
            self._open(members, model)

    def foresee(self, model: ModelName, now: float) -> None:
        """Known: its rhythm says so."""

    def leave(self, model: ModelName) -> None:
        """Its rhythm is remembered for a while."""
        if model not in self._group:
            return
        group = self._group.pop(model)
        members = self._groups[group]
        members.size -= 1
        members.window.pop(model, None)
        if not members.size:
            del self._groups[group]
        self._ghosts[model] = self._rhythms.pop(model)
        if len(self._ghosts) > MAX_GHOSTS:
            _, forgotten = self._ghosts.popitem(last=False)
            self._since = max(self._since, forgotten.began)

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Who is away longest first: late ones and those due last; at the end, if it must be, those asked just now."""
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
        """The less the longer until it is expected. A newcomer would be expected after all that we remember."""
        return 1 / max(1.0, self._away(model))

    def _away(self, model: ModelName) -> float:
        """Requests until it is expected; for a late one, as many as since its last visit."""
        rhythm = self._rhythms.get(model) or self._ghosts.get(model)
        if rhythm is None:
            return self._horizon()
        if rhythm.late <= self._now:
            return self._now - rhythm.began
        away = rhythm.due - self._now
        return away if away > 0 else away * -OVERDUE

    def _count(self, now: float) -> None:
        """A request. The wait for it is a pause where it is so long as by chance it never would be."""
        waited = max(0.0, now - self._asked_at)
        self._asked_at = now
        self._now += 1 + (len(self._group) if waited > PAUSE * self._wait else 0)
        self._waits = min(self._waits + 1, WAITS)
        self._wait += (waited - self._wait) / self._waits

    def _horizon(self) -> int:
        return self._now - self._since

    def _open(self, members: _Group, model: ModelName) -> None:
        """Into the window; whoever falls out at its other end can be chosen."""
        self._rhythms[model].ticket = 0
        members.window[model] = None
        while len(members.window) > max(1, members.size // WINDOW):
            self._file(members, members.window.popitem(last=False)[0])

    def _file(self, members: _Group, model: ModelName) -> None:
        """Into the heaps, which are cleared once most of their entries are void."""
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
        """The models of a heap's valid entries in its order, k of them in O(k log k); void ones at the top go."""
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
