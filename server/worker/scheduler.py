"""Chooses the next batch of a worker. Pure: the clock is an argument.

A job waits for its model, or is ready to run, or is done (answered, cancelled or expired; done jobs are skipped where
they are still queued). Ready jobs wait in groups, one for each family or single model. Groups take turns, so no family
starves another; within a group clients take turns, and within a client's jobs its models, so that neither a busy client
nor a busy model starves the others. Where the server is open to all, all jobs are one client's.

A batch takes half of its group's jobs: while the fronts send the answers of one half, and clients send new requests,
the worker runs the other half. With whole groups, worker and fronts would wait for each other in turn (8 connections on
two cores: 12,300 requests a second; with halves 17,300). Up to FEW jobs are not halved, because each forward has a
fixed cost.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from handlers.codecs.marks import NO_MARKS, Marks
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.contract import UNHALVED_JOBS
from server.ipc.frames import CacheResult, Request, Tier
from server.worker.stage_times import StageTimes

FEW = UNHALVED_JOBS


class Job(msgspec.Struct, eq=False):  # made in half of the time that a dataclass takes
    """A request in this worker. `origin`: the connection to answer to. Times are seconds on the monotonic clock.

    `arrived`: at the front; `accepted`: by this worker. Between the two the request waited for the worker to read it.
    """

    request: Request
    model: ModelName
    origin: Any
    arrived: float
    deadline: float
    cache: CacheResult = CacheResult.NONE
    tier: Tier = Tier.NONE
    slot: Slot | None = None
    load_s: float = 0.0
    done: bool = False
    call: Any = None  #: the decoded request, where its batch had no time left for it
    accepted: float = 0.0
    answered: Sequence[Any] = ()  #: the levels of its forecasts, once they are encoded, where these are kept
    together: Any = None  #: the call for many models that it is an item of; None for a request of its own
    instance: Any = b""  #: of an item, as it lies in the call
    marks: Marks = NO_MARKS  #: of a forecast, once its request is decoded
    times: StageTimes | None = None  #: of a traced request

    def queued_s(self, began: float) -> float:
        """Seconds from arrival at the front to the start of its batch, without those in which its model was loaded."""
        return max(0.0, began - self.arrived - self.load_s)

    def __repr__(self) -> str:
        """For example `<Job 17 au/NSW1.mar miss>`."""
        return f"<Job {self.request.id} {self.model} {self.cache.name.lower()}{' done' if self.done else ''}>"


_Queues = OrderedDict[str, OrderedDict[ModelName, list[Job]]]  #: a group's jobs by client, and theirs by model


class QueueFull(Exception):
    """A limit of queued requests is reached; the message says which."""


class Scheduler:
    """All jobs of one worker between arrival and answer. `few`: so few jobs are not halved, see the module."""

    def __init__(self, per_model: int, per_worker: int, few: int = FEW) -> None:
        self._per_model = per_model
        self._per_worker = per_worker
        self._few = few
        self._counts: dict[ModelName, int] = {}
        self._total = 0
        self._waiting: dict[ModelName, list[Job]] = {}
        self._ready: OrderedDict[str, _Queues] = OrderedDict()
        self._parked: dict[str, _Queues] = {}
        self._whole: set[str] = set()  # groups whose next batch is not halved

    def __repr__(self) -> str:
        """For example `<Scheduler 12 jobs, 3 models awaited, 2 groups ready>`."""
        return f"<Scheduler {self._total} jobs, {len(self._waiting)} models awaited, {len(self._ready)} groups ready>"

    def __len__(self) -> int:
        return self._total

    @property
    def has_work(self) -> bool:
        """Whether `next_batch` would return any job."""
        return bool(self._ready)

    def count(self, model: ModelName) -> int:
        """The model's jobs that wait or run."""
        return self._counts.get(model, 0)

    def admit(self, job: Job) -> None:
        """Count the job. Raises QueueFull if the queue of its model or of the worker is full."""
        queued = self._counts.get(job.model, 0)
        if queued >= self._per_model:
            raise QueueFull(f"{queued} requests wait for {job.model} already (queue_per_model)")
        if self._total >= self._per_worker:
            raise QueueFull(f"{self._total} requests wait in this worker already (queue_per_worker)")
        self._counts[job.model] = queued + 1
        self._total += 1

    def admit_all(self, models: Sequence[ModelName]) -> bool:
        """Count a job for each of these, as `admit` does, or none and return False where a queue has no room."""
        if self._total + len(models) > self._per_worker:
            return False
        counts, per_model = self._counts, self._per_model
        for i, model in enumerate(models):
            queued = counts.get(model, 0)
            if queued >= per_model:
                for counted in models[:i]:
                    self._take_one(counted)
                return False
            counts[model] = queued + 1
        self._total += len(models)
        return True

    def add_waiting(self, job: Job) -> None:
        """Add a job whose model is being loaded."""
        self._waiting.setdefault(job.model, []).append(job)

    def take_waiting(self, model: ModelName) -> list[Job]:
        """Remove and return the jobs that wait for this model, without those that are done."""
        jobs = self._waiting.pop(model, [])
        return [job for job in jobs if not job.done]

    def add_ready(self, group: str, job: Job) -> None:
        """Queue a job whose model is resident for one of the group's next batches."""
        self._queues(group).setdefault(job.request.client, OrderedDict()).setdefault(job.model, []).append(job)

    def add_all_ready(self, group: str, client: str, jobs: Iterable[Job]) -> None:
        """Queue jobs of one client, as `add_ready` does each of them."""
        models = self._queues(group).setdefault(client, OrderedDict())
        for job in jobs:
            queue = models.get(job.model)
            if queue is None:
                models[job.model] = [job]
            else:
                queue.append(job)

    def put_back(self, group: str, jobs: Sequence[Job]) -> None:
        """Queue jobs that their batch had no time for before others. Other groups run first."""
        queues = self._queues(group)
        for job in reversed(jobs):
            models = queues.setdefault(job.request.client, OrderedDict())
            queues.move_to_end(job.request.client, last=False)
            models.setdefault(job.model, []).insert(0, job)
            models.move_to_end(job.model, last=False)

    def park(self, group: str) -> None:
        """Make no batches of the group until it is unparked. Its jobs stay queued."""
        self._parked[group] = self._ready.pop(group, OrderedDict())

    def unpark(self, group: str, *, whole: bool = False) -> None:
        """Make batches of the group again. `whole`: the next one is of all its jobs, not of half of them."""
        if queues := self._parked.pop(group):
            self._ready[group] = queues
            if whole:
                self._whole.add(group)

    def count_queued(self) -> tuple[int, int]:
        """How many jobs wait for their model's load, and how many for a step."""
        queues = (*self._ready.values(), *self._parked.values())
        for_steps = sum(len(jobs) for clients in queues for models in clients.values() for jobs in models.values())
        return sum(map(len, self._waiting.values())), for_steps

    def count_parked(self, group: str, most: int) -> int:
        """How many jobs of a parked group are queued; counted up to `most`."""
        found = 0
        for models in self._parked.get(group, {}).values():
            for queue in models.values():
                found += len(queue)
                if found >= most:
                    return found
        return found

    def _queues(self, group: str) -> _Queues:
        if group in self._parked:
            return self._parked[group]
        return self._ready.setdefault(group, OrderedDict())

    def next_batch(self, limit: int) -> tuple[str, list[Job]]:
        """A group and half of its jobs (see `unpark`), at most `limit`, taken in turns. Includes jobs that are done."""
        group, queues = self._ready.popitem(last=False)
        if len(queues) == 1 and (only := _get_only_job(queues)) is not None:
            self._whole.discard(group)
            return group, [only]
        most = limit
        first = next(iter(next(iter(queues.values())).values()))[0]
        if group in self._whole or first.together is not None:  # the items of a call are answered together
            self._whole.discard(group)
        else:
            half = (sum(sum(map(len, models.values())) for models in queues.values()) + 1) // 2
            most = min(max(half, self._few), limit)
        if len(queues) == 1 and most == limit and (whole := _take_whole(queues, limit)) is not None:
            return group, whole
        batch = _take_turns(queues, most)
        if queues:
            self._ready[group] = queues
        return group, batch

    def finish(self, job: Job) -> bool:
        """Mark a job as done, because it is answered or given up. False if it was done before."""
        if job.done:
            return False
        job.done = True
        self._total -= 1
        self._take_one(job.model)
        return True

    def finish_all(self, jobs: Sequence[Job]) -> None:
        """Mark jobs as done that are answered, none of which was done before."""
        counts, take_one = self._counts, self._take_one
        for job in jobs:
            job.done = True
            if counts[job.model] == 1:
                del counts[job.model]
            else:
                take_one(job.model)
        self._total -= len(jobs)

    def _take_one(self, model: ModelName) -> None:
        left = self._counts[model] - 1
        if left:
            self._counts[model] = left
        else:
            del self._counts[model]

    def take_expired(self, now: float) -> list[Job]:
        """Remove and return the jobs that wait for their model and whose deadline has passed.

        Deadlines of ready jobs are checked when their batch runs. Done jobs are dropped, so that a slow load does not
        keep the bodies of cancelled requests in memory.
        """
        late = []
        for model, jobs in list(self._waiting.items()):
            left = [job for job in jobs if job.deadline > now and not job.done]
            if len(left) == len(jobs):
                continue
            late += [job for job in jobs if job.deadline <= now and not job.done]
            if left:
                self._waiting[model] = left
            else:
                del self._waiting[model]
        return late

    def open_jobs(self) -> Iterator[Job]:
        """All ready and waiting jobs, without those that are done."""
        groups = (*self._ready.values(), *self._parked.values())
        queues: Iterable[Iterable[Job]] = (
            queue for queues in groups for models in queues.values() for queue in models.values()
        )
        for jobs in (*queues, *self._waiting.values()):
            yield from (job for job in jobs if not job.done)


def _get_only_job(queues: _Queues) -> Job | None:
    """The job of a group with one client, where it has no other."""
    (models,) = queues.values()
    if len(models) > 1:
        return None
    (queue,) = models.values()
    return queue[0] if len(queue) == 1 else None


def _take_turns(queues: _Queues, most: int) -> list[Job]:
    """Remove so many jobs of a group, of its clients in turn, and of each client's models."""
    batch = list[Job]()
    while queues and len(batch) < most:
        client, models = queues.popitem(last=False)
        while models and len(batch) < most:
            model, queue = models.popitem(last=False)
            batch.append(queue.pop(0))
            if queue:
                models[model] = queue
            if queues:  # the next client's turn
                break
        if models:
            queues[client] = models
    return batch


def _take_whole(queues: _Queues, limit: int) -> list[Job] | None:
    """All jobs of a group with one client, in turn, where these are at most `limit` and of a model each; else None."""
    (models,) = queues.values()
    if len(models) > limit or any(len(queue) > 1 for queue in models.values()):
        return None
    return [queue[0] for queue in models.values()]
