"""What a front has under way at one worker: how much, how long one more would wait, and whose turn is next.

Pure: the clock is an argument. A worker serves its clients in turns, and the models of each client in turns. So one
more request waits for those of its own client and model before it, and for as many of each other model and of each
other client, not for all that are there. Where the server is open to all, all requests are one client's, the client "".

The wait is estimated from answers: a request that had so many ahead of it took so long. While no answer comes, the
silence is added. At first nothing is known and everything is admitted; up to FEW requests always are, so that there is
always something to learn from.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import Generic, TypeVar

FEW = 4  #: requests ahead of one that say nothing about the pace, as they run in one batch
SAFETY = 2.0  #: an admitted request is expected to take so much less than its deadline allows
KEPT = 15 / 16  #: weight of what was measured before
MOST = 3.0  #: times what was measured before count at most: a request that is long by itself says nothing of others

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most requests under way at one worker, and those of one model among them."""

    per_worker: int
    per_model: int


@dataclass(frozen=True, slots=True)
class NoAdmission:
    """Why one more request is not admitted, and after how many seconds it would be."""

    reason: str
    retry_s: float


class TurnCounts:
    """How many requests there are of each key, and how many are served before one more, where the keys take turns."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._deeper: list[int] = []  # INVARIANT: [k] is the number of keys with more than k requests

    def __repr__(self) -> str:
        """For example `<TurnCounts of 3 keys>`."""
        return f"<TurnCounts of {len(self.counts)} keys>"

    def count_turns(self, most: int) -> int:
        """The requests that are served while each key gets `most` turns at most."""
        return sum(self._deeper[:most])

    def add(self, key: str) -> None:
        """One more of this key."""
        depth = self.counts.get(key, 0)
        self.counts[key] = depth + 1
        if depth < len(self._deeper):
            self._deeper[depth] += 1
        else:
            self._deeper.append(1)

    def add_new(self, keys: Collection[str]) -> None:
        """One of each of these keys, of which there is none."""
        if keys:
            self.counts.update(dict.fromkeys(keys, 1))
            if not self._deeper:
                self._deeper.append(0)
            self._deeper[0] += len(keys)

    def remove_last(self, keys: Collection[str]) -> None:
        """One less of each of these keys, of which there is one."""
        if keys:
            for key in keys:
                del self.counts[key]
            self._deeper[0] -= len(keys)
            if not self._deeper[-1]:
                self._deeper.pop()

    def remove(self, key: str) -> None:
        """One less of this key."""
        depth = self.counts[key] = self.counts[key] - 1
        if not depth:
            del self.counts[key]
        self._deeper[depth] -= 1
        if not self._deeper[-1]:
            self._deeper.pop()


class Backlog:
    """The requests that one front has under way at one worker.

    Those for a model that is still loading are held, but are no work: they wait for bytes.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}  # by model
        self._held_by: dict[str, int] = {}  # by client, where clients are known
        self._total = self._total_work = 0
        self._work = {"": TurnCounts()}  # by client; theirs by model
        self._clients = TurnCounts()  # work by client, where clients are known
        self._fixed_s = 0.0  # what a request takes that has next to nothing ahead of it
        self._each_s = 0.0  # what each request ahead adds
        self._heard = 0.0  # when the last answer came, or the worker got work after it had none

    def __len__(self) -> int:
        return self._total

    def __repr__(self) -> str:
        """For example `<Backlog 12 requests of 3 models, 2.1 ms each>`."""
        return f"<Backlog {self._total} requests of {len(self._held)} models, {self._each_s * 1e3:.1f} ms each>"

    def count_ahead(self, model: str, client: str = "") -> int:
        """The requests of work that are done when one more of this model is done, itself included."""
        work = self._work.get(client)
        own = 1 if work is None else work.count_turns(work.counts.get(model, 0) + 1) + 1
        if not client:
            return own
        # In as many turns as the client needs, each other client has at most as many.
        return own + self._clients.count_turns(own) - min(own, self._clients.counts.get(client, 0))

    def expected_s(self, ahead: int, now: float, safety: float = 1.0) -> float:
        """What a request is expected to take that has so many ahead, itself included."""
        silent_s = now - self._heard if self._total_work else 0.0
        return self._fixed_s + safety * self._each_s * ahead + silent_s

    def check(
        self, model: str, client: str, now: float, left_s: float, ahead: int, bounds: Bounds, *, is_work: bool
    ) -> NoAdmission | None:
        """Why one more request of this model, with so much time left, is not admitted; None: it is.

        `ahead`: what `count_ahead` says of it.

        1. The worker's bound is reached.
        2. The model's bound is reached.
        3. The model has more than the worker has room for: so one hot model leaves half to the others, two a third
           (dynamic thresholds, Choudhury and Hahne 1998).
        4. The client has more than the worker has room for, with the same effect, where clients are known.
        5. It would not be answered in time. Of a request that waits for a load the worker knows more: it decides.
        """
        held, room = self._held.get(model, 0), bounds.per_worker - self._total
        if room <= 0:
            reason = f"{self._total} requests are under way at the worker already (queue_per_worker)"
        elif held >= bounds.per_model:
            reason = f"{held} requests for {model} are under way already (queue_per_model)"
        elif held > room:
            reason = (
                f"{held} requests for {model} are under way already; the rest of {bounds.per_worker} is for other "
                f"models (queue_per_worker)"
            )
        elif client and self._held_by.get(client, 0) > room:
            reason = (
                f"{self._held_by[client]} requests of {client} are under way already; the rest of {bounds.per_worker} "
                f"is for other clients (queue_per_worker)"
            )
        elif is_work and self._total >= FEW and self._each_s:
            return self._check_deadline(ahead, now, left_s)
        else:
            return None
        return NoAdmission(reason, self.expected_s(ahead, now))

    def _check_deadline(self, ahead: int, now: float, left_s: float) -> NoAdmission | None:
        if ahead <= FEW or self.expected_s(ahead, now, SAFETY) <= left_s:
            return None
        expected = self.expected_s(ahead, now)
        reason = f"the answer is expected in {expected * 1e3:.0f} ms, the deadline is in {left_s * 1e3:.0f} ms"
        return NoAdmission(f"{reason}: {ahead - 1} requests are ahead", expected)

    def start(self, model: str, client: str, now: float, *, is_work: bool) -> None:
        """A request of the model is under way."""
        self._total += 1
        self._held[model] = self._held.get(model, 0) + 1
        if client:
            self._held_by[client] = self._held_by.get(client, 0) + 1
        if is_work:
            if not self._total_work:
                self._heard = now
            self._total_work += 1
            if client not in self._work:
                self._work[client] = TurnCounts()
            self._work[client].add(model)
            if client:
                self._clients.add(client)

    def end(self, model: str, client: str, *, was_work: bool) -> None:
        """It is answered, refused or given up; `was_work` as it was at its start."""
        self._total -= 1
        _take(self._held, model)
        if client:
            _take(self._held_by, client)
        if was_work:
            self._total_work -= 1
            work = self._work[client]
            work.remove(model)
            if client:
                self._clients.remove(client)
                if not work.counts:
                    del self._work[client]

    def count_all_ahead(
        self,
        models: Sequence[str],
        client: str,
        now: float,
        left_s: float,
        bounds: Bounds,
        works: Sequence[bool],
    ) -> list[int] | None:
        """Count the requests ahead of each of these, which `start_all` may start then.

        None where one by one they may not all be admitted, or where one of a model is under way. INVARIANT: it is what
        `count_ahead` says of each, and `check` admits it, where those before it have been started.
        """
        count, fresh = len(models), dict.fromkeys(models, 1)
        room = bounds.per_worker - self._total - (count - 1)  # the last one's
        if room <= 0 or bounds.per_model <= 0 or len(fresh) < count or not self._held.keys().isdisjoint(fresh):
            return None
        if client and (self._held_by.get(client, 0) + count - 1 > room or self._clients.counts.keys() - {client}):
            return None
        before = self._work[client].count_turns(1) if client in self._work else 0
        aheads = [*accumulate(works, initial=before + 1)]
        worked = sum(works)
        if self._each_s and worked and self._check_deadline(before + worked, now, left_s) is not None:
            return None
        return aheads[:count]

    def start_all(self, models: Sequence[str], client: str, now: float, works: Sequence[bool]) -> None:
        """As `start` for each of these, of which `count_all_ahead` has counted what is ahead."""
        self._total += len(models)
        self._held.update(dict.fromkeys(models, 1))
        if client:
            self._held_by[client] = self._held_by.get(client, 0) + len(models)
        worked = [*compress(models, works)]
        if worked:
            self._start_work(worked, client, now)

    def _start_work(self, models: Collection[str], client: str, now: float) -> None:
        """Work of each model, of which the client has none yet."""
        if not self._total_work:
            self._heard = now
        self._total_work += len(models)
        if client not in self._work:
            self._work[client] = TurnCounts()
        self._work[client].add_new(models)
        if client:
            for _ in models:
                self._clients.add(client)

    def end_all(self, models: Sequence[str], client: str, works: Sequence[bool]) -> None:
        """As `end` for each of these."""
        held = self._held
        if [held[model] for model in models].count(1) < len(models) or len({*models}) < len(models):
            for model, was_work in zip(models, works, strict=True):
                self.end(model, client, was_work=was_work)
            return
        self._total -= len(models)
        for model in models:
            del held[model]
        if client:
            _take(self._held_by, client, len(models))
        worked = [*compress(models, works)]
        if worked:
            self._total_work -= len(worked)
            self._end_work(worked, client)

    def _end_work(self, models: Collection[str], client: str) -> None:
        """Work of each model, of which the client has no more."""
        work = self._work[client]
        work.remove_last(models)
        if client:
            for _ in models:
                self._clients.remove(client)
            if not work.counts:
                del self._work[client]

    def learn(self, ahead: int, began: float, now: float) -> None:
        """An answer has come to a request that had so many ahead when it began, itself included."""
        seconds, self._heard = now - began, now
        if ahead <= FEW:
            self._fixed_s = _move(self._fixed_s, seconds)
            each_s = min(self._each_s, seconds / ahead)
        else:
            self._fixed_s = min(self._fixed_s, seconds)
            each_s = (seconds - self._fixed_s) / ahead
        self._each_s = _move(self._each_s, each_s)


