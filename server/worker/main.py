"""A worker process: its main, its intake from the fronts, and what the supervisor may ask of it.

One event loop thread runs everything but loads: frames come in, `server.worker.step_loop` runs batches, answers go out.
Started by the supervisor as `python -m server.worker.main FD` with one end of the control channel.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import msgspec
import structlog
import torch
import uvloop

from model_store.cache.cache import Cache
from model_store.cache.eviction import policy_named
from model_store.errors import LoadError
from model_store.names import parse_model_name
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from server.access_log import Arrivals
from server.errors import Refused, Situation, situation_of
from server.ipc import frames as wire
from server.ipc.control import ControlError, Member
from server.logs import STANDARD_ERROR, configure_logs
from server.metrics import WorkerMetrics
from server.settings import Settings
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cpu import Engine
from server.worker.engine.device import CudaDevice, cache_share
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import Shelf
from server.worker.model_loader import Loader, open_store
from server.worker.prefetch.prefetcher import Foresight
from server.worker.scheduler import FEW, Job, Scheduler
from server.worker.step_loop import StepLoop

log = structlog.get_logger()


class Intake(asyncio.Protocol):
    """One front's connection: frames in, jobs to the step loop, answers and credits out."""

    def __init__(self, steps: StepLoop, max_body_bytes: int) -> None:
        self._steps = steps
        self._max_body_bytes = max_body_bytes
        self._reader = wire.Reader()
        self._inbox = wire.Inbox()
        self._outbox = wire.Outbox()
        self._jobs: dict[int, Job] = {}
        self._frames: list[bytes] = []
        self._paused = False
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        """For example `<Intake 12 jobs, 1 bodies in, <Outbox ...>>`."""
        return f"<Intake {len(self._jobs)} jobs, {len(self._inbox)} bodies in, {self._outbox!r}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A front is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        """The front is gone, and with it whoever waited through it."""
        del exc
        for job in self._jobs.values():
            self._steps.cancel(job)
        self._jobs.clear()

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many frames."""
        try:
            for frame in self._reader.feed(data):
                self._receive(frame)
        except wire.WireError as error:
            log.error("bad_frame", error=str(error))  # noqa: TRY400 -- the peer's fault has no traceback of ours
            self._transport.abort()

    def pause_writing(self) -> None:
        """The front reads slower than we write: large bodies wait."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        self._send_chunks()

    def _receive(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Request):
            if frame.body_bytes == len(frame.body):
                self._submit(frame)
            elif frame.body_bytes <= self._max_body_bytes:
                self._inbox.start(frame)
            else:
                raise wire.WireError(f"a body of {frame.body_bytes} bytes is more than {self._max_body_bytes}")
        elif isinstance(frame, wire.Data):
            if self._inbox.knows(frame.id):
                self._write(wire.pack(wire.Credit(frame.id, len(frame.body))))
            whole = self._inbox.add(frame)
            if whole is not None:
                self._submit(whole)
        elif isinstance(frame, wire.Credit):
            self._outbox.credit(frame.id, frame.room)
            self._send_chunks()
        elif isinstance(frame, wire.Cancel):
            self._cancel(frame.id)

    def _submit(self, request: wire.Request) -> None:
        job = self._steps.submit(request, self)
        if not job.done:
            self._jobs[request.id] = job

    def _cancel(self, ident: int) -> None:
        self._inbox.drop(ident)
        self._outbox.drop(ident)
        job = self._jobs.pop(ident, None)
        if job is not None:
            self._steps.cancel(job)

    # --- answers (step_loop.Origin) ---------------------------------------------------------------------------------

    def answer(self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float) -> None:
        """Send a job's answer."""
        times = (int(queue_s * 1e6), int(job.load_s * 1e6), int(inference_s * 1e6))
        version = job.slot.version if job.slot is not None else ""
        self._respond(job, Situation.OK, version, content_type, times, body)

    def refuse(self, job: Job, refused: Refused) -> None:
        """Send why there is no answer."""
        version = job.slot.version if job.slot is not None else ""
        times = (0, int(job.load_s * 1e6), 0)
        self._respond(job, refused.situation, version, "application/json", times, msgspec.json.encode(refused.detail))

    def _respond(
        self, job: Job, situation: Situation, version: str, kind: str, times: tuple[int, int, int], body: bytes
    ) -> None:
        ident = job.request.id
        self._jobs.pop(ident, None)
        first = self._outbox.start(ident, body)
        fixed = (ident, situation, job.cache, job.tier, version, kind)
        self._write(wire.pack(wire.Response(*fixed, *times, len(body), first)))
        if len(first) < len(body):
            self._send_chunks()

    def _write(self, frame: bytes) -> None:
        """Frames of one step leave in one write."""
        if not self._frames:
            self._loop.call_soon(self._flush)
        self._frames.append(frame)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._frames))
        self._frames.clear()

    def _send_chunks(self) -> None:
        while not self._paused and (chunk := self._outbox.chunk()) is not None:
            self._write(chunk)


