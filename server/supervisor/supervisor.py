"""The supervisor: desired state (settings, pins, which workers are up), operators' requests, merged metrics. No torch.

One process, one event loop. `server.supervisor.children` runs the processes. Each incarnation of a worker listens on a
socket path of its own, so a front can never reach a dead worker's successor by an old name.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, assert_never

import msgspec
import structlog

from model_store.name_table import name_bytes
from model_store.names import ModelName, split_version
from model_store.stores.disk_cache import DiskTier, UnsafeDiskCache
from server.access_log import AccessLog
from server.errors import Situation
from server.host import Host, WorkerPlan, read_host
from server.ipc.control import ControlError
from server.ipc.operations import (
    AccessLogRows,
    AskedByFront,
    AskedByWorker,
    AwaitConnections,
    ConnectWorkers,
    EndTrial,
    Fatal,
    FrontAssignment,
    JoinAsFront,
    JoinAsWorker,
    ListModels,
    ListVersions,
    LoadModel,
    Operation,
    PinModel,
    Ready,
    ReleaseArm,
    ReloadModel,
    Reply,
    ReportOverrun,
    ScrapeMetrics,
    SetQuarantine,
    SetReleases,
    TakeAccessLog,
    TrySuspect,
    UnloadModel,
    UnpinModel,
    WorkerAssignment,
)
from server.ipc.pulse import SUFFIX, PulseReader
from server.ipc.readiness import Readiness, describe_workers, stuck_after_s
from server.metrics import HostMetrics, MergedMetrics
from server.routing import Router
from server.settings import Settings
from server.store_access import open_settings_store
from server.supervisor.children import Child, Children
from server.supervisor.host_files import keep_access_log, keep_disk_cache
from server.supervisor.quarantine import ServerQuarantine
from server.supervisor.release_service import ReleaseService
from server.supervisor.releases import TableUnreadable
from server.supervisor.runtime_folder import RuntimeFolder
from server.supervisor.store_watch import StoreWatch
from server.supervisor.trials import Trials
from server.supervisor.worker_plan import front_cores, plan_workers

SCRAPE_S = 2.0
LOGGED_MODELS = 50  #: of those that ran when a worker died
LIST_S = 2.0  #: how long a list waits for a worker; it then names the worker as unheard
SILENT_WAIT_S = 0.5  #: how long an operation waits for a silent worker, which performs it should it turn again
MAX_PIN_BYTES = 8 * 1024 * 1024  #: of the names of pinned models
FRONTS_END_S = 1.0  #: beyond `drain_s`, for fronts to refuse what is left and end
LOG_END_S = 1.0  #: for the last rows of the access log
WORKERS_END_S = 1.5  #: for workers to end, which then have no requests
LONGEST_END_S = 4.0  #: beyond `drain_s`, after which nothing of the server is left
VERSIONS_PAGE = 500  #: models of one worker whose versions are asked for at a time
CONNECT_S = 5.0  #: how long the start waits for a front to reach the workers that are up

log = structlog.get_logger()


class ModelPage(NamedTuple):
    """Rows by model, whether more follow, and the workers that did not answer: what they hold is not in the rows."""

    rows: list[dict[str, Any]]
    more: bool
    unheard: list[int]


class StartFailed(Exception):
    """The server cannot start with these settings; the message says why."""


class Supervisor:
    """See the module. `start`, then `stop` when it is time; the listeners of `management_api` call the rest."""

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        self.settings = settings
        self.host = host or read_host()
        self.plans = plan_workers(settings, self.host)
        self.pins: set[str] = set(settings.pin)
        self._unlisted = 0  # workers that the last list of versions lacks
        self.workers = [Child("worker", plan.index, plan) for plan in self.plans]
        self.fronts = [Child("front", index) for index in range(settings.fronts)]
        self._children = Children([*self.workers, *self.fronts], self, settings.worker_timeout_s)
        self._homes = Router()  # over all workers, up or not: a pin's home does not wander
        for plan in self.plans:
            self._homes.worker_up(plan.index)
        self._metrics, self._merged = HostMetrics(), MergedMetrics()
        self._folder = RuntimeFolder()
        self._quarantine = ServerQuarantine()
        self._trials = Trials(self._quarantine, self._find_ready, len(self.workers))
        self.releases = ReleaseService(settings, self)
        #: Half of the loader threads are for loads that a request waits for.
        self._watch = StoreWatch(
            self,
            self._metrics,
            settings.revalidate_s,
            max(1, settings.loader_threads // 2),
            polls=settings.watch_store == "on",
        )
        self._watcher: asyncio.Task[None] | None = None
        self._disk_keeper: asyncio.Task[None] | None = None
        self._log_keeper: asyncio.Task[None] | None = None
        self._fronts_gone = asyncio.Event()
        self._listen: socket.socket | None = None

    def __repr__(self) -> str:
        """For example `<Supervisor 2 of 3 workers, 1 of 1 fronts, 4 pins>`."""
        up = [sum(child.ready.is_set() for child in children) for children in (self.workers, self.fronts)]
        workers, fronts = f"{up[0]} of {len(self.workers)} workers", f"{up[1]} of {len(self.fronts)} fronts"
        return f"<Supervisor {workers}, {fronts}, {len(self.pins)} pins>"

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, listen: socket.socket) -> None:
        """Start all children and wait until they are ready. Raises StartFailed when a worker says it never will be."""
        self._listen, access_log = listen, open_access_log(self.settings)
        prepare_disk_cache(self.settings)
        try:
            self.releases.open()
        except TableUnreadable as error:
            raise StartFailed(str(error)) from error
        self._children.start(listen)
        self._disk_keeper = asyncio.create_task(self._keep_disk())
        if access_log is not None:
            keeping = keep_access_log(access_log, self._metrics, self._take_access_log, self._fronts_gone)
            self._log_keeper = asyncio.create_task(keeping)
        ready = asyncio.create_task(self._wait_until_ready())
        tasks: list[asyncio.Future[Any]] = [ready, self._children.fatal]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._children.fatal.done():
            ready.cancel()
            raise StartFailed(self._children.fatal.result())
        self._watcher = asyncio.create_task(self._watch.run(lambda: open_settings_store(self.settings)))

    async def _keep_disk(self) -> None:
        await self.releases.let_go_leftovers()  # before the first sweep, which could do with their room
        await keep_disk_cache(self.settings, self._metrics)

    async def _wait_until_ready(self) -> None:
        """Every child is up, and every front connected to the workers: the first request finds its way."""
        for child in (*self.workers, *self.fronts):
            await child.ready.wait()
        for front in self.fronts:
            with contextlib.suppress(ControlError):  # it has died since, and comes back
                await front.ask(AwaitConnections(), CONNECT_S)

    async def stop(self) -> None:
        """Drain: fronts finish what they hold, then workers end, then all are gone.

        Within `drain_s` + LONGEST_END_S, in which the machine's own delays have a place too.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.drain_s + FRONTS_END_S
        self._children.stop_restarting()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._listen is not None:
            self._listen.close()  # each front closes its own: new connections are refused, not left waiting
        await self._children.end(self.fronts, until - loop.time())
        await self._end_access_log()
        await self._children.end(self.workers, min(WORKERS_END_S, until + WORKERS_END_S - loop.time()))
        await self._children.stop()
        if self._disk_keeper is not None:
            self._disk_keeper.cancel()
            await asyncio.gather(self._disk_keeper, return_exceptions=True)
        self._folder.close()

    async def _end_access_log(self) -> None:
        """Write the last rows while the workers are there to be asked for them."""
        self._fronts_gone.set()
        if self._log_keeper is not None:
            _, late = await asyncio.wait([self._log_keeper], timeout=LOG_END_S)
            for each in late:
                log.warning("access_log_not_ended", why=f"workers or its disk did not answer within {LOG_END_S:g} s")
                each.cancel()

    def end_at_once(self) -> None:
        """Kill all children and remove the folder of their sockets. Nothing is answered."""
        self._children.kill()
        self._folder.close()

    # --- what children ask and what becomes of them (children.Parent) -----------------------------------------------

    async def answer_child(  # noqa: C901 -- one case an operation
        self, child: Child, operation: AskedByFront | AskedByWorker
    ) -> object:
        """Answer a child."""
        match operation:
            case JoinAsFront():
                cores = front_cores(self.host.cores, self.plans)
                return FrontAssignment(self.settings, child.index, cores, len(self.workers))
            case JoinAsWorker():
                return self._worker_assignment(child)
            case Ready():
                if child.kind == "worker":
                    child.pulse = PulseReader(self._pulse(child))
                child.ready.set()
                child.proven = True
                if child.kind == "worker" and child.channel is not None:
                    child.channel.tell(SetQuarantine(self._quarantine.reasons))
                if child.kind == "front" and child.channel is not None:  # before it learns of workers
                    child.channel.tell(SetReleases(self.releases.table.make_routes()))
                self._announce_workers(child)
                if child.kind == "worker":
                    self._trials.note_worker(child.index)
                    await self._replay_pins(child)
                return None
            case ReportOverrun(model, reason):
                self._quarantine.add(model, reason)
                self._announce_quarantine()
                return None
            case TrySuspect(model, for_s, lost):
                return await self._trials.begin(child.name, model, for_s, lost)
            case EndTrial(model, lost):
                waits = 0 <= lost < len(self.workers) and self.workers[lost].ready.is_set()
                self._trials.end(child.name, model, lost if waits else -1)
                return None
            case Fatal(error):
                self._note_failed_start(child, error)
                return None
            case _:
                assert_never(operation)

    def note_end(self, child: Child) -> None:
        """Keep what the incarnation counted, and tell the fronts that it is gone."""
        self._merged.retire(child.name)
        if child.kind == "front":
            self._trials.note_front_end(child.name)
        else:
            self._note_death(child)
        child.pulse = None
        self._announce_workers(child)
        if child.kind == "worker":
            self._trials.note_worker(child.index)

    def _note_death(self, worker: Child) -> None:
        """Blame the models that the worker ran, and log them."""
        code = None if worker.process is None else worker.process.returncode
        running = [] if worker.pulse is None or not code else worker.pulse.running()  # code 0: it was told to end
        if running:
            names = [each.model for each in running]
            log.error("suspects", child=worker.name, models=names[:LOGGED_MODELS], count=len(names))
        from_outside = code == -signal.SIGKILL and not worker.condemned
        if self._quarantine.note_death(running, tried=self._trials.model, from_outside=from_outside):
            self._announce_quarantine()

    def _note_failed_start(self, child: Child, why: str) -> None:
        """Before the server is up its start fails. Later only this child is missing, and is started again and again.

        INVARIANT: a child that has been ready once never ends the others.
        """
        if child.proven:
            log.error("cannot_start", child=child.name, why=why)
        else:
            self._children.set_fatal(why)

    def note_silence(self, child: Child) -> None:
        """Say by `worker_up` whether it is silent. The fronts see it themselves."""
        if child.plan is not None:
            self._metrics.up.labels(*_make_labels(child.plan)).set(child.ready.is_set() and not child.is_silent)
            if not child.is_silent:
                self._trials.note_worker(child.index)

    def note_restart(self, child: Child) -> None:
        """Count a worker's restart."""
        if child.plan is not None:
            self._metrics.restarts.labels(*_make_labels(child.plan)).inc()

    def _worker_assignment(self, worker: Child) -> WorkerAssignment:
        assert worker.plan is not None, "every worker has a plan"
        keyless = self.settings.model_copy(update={"access_keys": {}})
        return WorkerAssignment(
            settings=keyless,
            plan=worker.plan,
            torch_device="cpu" if worker.plan.device == "cpu" else "cuda:0",  # the only GPU that it sees
            socket=self._socket(worker),
            pulse=self._pulse(worker),
        )

    def _socket(self, worker: Child) -> str:
        return self._folder.socket(f"{worker.index}.{worker.incarnation}")

    def _pulse(self, worker: Child) -> str:
        return self._socket(worker) + SUFFIX

    def _find_ready(self) -> set[int]:
        return {worker.index for worker in self.workers if worker.ready.is_set() and not worker.is_silent}

    def _announce_quarantine(self) -> None:
        self._trials.note_quarantine()
        for worker in self.workers:
            if worker.channel is not None and worker.ready.is_set():
                worker.channel.tell(SetQuarantine(self._quarantine.reasons))

    def _announce_workers(self, child: Child) -> None:
        """Tell the fronts which workers are up, after `child` has come up or ended."""
        if child.plan is not None:
            self.note_silence(child)
        sockets = {worker.index: self._socket(worker) for worker in self.workers if worker.ready.is_set()}
        for front in self.fronts:
            if front.channel is not None and front.ready.is_set():
                front.channel.tell(ConnectWorkers(sockets))

    async def _replay_pins(self, worker: Child) -> None:
        """Pins survive a worker's death: the home of a pinned model loads it again."""
        held = [key for model in self.pins for key in self.releases.list_held(model)]
        for model in sorted([*self.pins, *held]):
            if self.home(model) is worker:
                try:
                    await self._ask(worker, PinModel(model))
                except ControlError as error:
                    log.error("pin_failed", model=model, worker=worker.index, error=str(error))  # noqa: TRY400

    async def _take_access_log(self) -> Sequence[AccessLogRows]:
        """The rows that the workers have since the last time. Those of a worker that ends are lost with it."""
        up = [worker for worker in self.workers if worker.ready.is_set()]
        asked = (worker.ask(TakeAccessLog(), self.settings.worker_timeout_s) for worker in up)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, AccessLogRows)]

    # --- what the watch asks (store_watch.Fleet) --------------------------------------------------------------------

    async def list_versions(self) -> dict[ModelName, dict[int, str]]:
        """The version that each worker serves, by model; nothing of workers that do not answer."""
        found: dict[ModelName, dict[int, str]] = {}
        self._unlisted = len(self.workers)
        for worker in self.workers:
            after = ""
            with contextlib.suppress(ControlError):
                while worker.ready.is_set() and not worker.is_silent:
                    page = await self._ask(worker, ListVersions(after, VERSIONS_PAGE), LIST_S)
                    if not page:
                        self._unlisted -= 1
                        break
                    for model, version in page.items():
                        name, held = split_version(ModelName(model))
                        if not held:  # else it follows nothing
                            found.setdefault(name, {})[worker.index] = version
                    after = max(page)
        return found

    def has_listed_all(self) -> bool:
        """Whether the last `list_versions` has what all workers serve."""
        return self._unlisted == 0

    async def reload_at(self, worker: int, model: ModelName) -> str:
        """Have a holder ask the store. The version that serves then. Raises ControlError."""
        return await self._ask(self.workers[worker], ReloadModel(model))

    # --- what the releases ask (release_service.ReleasedFleet) ------------------------------------------------------

    async def serving_versions(self, model: ModelName) -> set[str]:
        """The versions that workers serve now."""
        listed, _ = await self._ask_all(ListModels(prefix=model, after="", limit=1), LIST_S)
        rows = [state for _, states in listed for state in states if state.model == model and state.state == "ready"]
        return {row.version for row in rows if isinstance(row.version, str)}

    async def prove_release(self, model: ModelName, key: ModelName) -> None:
        """Load the model, or one of its versions, at its home, and keep it there where the model is pinned.

        Raises ControlError.
        """
        await self._ask(self.home(key), PinModel(key) if model in self.pins else LoadModel(key))

    async def drop_release(self, key: ModelName) -> None:
        """The version may be evicted, unless an operator has pinned it as well."""
        if key not in self.pins:
            await self._ask_all(UnpinModel(key), LIST_S)

    async def announce_releases(self, routes: dict[str, list[ReleaseArm]]) -> list[int]:
        """Have all fronts follow this table from now on. Those that have not said so in time.

        One that is starting gets it then, and one that is slow as soon as its loop turns.
        """
        ready = [front for front in self.fronts if front.ready.is_set()]
        answers = await asyncio.gather(*(self._tell_releases(front, routes) for front in ready))
        return [front.index for front, heard in zip(ready, answers, strict=True) if not heard]

    async def _tell_releases(self, front: Child, routes: dict[str, list[ReleaseArm]]) -> bool:
        try:
            await front.ask(SetReleases(routes), LIST_S)
        except ControlError as error:
            return error.situation != Situation.DEADLINE  # one that has died gets the table when it is back
        return True

    # --- what operators ask -----------------------------------------------------------------------------------------

    def home(self, model: str) -> Child:
        """The worker that owns the model by rendezvous over all workers."""
        return self.workers[self._homes.order(model)[0]]

    async def load(self, model: ModelName) -> dict[str, Any]:
        """Load the model, or what its name stands for, at home. Raises ControlError with the load's situation."""
        wanted = (self.releases.list_held(model) or [model])[0]
        return {"model": model, "version": await self._ask(self.home(wanted), LoadModel(wanted))}

    async def pin(self, model: ModelName) -> dict[str, Any]:
        """Load the model at home and keep it there, also after the worker's death.

        Raises ControlError with the load's situation, or where too many are pinned.
        """
        if sum(map(name_bytes, self.pins)) + name_bytes(model) > MAX_PIN_BYTES:
            raise ControlError(f"{len(self.pins)} models are pinned already; unpin some", Situation.NO_ROOM)
        version = ""
        for wanted in (model, *self.releases.list_held(model)):
            version = await self._ask(self.home(wanted), PinModel(wanted))
        self.pins.add(model)
        return {"model": model, "version": version, "pinned": True}

    async def unpin(self, model: ModelName) -> dict[str, Any]:
        """Let every worker evict the model again."""
        self.pins.discard(model)
        _, unheard = await self._ask_all(UnpinModel(model))
        for held in self.releases.list_held(model):
            await self.drop_release(held)
        return {"model": model, "pinned": False, **_name_unheard(unheard)}

    async def release(self, model: ModelName) -> dict[str, Any]:
        """Let a model that is in quarantine run again."""
        released = self._quarantine.release(model)
        self._watch.release(model)
        _, unheard = await self._ask_all(SetQuarantine(self._quarantine.reasons))
        return {"model": model, "released": released, **_name_unheard(unheard)}

    async def reload(self, model: ModelName) -> dict[str, Any]:
        """Every holder (without one, the home) asks the store, loads a changed archive beside the old one and swaps."""
        listed, unheard = await self._ask_all(ListModels(prefix=model, after="", limit=1), LIST_S)
        holders = [self.workers[index] for index, states in listed if any(state.model == model for state in states)]
        answers = await asyncio.gather(
            *(self._ask(worker, ReloadModel(model)) for worker in holders or [self.home(model)])
        )
        return {"model": model, "version": answers[0], "holders": len(answers), **_name_unheard(unheard)}

    def tell_changed(self, models: Iterable[ModelName]) -> None:
        """The store says that these archives have changed: their holders reload them. Raises TooManyEvents."""
        self._watch.tell(models)

    async def unload(self, model: ModelName) -> dict[str, Any]:
        """Unload the model everywhere; returns when its memory is free.

        A pinned model stays pinned: its next load is not evicted.
        """
        unloaded_from, silent = set[int](), set[int]()
        for held in (model, *self.releases.list_held(model)):
            gone, unheard = await self._ask_all(UnloadModel(held))
            unloaded_from.update(index for index, was_there in gone if was_there)
            silent.update(unheard)
        return {"model": model, "unloaded_from": sorted(unloaded_from), **_name_unheard(sorted(silent))}

    async def models(self, prefix: str = "", after: str = "", limit: int = 1) -> ModelPage:
        """Models resident, loading, failed, pinned or in quarantine, with their holders.

        The first `limit` by name, of those that have this prefix and come after a name.
        """
        merged: dict[str, dict[str, Any]] = {}
        answers, unheard = await self._ask_all(ListModels(prefix, after, limit + 1), LIST_S)
        for index, states in answers:
            for row in map(msgspec.to_builtins, states):
                model = row.pop("model")
                entry = merged.setdefault(model, {"model": model, "pinned": model in self.pins, "holders": []})
                entry["holders"].append({"worker": index, **row})
        for model in self.pins:
            if model > after and model.startswith(prefix):
                merged.setdefault(model, {"model": model, "pinned": True, "holders": []})
        for model, reason in self._quarantine.reasons.items():
            if model > after and model.startswith(prefix):
                entry = merged.setdefault(model, {"model": model, "pinned": model in self.pins, "holders": []})
                entry |= {"state": "quarantined", "reason": reason}
        return ModelPage([merged[model] for model in sorted(merged)[:limit]], len(merged) > limit, unheard)

    def readiness(self) -> Readiness:
        """What `/ready` says: see `server.ipc.readiness`."""
        up = {worker.index: worker.pulse for worker in self.workers if worker.ready.is_set()}
        return describe_workers(up, len(self.workers), stuck_after_s(self.settings))

    def processes(self) -> list[dict[str, Any]]:
        """Every front and worker: pid, incarnation, whether it is up, and a worker's device, cores and budget."""
        return [
            {
                "kind": child.kind,
                "index": child.index,
                "pid": child.process.pid if child.process is not None else None,
                "incarnation": child.incarnation,
                "up": child.ready.is_set() and not child.is_silent,
                **({"silent_s": round(child.pulse.silent_s, 1)} if child.pulse is not None and child.is_silent else {}),
                **({} if child.plan is None else asdict(child.plan)),
            }
            for child in (*self.workers, *self.fronts)
        ]

    async def metrics(self) -> MergedMetrics:
        """The metrics of all processes, now. A process too busy to answer contributes what it answered last."""
        children = [child for child in (*self.workers, *self.fronts) if child.ready.is_set() and not child.is_silent]
        await asyncio.gather(*(self._scrape(child) for child in children))
        self._merged.update("host", self._metrics.text())
        return self._merged

    async def _scrape(self, child: Child) -> None:
        name = child.name
        with contextlib.suppress(ControlError):
            text = await child.ask(ScrapeMetrics(), SCRAPE_S)
            if name == child.name:  # else it has died meanwhile, and its counters have been kept
                self._merged.update(name, text)

    async def _ask_all(
        self, operation: Operation[Reply], timeout_s: float | None = None
    ) -> tuple[list[tuple[int, Reply]], list[int]]:
        """The replies of all workers that are up, by index, and the workers that have not answered in time.

        A worker that dies meanwhile holds nothing any more. A silent one is waited for only briefly.
        """
        ready = [worker for worker in self.workers if worker.ready.is_set()]
        asked = (self._ask(worker, operation, SILENT_WAIT_S if worker.is_silent else timeout_s) for worker in ready)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found, unheard = [], []
        for worker, answer in zip(ready, answers, strict=True):
            if isinstance(answer, ControlError):
                if answer.situation == Situation.DEADLINE:
                    unheard.append(worker.index)
                elif answer.situation != Situation.WORKER_LOST:
                    raise answer
            elif not isinstance(answer, BaseException):
                found.append((worker.index, answer))
        return found, unheard

    async def _ask(self, worker: Child, operation: Operation[Reply], timeout_s: float | None = None) -> Reply:
        return await worker.ask(operation, timeout_s or self.settings.request_timeout_s + 5)


def prepare_disk_cache(settings: Settings) -> None:
    """Make the disk tier's folders for this user alone. Raises StartFailed when others can write to them."""
    if not settings.disk_cache_bytes:
        return
    try:
        DiskTier(settings.disk_cache, settings.store).prepare()
    except UnsafeDiskCache as error:
        raise StartFailed(str(error)) from error


def open_access_log(settings: Settings) -> AccessLog | None:
    """The access log, where one is wanted. Raises StartFailed when it cannot be written."""
    if settings.access_log is None:
        return None
    try:
        return AccessLog(settings.access_log, int(settings.access_log_bytes))
    except OSError as error:
        raise StartFailed(f"--access-log {settings.access_log}: {error}") from error


def _name_unheard(workers: list[int]) -> dict[str, list[int]]:
    """What an answer says of workers that did not answer in time; nothing where all did."""
    return {"unheard_workers": workers} if workers else {}


def _make_labels(plan: WorkerPlan) -> tuple[str, str]:
    return str(plan.index), plan.device
