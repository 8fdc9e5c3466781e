"""Keeps as many processes of code archives as clients have asked for, where memory allows. On the step thread.

A further process is started on a thread of its own lane, as a load is, and takes its place when its handler is loaded.
One that cannot be started, or has no room, leaves its archive with fewer: the others go on.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import structlog

from model_store.cache.slots import Slot
from model_store.errors import CodeFailed, LoadError
from model_store.names import ModelName, split_version
from server.ipc.pulse import Pulse
from server.worker.model_loader import LoadedModel, LoadSteps, ModelBuilder
from server.worker.resident_models import ResidentModels
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.replicas import Replicas

STARTS = 2  #: processes that are started at a time beside the code lane's, and may take memory beyond the budget
RETRY_S = 30.0  #: after a failed start, or one without room, until a request may cause the next one

log = structlog.get_logger()


class CodeReplicas:
    """See the module. `most`: processes of one archive; `note_free` is told of an archive that has one more."""

    def __init__(self, residents: ResidentModels, loader: ModelBuilder, pulse: Pulse, *, most: int) -> None:
        self._residents, self._loader, self._pulse, self._most = residents, loader, pulse, most
        self.note_free: Callable[[Replicas], None] = _ignore
        self._wanted: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(STARTS, thread_name_prefix="replica")

    def __repr__(self) -> str:
        """For example `<CodeReplicas of 3 scaled archives>`."""
        return f"<CodeReplicas of {len(self._wanted)} scaled archives>"

    def follow_counts(self, models: Mapping[str, int], *, whole: bool) -> None:
        """Have so many processes of these archives, and one of all others; see `server.ipc.operations.SetReplicas`."""
        before = self._wanted
        self._wanted = {} if whole else dict(before)
        self._wanted |= {name: min(count, self._most) for name, count in models.items() if count > 1}
        for name, count in models.items():
            if count <= 1:
                self._wanted.pop(name, None)
        for slot in list(self._residents.children):
            if split_version(slot.model)[0] in {*models, *before}:
                self._follow(slot)

    def follow(self, model: ModelName) -> None:
        """The archive has been loaded: give it as many processes as it should have."""
        slot = self._residents.cache.get(model)
        if slot is not None and self._wanted:
            self._follow(slot)

    async def wait_settled(self, model: ModelName) -> int:
        """Wait until no process of the archive is being started: how many there are. 0 for any other model."""
        slot = self._residents.cache.get(model)
        replicas = self._residents.children.get(slot) if slot is not None else None
        if replicas is None:
            return 0
        await replicas.wait_settled()
        return len(replicas.children)

    def end_surplus(self, slot: Slot, replicas: Replicas) -> None:
        """End the idle ones of too many."""
        if replicas.end_surplus() and self._residents.children.get(slot) is replicas:
            self._residents.recharge(slot, replicas.charge)

    def grow(self, slot: Slot, replicas: Replicas) -> None:
        """Start what is missing, unless that has failed lately."""
        while replicas.is_short and time.monotonic() >= replicas.not_before:
            each = replicas.charge // len(replicas.children)
            if not self._residents.make_room(slot, each * (1 + len(replicas.starts))):
                self._put_off(slot, replicas, f"{each} bytes of memory for one more are not free (model_cache_bytes)")
                return
            replicas.starts.add(self._loop.create_task(self._start(slot, replicas)))

    def close(self) -> None:
        """Start no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _follow(self, slot: Slot) -> None:
        replicas = self._residents.children.get(slot)
        if replicas is None or self._residents.cache.get(slot.model) is not slot:
            return
        replicas.wanted = self._wanted.get(split_version(slot.model)[0], 1)
        replicas.not_before = 0.0  # a client asks anew
        self.end_surplus(slot, replicas)
        self.grow(slot, replicas)

    async def _start(self, slot: Slot, replicas: Replicas) -> None:
        """Start one more, and give it its place."""
        task = asyncio.current_task()
        assert task is not None
        try:
            child = await self._loop.run_in_executor(self._threads, self._load, slot.model, slot.version)
            why = self._place(slot, replicas, child)
            if why is not None:
                child.close()
                await child.wait_gone()
                if why:
                    self._put_off(slot, replicas, why)
        except LoadError as error:
            self._put_off(slot, replicas, str(error))
        except Exception as error:  # a bug of ours must cost one replica, not the worker
            log.exception("replica_failed_unexpectedly", model=slot.model)
            self._put_off(slot, replicas, repr(error))
        finally:
            replicas.starts.discard(task)

    def _place(self, slot: Slot, replicas: Replicas, child: ChildProcess) -> str | None:
        """None if the child has its place. Otherwise why it must go; empty where nobody wants it any more."""
        residents = self._residents
        if residents.children.get(slot) is not replicas or residents.cache.get(slot.model) is not slot:
            return ""
        if len(replicas.children) >= replicas.wanted:
            return ""
        if not residents.make_room(slot, child.charge):
            return f"the {child.charge} bytes of memory that it takes are not free (model_cache_bytes)"
        residents.add_replica(slot, child)
        log.info("replica_started", model=slot.model, pid=child.pid, replicas=len(replicas.children))
        self.note_free(replicas)
        return None

    def _load(self, model: ModelName, version: str) -> ChildProcess:
        """Load the archive once more, on a thread of the lane. Raises LoadError."""
        steps = self._loader.load(model, stale=True)
        with self._pulse.noting(model, "load"):
            built = _run_steps(steps)
        if not isinstance(built.body, ChildProcess):
            raise CodeFailed(f"{model}: the archive that is there now has no code")
        if built.version != version:
            built.body.close()
            raise CodeFailed(f"{model}: {version} is served, and the archive that is there now is {built.version}")
        return built.body

    def _put_off(self, slot: Slot, replicas: Replicas, why: str) -> None:
        replicas.not_before = time.monotonic() + RETRY_S
        there = len(replicas.children)
        log.warning("fewer_replicas", model=slot.model, wanted=replicas.wanted, replicas=there, why=why[:2000])


def _run_steps(steps: LoadSteps) -> LoadedModel:
    """All steps of a load on this thread. Raises LoadError."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            built: LoadedModel = end.value
            return built


def _ignore(_: Replicas) -> None:
    """Nobody waits for a free process."""
