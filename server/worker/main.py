"""A worker process: its parts are put together here, and it serves until the supervisor lets it go.

One event loop thread runs everything but loads: `server.worker.front_connection` receives requests and sends answers,
`server.worker.step_loop` runs batches. Started as `python -m server.worker.main FD ROWS` with one end of the
control channel, and descriptors of memory for rows.
"""

import asyncio
import gc
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence

import structlog
import torch
import uvloop

from model_store.cache.cache import Cache
from model_store.cache.eviction import make_policy
from model_store.errors import LoadError
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from server.access_log import ArrivalBuffer
from server.contract import MIB
from server.freed_memory import keep_freed_memory
from server.host import WorkerPlan
from server.ipc.control import JOIN_S, ChildChannel
from server.ipc.frames import CHUNK
from server.ipc.lends import listen_for_lends
from server.ipc.operations import AskedOfWorker, Fatal, JoinAsWorker, ReportOverrun, WorkerAssignment
from server.ipc.pulse import Pulse
from server.ipc.sockets import listen_at
from server.logs import STANDARD_ERROR, configure_logs
from server.metrics import WorkerMetrics
from server.settings import Settings
from server.worker.adaptive_bands import AdaptiveBands
from server.worker.archive_facts import ArchiveReader
from server.worker.archive_store import open_store
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cpu import Engine
from server.worker.engine.cuda_start import check_build, explain_host_memory, explain_start
from server.worker.engine.device import CudaDevice
from server.worker.engine.device_budget import FORWARD_BYTES, choose_budget
from server.worker.engine.memory_pool import Pool
from server.worker.engine.self_check import check_device, check_onnx
from server.worker.front_connection import FrontConnection
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LongJobs
from server.worker.management import Management
from server.worker.model_loader import ModelLoader, target_of
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.sandbox.code_host import CodeHost, CodePolicy
from server.worker.scheduler import FEW, Scheduler
from server.worker.step_loop import StepLoop
from server.worker.store_probe import StoreProbe
from server.worker.survivors.surviving_rows import SurvivingRows, describe_no_row, describe_row
from server.worker.version_keeper import VersionKeeper

ASKS_PER_THREAD = 8  #: requests to the store for each loader thread, which a request keeps busy for a millisecond

#: So many objects that are made and not gone yet have the garbage collector look at them. With Python's 700 it looked
#: seven times in each call for 1,000 models, which leaves nothing behind, and now and then at all the models' parts.
NEW_OBJECTS = 10_000
KEPT_BYTES, LARGE_BYTES = 16 * MIB, 32 * MIB  #: of freed memory, see `server.freed_memory`

log = structlog.get_logger()


def open_archives(settings: Settings) -> ModelStore:
    """The store with this host's disk in front of it. Raises LoadError or ValueError."""
    source, limits = open_store(settings)
    disk = DiskTier(settings.disk_cache, source.url) if settings.disk_cache_bytes else None
    return ModelStore(source, disk, limits, settings.revalidate_s)


