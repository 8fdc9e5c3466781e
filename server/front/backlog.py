"""What a front has under way at one worker: how much, how long one more would wait, and whose turn is next.

Pure: the clock is an argument. A worker serves its models in turns, so that one more request of a model waits for the
requests of its own model before it, and for as many of each other model, not for all that are there.

The wait is estimated from answers: a request that had so many ahead of it took so long. While no answer comes, the
silence is added. At first nothing is known and everything is admitted; up to FEW requests always are, so that there is
always something to learn from.
"""

from collections import OrderedDict
from dataclasses import dataclass
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


class Backlog:
    """The requests that one front has under way at one worker.

    Those for a model that is still loading are held, but are no work: they wait for bytes.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._work: dict[str, int] = {}
        self._total = 0
        self._deeper: list[int] = []  # INVARIANT: [k] is the number of models with more than k requests of work
        self._fixed_s = 0.0  # what a request takes that has next to nothing ahead of it
        self._each_s = 0.0  # what each request ahead adds
        self._heard = 0.0  # when the last answer came, or the worker got work after it had none

    def __len__(self) -> int:
        return self._total

    def __repr__(self) -> str:
        """For example `<Backlog 12 requests of 3 models, 2.1 ms each>`."""
        return f"<Backlog {self._total} requests of {len(self._held)} models, {self._each_s * 1e3:.1f} ms each>"

    def count_ahead(self, model: str) -> int:
        """The requests of work that are done when one more of this model is done, itself included."""
        return sum(self._deeper[: self._work.get(model, 0) + 1]) + 1

    def expected_s(self, ahead: int, now: float, safety: float = 1.0) -> float:
        """What a request is expected to take that has so many ahead, itself included."""
        silent_s = now - self._heard if self._work else 0.0
        return self._fixed_s + safety * self._each_s * ahead + silent_s

    def check(self, model: str, now: float, left_s: float, bounds: Bounds, *, is_work: bool) -> NoAdmission | None:
        """Why one more request of this model, with so much time left, is not admitted; None: it is.

        1. The worker's bound is reached.
        2. The model's bound is reached.
        3. The model has more than the worker has room for: so one hot model leaves half to the others, two a third
           (dynamic thresholds, Choudhury and Hahne 1998).
        4. It would not be answered in time. Of a request that waits for a load the worker knows more: it decides.
        """
        held = self._held.get(model, 0)
        if self._total >= bounds.per_worker:
            reason = f"{self._total} requests are under way at the worker already (queue_per_worker)"
        elif held >= bounds.per_model:
            reason = f"{held} requests for {model} are under way already (queue_per_model)"
        elif held > bounds.per_worker - self._total:
            reason = (
                f"{held} requests for {model} are under way already; the rest of {bounds.per_worker} is for other "
                f"models (queue_per_worker)"
            )
        elif is_work and self._total >= FEW and self._each_s:
            return self._check_deadline(model, now, left_s)
        else:
            return None
        return NoAdmission(reason, self.expected_s(self.count_ahead(model), now))

    def _check_deadline(self, model: str, now: float, left_s: float) -> NoAdmission | None:
        ahead = self.count_ahead(model)
        if ahead <= FEW or self.expected_s(ahead, now, SAFETY) <= left_s:
            return None
        expected = self.expected_s(ahead, now)
        reason = f"the answer is expected in {expected * 1e3:.0f} ms, the deadline is in {left_s * 1e3:.0f} ms"
        return NoAdmission(f"{reason}: {ahead - 1} requests are ahead", expected)

    def start(self, model: str, now: float, *, is_work: bool) -> None:
        """A request of the model is under way."""
        self._total += 1
        self._held[model] = self._held.get(model, 0) + 1
        if is_work:
            if not self._work:
                self._heard = now
            depth = self._work.get(model, 0)
            self._work[model] = depth + 1
            if depth == len(self._deeper):
                self._deeper.append(0)
            self._deeper[depth] += 1

    def end(self, model: str, *, was_work: bool) -> None:
        """It is answered, refused or given up; `was_work` as it was at its start."""
        self._total -= 1
        held = self._held[model] = self._held[model] - 1
        if not held:
            del self._held[model]
        if was_work:
            depth = self._work[model] = self._work[model] - 1
            if not depth:
                del self._work[model]
            self._deeper[depth] -= 1
            if not self._deeper[-1]:
                self._deeper.pop()

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


class Turns(Generic[T]):
    """Things that wait, each for a model; the models take turns, a model's own things keep their order."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, dict[int, T]] = OrderedDict()
        self._models: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, ident: int) -> bool:
        return ident in self._models

    def __repr__(self) -> str:
        """For example `<Turns 12 of 3>`."""
        return f"<Turns {len(self._models)} of {len(self._queues)}>"

    def put(self, model: str, ident: int, thing: T) -> None:
        """Add a thing behind those of its model."""
        self._queues.setdefault(model, {})[ident] = thing
        self._models[ident] = model

    def take(self) -> T:
        """The first thing of the model whose turn it is. Raises KeyError where there is none."""
        model, queue = self._queues.popitem(last=False)
        ident = next(iter(queue))
        del self._models[ident]
        thing = queue.pop(ident)
        if queue:
            self._queues[model] = queue
        return thing

    def drop(self, ident: int) -> bool:
        """Forget a thing; False if it does not wait here."""
        model = self._models.pop(ident, None)
        if model is None:
            return False
        queue = self._queues[model]
        del queue[ident]
        if not queue:
            del self._queues[model]
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._queues.clear()
        self._models.clear()