class Worker:
    """What the supervisor may ask: operations by name. Every answer is plain JSON."""

    def __init__(self, steps: StepLoop, arrivals: Arrivals | None) -> None:
        self._steps, self._arrivals = steps, arrivals
        self._ops: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "reload": self._reload,
            "unload": self._unload,
            "pin": self._pin,
            "unpin": self._unpin,
            "describe": self._describe,
            "metrics": self._metrics,
            "arrivals": self._take_arrivals,
            "ping": self._ping,
            "drain": self._drain,
        }

    async def handle(self, op: str, args: dict[str, Any]) -> Any:
        """One operation. A failed load is answered with its situation."""
        try:
            return await self._ops[op](**args)
        except LoadError as error:
            raise ControlError(str(error), situation_of(error)) from error

    async def _load(self, model: str) -> str:
        return await self._steps.load(parse_model_name(model))

    async def _reload(self, model: str) -> str:
        return await self._steps.load(parse_model_name(model), revalidate=True)

    async def _unload(self, model: str) -> bool:
        return await self._steps.unload(parse_model_name(model))

    async def _pin(self, model: str) -> str:
        """Pinned only once it is here: a name that cannot be loaded pins nothing."""
        name = parse_model_name(model)
        version = await self._steps.load(name)
        self._steps.pin(name)
        return version

    async def _unpin(self, model: str) -> None:
        self._steps.unpin(parse_model_name(model))

    async def _describe(self, prefix: str, after: str, limit: int) -> list[dict[str, Any]]:
        return self._steps.describe(prefix, after, limit)

    async def _metrics(self) -> str:
        return self._steps.exposition()

    async def _take_arrivals(self) -> tuple[str, int, int]:
        """As of `server.access_log.Arrivals.take`."""
        return ("", 0, 0) if self._arrivals is None else self._arrivals.take()

    async def _ping(self) -> str:
        return repr(self._steps)

    async def _drain(self) -> None:
        await self._steps.drain()


def build_steps(settings: Settings, plan: dict[str, Any], arrivals: Arrivals | None = None) -> StepLoop:
    """The worker's parts, put together. Raises LoadError or ValueError for settings that cannot work."""
    where = torch.device(plan["torch_device"])
    engine, budget, memory = open_memory(settings, plan, where)
    source, limits = open_store(settings)
    disk = DiskTier(settings.disk_cache, source.url) if settings.disk_cache_bytes else None
    store = ModelStore(source, disk, limits, settings.revalidate_s)
    cache = Cache(budget, int(settings.slab_bytes), policy=policy_named(settings.eviction_policy))
    metrics = WorkerMetrics(int(plan["index"]), str(plan["device"]), settings.metrics_per_model)
    few = FEW if where.type == "cpu" else settings.max_batch_rows  # a GPU's step costs launches, rows next to nothing
    ahead = max(1, settings.loader_threads // 2)  # the others are for loads that somebody waits for
    return StepLoop(
        cache,
        Scheduler(settings.queue_per_model, settings.queue_per_worker, few),
        engine,
        Loader(store, where.type, int(plan["threads"])),
        metrics,
        shelf=Shelf(memory, settings.revalidate_s),
        batch=settings.max_batch_rows,
        loader_threads=settings.loader_threads,
        patience_s=settings.request_timeout_s,
        foresight=Foresight(cache, metrics, ahead) if settings.prefetch == "on" else None,
        arrivals=arrivals,
    )


def open_memory(
    settings: Settings, plan: dict[str, Any], where: torch.device
) -> tuple[Engine | DeviceEngine, int, torch.Tensor]:
    """The engine with its pool, the pool's bytes, and the memory of the host tier [floats].

    Raises ValueError when the device has no room for them.
    """
    budget, rows = int(plan["budget_bytes"]), settings.max_batch_rows
    if where.type == "cpu":
        return Engine(Pool(budget, where), rows), budget, torch.empty(int(plan["host_bytes"]) // 4)
    device = CudaDevice(where, settings.precision)
    free = device.free_and_total()
    budget = budget or cache_share(free, int(settings.gpu_reserve_bytes), int(plan["sharers"]))
    if budget < settings.slab_bytes:
        raise ValueError(
            f"{plan['device']} has {free[0]} of {free[1]} bytes free; without gpu_reserve_bytes "
            f"{int(settings.gpu_reserve_bytes)} and for {plan['sharers']} workers that is {budget} each, less than one "
            f"slab (slab_bytes)"
        )
    try:
        pool = DevicePool(budget, device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{plan['device']} has {free[0]} bytes free, but {budget} are to be for models: lower model_cache_bytes "
            f"or raise gpu_reserve_bytes: {error}"
        ) from error
    engine = DeviceEngine(pool, rows, bf16=settings.precision == "bf16")
    return engine, budget, device.host(int(plan["host_bytes"]) // 4)


async def main(control_fd: int) -> None:
    """Ask the supervisor who we are, get ready, serve until it closes the channel."""
    member = Member()
    hello = await member.join(control_fd)
    if hello is None:
        return
    settings, plan = Settings.from_wire(hello["settings"]), hello["plan"]
    configure_logs(settings.log_level, settings.log_format, worker=plan["index"])
    pin_process(plan)
    arrivals = Arrivals() if settings.access_log else None
    try:
        steps = build_steps(settings, plan, arrivals)
    except (LoadError, ValueError, OSError) as error:
        await member.channel.ask("fatal", timeout_s=5, error=str(error))
        return
    loop = asyncio.get_running_loop()
    limit = int(settings.max_body_bytes)
    server = await loop.create_unix_server(lambda: Intake(steps, limit), hello["socket"])
    member.ready(Worker(steps, arrivals).handle)
    await member.released
    server.close()  # the steps stay open: a request may still come while the process ends


def pin_process(plan: dict[str, Any]) -> None:
    """This process's cores and threads, as the supervisor planned them."""
    os.sched_setaffinity(0, plan["cores"])
    torch.set_num_threads(int(plan["threads"]))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
    STANDARD_ERROR.flush()
    # Loader threads may hang in a store request; nobody waits for them any more.
    os._exit(0)