def build_steps(
    settings: Settings,
    plan: WorkerPlan,
    where: torch.device,
    arrivals: ArrivalBuffer | None,
    pulse: Pulse,
    store: ModelStore,
    code: CodeHost | None,
    bands: AdaptiveBands | None = None,
    survivors: SurvivingRows | None = None,
) -> StepLoop:
    """The worker's parts, put together. Raises LoadError or ValueError for settings that cannot work."""
    engine, budget, memory = open_memory(settings, plan, where, None if survivors is None else survivors.pool)
    cache = Cache(budget, int(settings.slab_bytes), policy=make_policy(settings.eviction_policy))
    metrics = WorkerMetrics(plan.index, plan.device, settings.metrics_per_model)
    measures = (engine.measure,) if isinstance(engine, DeviceEngine) else ()
    few = FEW if where.type == "cpu" else settings.max_batch_rows  # a GPU's step costs launches, rows next to nothing
    ahead = max(1, settings.loader_threads // 2)  # the others are for loads that a request waits for
    return StepLoop(
        cache,
        Scheduler(settings.queue_per_model, settings.queue_per_worker, few),
        engine,
        ModelLoader(
            store,
            target_of(settings, where.type, plan.threads),
            *measures,
            code=code,
            describe_row=describe_row if survivors else describe_no_row,
            threads=settings.loader_threads,
        ),
        metrics,
        shelf=HostCache(memory, settings.revalidate_s),
        long=LongJobs(asyncio.get_running_loop(), pulse),
        batch=settings.max_batch_rows,
        loader_threads=settings.loader_threads,
        store_requests=settings.store_requests or ASKS_PER_THREAD * settings.loader_threads,
        patience_s=settings.request_timeout_s,
        foresight=Prefetcher(cache, metrics, ahead) if settings.prefetch == "on" else None,
        arrivals=arrivals,
        health=store.health,
        probe=StoreProbe(store.probe, store.health),
        note_served=VersionKeeper(store).note,
        code=code,
        bands=bands,
    )


def open_code(settings: Settings, plan: WorkerPlan) -> CodeHost | None:
    """What runs code archives, its template under way; None where none may run. Raises ValueError, OSError."""
    if not settings.allow_code:
        return None
    cores = frozenset(os.sched_getaffinity(os.getppid()))  # the supervisor has all that the server may use
    host = CodeHost(CodePolicy.of(settings, plan, cores))
    host.warm()
    return host


def open_memory(
    settings: Settings, plan: WorkerPlan, where: torch.device, outliving: mmap.mmap | None = None
) -> tuple[Engine | DeviceEngine, int, torch.Tensor]:
    """The engine with its pool, the pool's bytes, and the memory of the host tier [floats].

    `outliving`: the pool's memory where it outlives this process, which no GPU's does.

    Raises ValueError when the device cannot be used or has no room for them.
    """
    rows = settings.max_batch_rows
    if where.type == "cpu":
        on_cpu = Engine(Pool(plan.budget_bytes, where, outliving), rows)
        return on_cpu, plan.budget_bytes, torch.empty(plan.host_bytes // 4)
    device, memory = open_device(settings, plan, where)
    budget = plan_device_memory(settings, plan, memory)
    try:
        pool = DevicePool(budget, device)
    except torch.OutOfMemoryError as error:
        free, total = device.free_and_total()
        raise ValueError(
            f"{plan.device} has {free} of {total} bytes free now, but {budget} are to be for the models of one of its "
            f"{plan.sharers} worker(s): end other programs on this GPU, or set model_cache_bytes to less: {error}"
        ) from error
    engine = DeviceEngine(pool, rows, bf16=settings.precision == "bf16")
    with explain_host_memory(plan.host_bytes):
        shelf = device.host(plan.host_bytes // 4)
    return engine, budget, shelf


def plan_device_memory(settings: Settings, plan: WorkerPlan, free_and_total: tuple[int, int]) -> int:
    """Bytes of the worker's GPU for models. Raises NoBudget with the numbers where its settings do not fit."""
    reserve = int(settings.gpu_reserve_bytes)
    budget = choose_budget(
        plan.device, plan.budget_bytes, int(settings.slab_bytes), free_and_total, reserve, plan.sharers
    )
    sessions = 0 if settings.onnx_device == "cpu" else int(settings.max_session_bytes)
    numbers = {"reserve_bytes": reserve, "forwards_may_take": FORWARD_BYTES + sessions}
    log.info("gpu_memory", device=plan.device, sharers=plan.sharers, models_bytes=budget, **numbers)
    if numbers["forwards_may_take"] > reserve:
        log.warning("gpu_reserve_small", then="large families may be refused for want of memory", **numbers)
    return budget


def open_device(settings: Settings, plan: WorkerPlan, where: torch.device) -> tuple[CudaDevice, tuple[int, int]]:
    """The worker's GPU, checked, with its free and total bytes. Raises CannotStart."""
    check_build(plan.device, torch.__version__, torch.version.cuda)
    with explain_start(plan.device):
        device = CudaDevice(where, settings.precision)
        check_device(device, settings.precision)
        check_onnx("cpu" if settings.onnx_device == "cpu" else "cuda", target_of(settings, where.type, 1).sessions)
        return device, device.free_and_total()


def open_survivors(assignment: WorkerAssignment) -> SurvivingRows | None:
    """The rows that an earlier worker has left, and that outlive this one; None where there is no memory for that."""
    settings, plan = assignment.settings, assignment.plan
    if assignment.rows < 0:
        return None
    try:
        return SurvivingRows(
            assignment.rows, plan, int(settings.slab_bytes), target_of(settings, plan.device, plan.threads)
        )
    except (OSError, ValueError) as error:
        log.warning("rows_die_with_their_worker", why=str(error))
        return None


async def main(control_fd: int, inherited: Sequence[int], patience_s: float = JOIN_S) -> None:
    """Get an assignment from the supervisor, get ready, serve until it closes the channel.

    `patience_s`: how long the supervisor may take to say what this process is to be. `inherited`: descriptors of memory
    for rows. INVARIANT: no child of this process inherits them, or it could read and write the rows of all models.
    """
    for descriptor in inherited:
        os.set_inheritable(descriptor, False)
    member = ChildChannel(AskedOfWorker)
    assignment = await member.join(control_fd, JoinAsWorker(), orphaned=signal.SIGKILL, patience_s=patience_s)
    if assignment is None:
        return
    stages = StartStages()
    settings, plan = assignment.settings, assignment.plan
    configure_logs(settings.log_level, settings.log_format, worker=plan.index)
    pin_process(plan)
    arrivals = ArrivalBuffer() if settings.access_log else None
    bands = AdaptiveBands() if settings.actuals else None
    try:
        pulse = Pulse(assignment.pulse)
        store = open_archives(settings)
        stages.note("store")
        code = open_code(settings, plan)
        survivors = open_survivors(assignment)
        stages.note("map_rows")
        for descriptor in inherited:
            os.close(descriptor)  # what it maps stays mapped
        where = torch.device(assignment.torch_device)
        steps = build_steps(settings, plan, where, arrivals, pulse, store, code, bands, survivors)
        stages.note("build")
        if survivors is not None:
            steps.adopt(survivors, frozenset(assignment.distrusted), trusts=assignment.trusts_rows)
        stages.note("adopt")
    except (LoadError, ValueError, OSError) as error:
        await member.channel.ask(Fatal(str(error)), timeout_s=5)
        return
    steps.quarantine.report = lambda model, why: member.channel.tell(ReportOverrun(model, why))
    limit, unsent = largest_body(settings), int(settings.max_inflight_bytes)
    lent = None if code is None else steps.lent
    lends = None if lent is None else listen_for_lends(assignment.socket, lent.accept)
    listening = await listen_at(
        lambda: FrontConnection(steps, limit, unsent, lent), assignment.socket, made_anew=pulse.link
    )
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    member.serve(Management(steps, arrivals, ArchiveReader(store), code, settings.request_timeout_s, bands).handle)
    stages.note("listen")
    log.info("worker_ready", stages_ms=stages.spent_ms)
    await member.released
    if lends is not None:
        asyncio.get_running_loop().remove_reader(lends.fileno())
        lends.close()
    listening.cancel()  # the steps stay open: a request may still come while the process ends


class StartStages:
    """How long each stage of this worker's start took, from when it learnt what it is to be."""

    def __init__(self) -> None:
        self.spent_ms: dict[str, float] = {}
        self._since = time.monotonic()

    def __repr__(self) -> str:
        """For example `<StartStages store 1.2, adopt 20.1>`."""
        return f"<StartStages {', '.join(f'{stage} {spent}' for stage, spent in self.spent_ms.items())}>"

    def note(self, stage: str) -> None:
        """The stage has ended just now."""
        now = time.monotonic()
        self.spent_ms[stage], self._since = round((now - self._since) * 1e3, 1), now


def pin_process(plan: WorkerPlan) -> None:
    """Keep this process on the cores and threads that the supervisor planned for it."""
    os.sched_setaffinity(0, plan.cores)
    torch.set_num_threads(plan.threads)


def largest_body(settings: Settings) -> int:
    """The bytes of the largest request that a front sends.

    A call for joint scenarios is answered by one request to the correlation's archive, which holds the answers of all
    items (`max_forecasts_bytes` at most) and their names (from a body of as much at most).
    """
    return max(int(settings.max_body_bytes), 2 * int(settings.max_forecasts_bytes)) + CHUNK


if __name__ == "__main__":
    keep_freed_memory(KEPT_BYTES, LARGE_BYTES)
    uvloop.run(main(int(sys.argv[1]), list(map(int, sys.argv[2:]))))
    STANDARD_ERROR.flush()
    # Loader threads may hang in a store request: do not wait for them.
    os._exit(0)
