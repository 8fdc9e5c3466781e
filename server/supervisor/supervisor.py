"""The supervisor: spawns fronts and workers, restarts, drains, keeps the desired state, merges metrics. No torch.

One process, one event loop. Children are told apart by kind and index; each incarnation of a worker listens on a socket
path of its own, so a front can never reach a dead worker's successor by an old name.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

import server
from model_store.names import ModelName
from model_store.stores.disk_cache import DiskTier
from server.access_log import AccessLog
from server.errors import Situation
from server.host import Host, read_host
from server.ipc.control import Channel, ChannelClosed, ControlError
from server.metrics import HostMetrics, Merged
from server.routing import Router
from server.settings import Settings
from server.supervisor.worker_plan import WorkerPlan, front_cores, plan_workers

BACK_OFF_S = (0.1, 10.0)
STABLE_S = 30.0
MAX_FALSE_STARTS = 3
HEARTBEAT_S = 2.0
SCRAPE_S = 2.0
DISK_SWEEP_S = 5.0
ACCESS_LOG_S = 1.0  #: how often workers are asked for their rows of the access log
LINK_S = 5.0  #: how long the start waits for a front to reach the workers that are up
DISK_REST = 25.0  #: times a sweep's processor time, which grows with the archives on disk, before the next

log = structlog.get_logger()


class StartFailed(Exception):
    """The server cannot start with these settings; the message says why."""


@dataclass(slots=True, eq=False)
class Child:
    """A front or a worker, over all its incarnations."""

    kind: Literal["front", "worker"]
    index: int
    plan: WorkerPlan | None = None
    incarnation: int = 0
    failures: int = 0
    proven: bool = False  #: has been ready at least once
    process: asyncio.subprocess.Process | None = None
    channel: Channel | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """For example `worker-0.2`: kind, index, incarnation."""
        return f"{self.kind}-{self.index}.{self.incarnation}"

    def __repr__(self) -> str:
        """For example `<worker-0.2 ready>`."""
        return f"<{self.name} {'ready' if self.ready.is_set() else 'not ready'}>"


class Supervisor:
    """See the module. `start`, then `stop` when it is time; the listeners of `management_api` call the rest."""

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        self.settings = settings
        self.host = host or read_host()
        self.plans = plan_workers(settings, self.host)
        self.pins: set[str] = set(settings.pin)
        self.workers = [Child("worker", plan.index, plan) for plan in self.plans]
        self.fronts = [Child("front", index) for index in range(settings.fronts)]
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._homes = Router()  # over all workers, up or not: a pin's home does not wander
        for plan in self.plans:
            self._homes.up(plan.index)
        self._metrics, self._merged = HostMetrics(), Merged()
        self._folder = tempfile.TemporaryDirectory(prefix="fleetcast-")
        self._logging: asyncio.Task[None] | None = None
        self._fronts_gone = asyncio.Event()
        self._listen: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def __repr__(self) -> str:
        """For example `<Supervisor 2 of 3 workers, 1 of 1 fronts, 4 pins>`."""
        up = [sum(child.ready.is_set() for child in children) for children in (self.workers, self.fronts)]
        workers, fronts = f"{up[0]} of {len(self.workers)} workers", f"{up[1]} of {len(self.fronts)} fronts"
        return f"<Supervisor {workers}, {fronts}, {len(self.pins)} pins>"

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, listen: socket.socket) -> None:
        """Start all children and wait until they are ready. Raises StartFailed when a worker says it never will be."""
        self._listen, access_log = listen, open_access_log(self.settings)
        children = [*self.workers, *self.fronts]
        self._tasks = [asyncio.create_task(self._keep(child)) for child in children]
        self._tasks += [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._tend_disk())]
        if access_log is not None:
            self._logging = asyncio.create_task(self._keep_log(access_log))
        ready = asyncio.create_task(self._all_ready())
        tasks: list[asyncio.Future[Any]] = [ready, self.fatal]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self.fatal.done():
            ready.cancel()
            raise StartFailed(self.fatal.result())

    async def _all_ready(self) -> None:
        """Every child is up, and every front linked to the workers: the first request finds its way."""
        for child in (*self.workers, *self.fronts):
            await child.ready.wait()
        for front in self.fronts:
            with contextlib.suppress(ControlError, ChannelClosed, TimeoutError):  # it died since, and comes back
                assert front.channel is not None
                await front.channel.ask("linked", timeout_s=LINK_S)

    async def stop(self) -> None:
        """Drain: fronts finish what they hold, then workers, then everyone is gone. At most `drain_s` and a little."""
        self._stopping = True
        if self._listen is not None:
            self._listen.close()  # as each front does with its own: who comes now is refused, not left waiting
        await self._end(self.fronts, self.settings.drain_s + 2)
        self._fronts_gone.set()
        if self._logging is not None:
            await self._logging  # while there is somebody to ask for the last rows
        await self._end(self.workers, 2)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.cleanup()

    async def _end(self, children: Sequence[Child], patience_s: float) -> None:
        for child in children:
            if child.channel is not None:
                child.channel.tell("drain")
                if child.kind == "worker" or not child.ready.is_set():
                    child.channel.close()  # the fronts are gone, or this one has nothing yet: nothing is left to answer
        waits = [asyncio.create_task(child.process.wait()) for child in children if child.process is not None]
        if waits:
            await asyncio.wait(waits, timeout=patience_s)
        for child in children:
            if child.process is not None and child.process.returncode is None:
                log.warning("killed", child=child.name, why="did not end in time")
                child.process.kill()
                await child.process.wait()

    async def _keep(self, child: Child) -> None:
        """Start the child, and again whenever it ends, each time a little later while it keeps failing."""
        while not self._stopping:  # asked again after the pause: nobody is started during a drain
            started = time.monotonic()
            await self._run_once(child)
            if self._stopping or self.fatal.done():
                return
            child.failures = 0 if time.monotonic() - started > STABLE_S else child.failures + 1
            first, longest = BACK_OFF_S
            pause = min(longest, first * 2 ** min(child.failures - 1, 10)) if child.failures > 1 else 0.0
            log.warning("restarting", child=child.name, in_s=round(pause, 2))
            if child.plan is not None:
                self._metrics.restarts.labels(*_labels(child.plan)).inc()
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter

    async def _run_once(self, child: Child) -> None:
        """One incarnation, from spawn to its end."""
        child.incarnation += 1
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno()]
            if child.kind == "front":
                assert self._listen is not None
                fds.append(self._listen.fileno())
            child.process = await asyncio.create_subprocess_exec(
                # -P: the working folder is not on the path, a user's own server/ or handlers/ there is never ours
                sys.executable, "-P", "-m", f"server.{child.kind}.main", *map(str, fds),
                pass_fds=fds, env=self._environment(child), stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        child.channel = await Channel.open(ours, lambda op, args: self._handle(child, op, args))
        served = asyncio.create_task(child.channel.run())
        code = await child.process.wait()
        await served
        if not child.proven and child.incarnation >= MAX_FALSE_STARTS and not self.fatal.done():
            self.fatal.set_result(f"{child.name} ended with code {code} before it was ready, as those before it did")
        child.ready.clear()
        self._merged.buried(child.name)
        if not (self._stopping or self.fatal.done()):
            log.error("ended", child=child.name, code=code)
            self._announce(child)

    def _environment(self, child: Child) -> dict[str, str]:
        """The child's environment: our packages importable wherever we were started, its GPU the only one it sees."""
        root = str(Path(server.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if child.plan is not None:
            env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(child.plan.threads)
            if child.plan.device != "cpu":
                env["CUDA_VISIBLE_DEVICES"] = child.plan.device.removeprefix("cuda:")
        return env

    async def _handle(self, child: Child, op: str, args: dict[str, Any]) -> Any:
        """What children ask and tell."""
        if op == "hello":
            return self._hello(child)
        if op == "ready":
            child.ready.set()
            child.proven = True
            self._announce(child)
            if child.kind == "worker":
                await self._replay_pins(child)
            return None
        if op == "fatal":
            if not self.fatal.done():
                self.fatal.set_result(str(args["error"]))
            return None
        raise ControlError(f"the supervisor knows no operation {op!r}", Situation.INTERNAL)

    def _hello(self, child: Child) -> dict[str, Any]:
        common = {"settings": self.settings.to_wire(), "index": child.index}
        if child.plan is None:
            return {**common, "cores": front_cores(self.host.cores, self.plans)}
        plan = asdict(child.plan) | {"torch_device": "cpu" if child.plan.device == "cpu" else "cuda:0"}
        return {**common, "plan": plan, "socket": self._socket(child)}

    def _socket(self, worker: Child) -> str:
        return f"{self._folder.name}/{worker.index}.{worker.incarnation}"

    def _announce(self, child: Child) -> None:
        """Tell the fronts (all of them, or the one that has just come up) which workers are up."""
        if child.plan is not None:
            self._metrics.up.labels(*_labels(child.plan)).set(child.ready.is_set())
        sockets = {str(worker.index): self._socket(worker) for worker in self.workers if worker.ready.is_set()}
        for front in self.fronts:
            if front.channel is not None and front.ready.is_set():
                front.channel.tell("workers", sockets=sockets)

    async def _replay_pins(self, worker: Child) -> None:
        """Pins survive a worker's death: whoever is home to a pinned model loads it again."""
        for model in sorted(self.pins):
            if self.home(model) is worker:
                try:
                    await self._ask(worker, "pin", model=model)
                except (ControlError, ChannelClosed, TimeoutError) as error:
                    log.error("pin_failed", model=model, worker=worker.index, error=str(error))  # noqa: TRY400

    async def _heartbeat(self) -> None:
        """A child that says nothing for `worker_timeout_s` is killed; `_keep` starts the next one."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await asyncio.gather(*(self._check(child) for child in (*self.workers, *self.fronts)))

    async def _check(self, child: Child) -> None:
        if not child.ready.is_set() or child.channel is None or child.process is None:
            return
        process = child.process
        try:
            await child.channel.ask("ping", timeout_s=self.settings.worker_timeout_s)
        except TimeoutError:
            log.error("killed", child=child.name, why="silent for worker_timeout_s")  # noqa: TRY400
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        except (ControlError, ChannelClosed):
            pass  # starting or ending; its process's end says the rest

    async def _tend_disk(self) -> None:
        """The disk tier's size, and its eviction: the host's, so the supervisor's."""
        budget = int(self.settings.disk_cache_bytes)
        if not budget:
            return
        disk = DiskTier(self.settings.disk_cache, self.settings.store)
        self._metrics.disk_capacity.set(budget)
        while True:
            evicted, used, spent = await asyncio.to_thread(_swept, disk, budget)
            self._metrics.disk_evictions.inc(evicted)
            self._metrics.disk_bytes.set(used)
            await asyncio.sleep(max(DISK_SWEEP_S, DISK_REST * spent))

    async def _keep_log(self, access_log: AccessLog) -> None:
        """The access log: rows are the workers', the files the host's, so the supervisor's. Ends after the fronts."""
        with contextlib.closing(access_log):
            last = False
            while not last:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ACCESS_LOG_S):
                        await self._fronts_gone.wait()
                last = self._fronts_gone.is_set()
                taken = await asyncio.gather(*map(self._arrivals, self.workers))
                rows, count = "".join(rows for rows, _ in taken), sum(count for _, count in taken)
                try:
                    await asyncio.to_thread(access_log.write, rows)
                except OSError as error:
                    self._metrics.not_logged.inc(count)
                    log.warning("access_log_not_written", rows=count, error=str(error))
                else:
                    self._metrics.logged.inc(count)

    async def _arrivals(self, worker: Child) -> tuple[str, int]:
        """The rows that the worker has since the last time, and how many. Of one that ends they are gone with it."""
        if worker.channel is None or not worker.ready.is_set():
            return "", 0
        try:
            rows, count, dropped = await worker.channel.ask("arrivals", timeout_s=self.settings.worker_timeout_s)
        except (ControlError, ChannelClosed, TimeoutError):
            return "", 0
        self._metrics.not_logged.inc(dropped)
        return rows, count

    # --- what operators ask -----------------------------------------------------------------------------------------

    def home(self, model: str) -> Child:
        """The worker that owns the model by rendezvous over all workers."""
        return self.workers[self._homes.order(model)[0]]

    async def load(self, model: ModelName) -> dict[str, Any]:
        """Load at home. Raises ControlError with the load's situation."""
        return {"model": model, "version": await self._ask(self.home(model), "load", model=model)}

    async def pin(self, model: ModelName) -> dict[str, Any]:
        """Load at home and keep it there, also after the worker's death."""
        version = await self._ask(self.home(model), "pin", model=model)
        self.pins.add(model)
        return {"model": model, "version": version, "pinned": True}

    async def unpin(self, model: ModelName) -> dict[str, Any]:
        """Evictable again, on every worker."""
        self.pins.discard(model)
        await self._ask_all("unpin", model=model)
        return {"model": model, "pinned": False}

    async def reload(self, model: ModelName) -> dict[str, Any]:
        """Every holder (without one, the home) asks the store, loads a changed archive beside the old one and swaps."""
        described = await self._ask_all("describe", prefix=model, after="", limit=1)
        holders = [self.workers[index] for index, rows in described if any(row["model"] == model for row in rows)]
        answers = await asyncio.gather(
            *(self._ask(worker, "reload", model=model) for worker in holders or [self.home(model)])
        )
        return {"model": model, "version": answers[0], "holders": len(answers)}

    async def unload(self, model: ModelName) -> dict[str, Any]:
        """Forget it everywhere; answers when its memory is free. A pin then holds for the next load only."""
        gone = await self._ask_all("unload", model=model)
        return {"model": model, "unloaded_from": [index for index, was_there in gone if was_there]}

    async def models(self, prefix: str = "", after: str = "", limit: int = 1) -> tuple[list[dict[str, Any]], bool]:
        """The first `limit` models of a prefix after a name that are resident, loading, failed or pinned, with who
        holds them, by name; and whether there are more.
        """
        merged: dict[str, dict[str, Any]] = {}
        for index, rows in await self._ask_all("describe", prefix=prefix, after=after, limit=limit + 1):
            for row in rows:
                model = row.pop("model")
                entry = merged.setdefault(model, {"model": model, "pinned": model in self.pins, "holders": []})
                entry["holders"].append({"worker": index, **row})
        for model in self.pins:
            if model > after and model.startswith(prefix):
                merged.setdefault(model, {"model": model, "pinned": True, "holders": []})
        return [merged[model] for model in sorted(merged)[:limit]], len(merged) > limit

    def processes(self) -> list[dict[str, Any]]:
        """Every front and worker: pid, incarnation, whether it is up, and a worker's device, cores and budget."""
        return [
            {
                "kind": child.kind,
                "index": child.index,
                "pid": child.process.pid if child.process is not None else None,
                "incarnation": child.incarnation,
                "up": child.ready.is_set(),
                **({} if child.plan is None else asdict(child.plan)),
            }
            for child in (*self.workers, *self.fronts)
        ]

    async def metrics(self) -> Merged:
        """Everybody's counts, now. Who is too busy to say contributes what it said last."""
        children = [child for child in (*self.workers, *self.fronts) if child.ready.is_set()]
        await asyncio.gather(*(self._scrape(child) for child in children))
        self._merged.update("host", self._metrics.text())
        return self._merged

    async def _scrape(self, child: Child) -> None:
        name = child.name
        with contextlib.suppress(ControlError, ChannelClosed, TimeoutError):
            assert child.channel is not None
            text = await child.channel.ask("metrics", timeout_s=SCRAPE_S)
            if name == child.name:  # else it died and was buried meanwhile
                self._merged.update(name, text)

    async def _ask_all(self, op: str, **args: Any) -> list[tuple[int, Any]]:
        """The answers of all workers that are up; one that dies meanwhile holds nothing any more."""
        ready = [worker for worker in self.workers if worker.ready.is_set()]
        answers = await asyncio.gather(*(self._ask(worker, op, **args) for worker in ready), return_exceptions=True)
        found = []
        for worker, answer in zip(ready, answers, strict=True):
            if isinstance(answer, ControlError) and answer.situation != Situation.WORKER_LOST:
                raise answer
            if not isinstance(answer, BaseException):
                found.append((worker.index, answer))
        return found

    async def _ask(self, worker: Child, op: str, **args: Any) -> Any:
        if worker.channel is None or not worker.ready.is_set():
            raise ControlError(f"worker {worker.index} is not up; try again", Situation.NOT_READY)
        try:
            return await worker.channel.ask(op, timeout_s=self.settings.request_timeout_s + 5, **args)
        except ChannelClosed as error:
            raise ControlError(f"worker {worker.index} died meanwhile; try again", Situation.WORKER_LOST) from error
        except TimeoutError as error:
            raise ControlError(f"worker {worker.index} did not answer in time", Situation.DEADLINE) from error


def open_access_log(settings: Settings) -> AccessLog | None:
    """The access log, where one is wanted. Raises StartFailed when it cannot be written."""
    if settings.access_log is None:
        return None
    try:
        return AccessLog(settings.access_log, int(settings.access_log_bytes))
    except OSError as error:
        raise StartFailed(f"--access-log {settings.access_log}: {error}") from error


def _swept(disk: DiskTier, budget: int) -> tuple[int, int, float]:
    """One sweep of the disk tier: how many were evicted, bytes that are left, and processor seconds it took."""
    started = time.thread_time()
    evicted = len(disk.evict(budget))
    return evicted, disk.used_bytes(), time.thread_time() - started


def _labels(plan: WorkerPlan) -> tuple[str, str]:
    return str(plan.index), plan.device