def _move(mean: float, found: float) -> float:
    """The moving mean after one more measurement; the first is taken as it is."""
    return KEPT * mean + (1 - KEPT) * min(found, MOST * mean) if mean else found


def _take(counts: dict[str, int], key: str, count: int = 1) -> None:
    left = counts[key] = counts[key] - count
    if not left:
        del counts[key]


class Turns(Generic[T]):
    """Things that wait, each for a client's request of a model.

    Clients take turns, and the models of each client; the things of one client and model keep their order.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[str, OrderedDict[str, dict[int, T]]] = OrderedDict()  # by client and model
        self._places: dict[int, tuple[str, str]] = {}  # client and model

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, ident: int) -> bool:
        return ident in self._places

    def __repr__(self) -> str:
        """For example `<Turns 12 of 3 clients>`."""
        return f"<Turns {len(self._places)} of {len(self._queues)} clients>"

    def put(self, model: str, ident: int, thing: T, client: str = "") -> None:
        """Add a thing behind those of its client and model."""
        self._queues.setdefault(client, OrderedDict()).setdefault(model, {})[ident] = thing
        self._places[ident] = client, model

    def take(self) -> T:
        """The first thing of the client and the model whose turn it is. Raises KeyError where there is none."""
        client, models = self._queues.popitem(last=False)
        model, queue = models.popitem(last=False)
        ident = next(iter(queue))
        del self._places[ident]
        thing = queue.pop(ident)
        if queue:
            models[model] = queue
        if models:
            self._queues[client] = models
        return thing

    def drop(self, ident: int) -> bool:
        """Forget a thing; False if it does not wait here."""
        if ident not in self._places:
            return False
        client, model = self._places.pop(ident)
        models = self._queues[client]
        del models[model][ident]
        if not models[model]:
            del models[model]
        if not models:
            del self._queues[client]
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._queues.clear()
        self._places.clear()
