"""The supervisor: the server's life from its start to its end, what children ask, and merged metrics. No torch.

One process, one event loop. It puts the other parts together: `children` runs the processes, `fleet_operations` carries
out what operators ask, `store_watch` has resident models follow the store, `releases` has rollbacks and aliases, and
`pins`, `quarantine` and `trials` remember. Each incarnation of a worker listens on a socket path of its own, so a front
can never reach a dead worker's successor by an old name.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, assert_never

import structlog

from model_store.names import parse_model_name
from server.errors import Situation
from server.host import Host, WorkerPlan, read_host
from server.ipc.control import ControlError
from server.ipc.operations import (
    AskedByFront,
    AskedByWorker,
    AwaitConnections,
    CallManagement,
    ConnectWorkers,
    DescribeNode,
    EndTrial,
    Exemplar,
    Fatal,
    FrontAssignment,
    JoinAsFront,
    JoinAsWorker,
    ListExemplars,
    ListKnownModels,
    LoadForClient,
    ManageModels,
    Ready,
    RecordActuals,
    ReportOverrun,
    ScrapeMetrics,
    SetBatching,
    SetQuarantine,
    SetRegistrations,
    SetReleases,
    SetReplicas,
    TrySuspect,
    UnloadForClient,
    WorkerAssignment,
)
from server.ipc.pulse import SUFFIX, PulseReader
from server.ipc.readiness import Readiness, describe_workers, stuck_after_s
from server.ipc.row_memory import create_row_memory
from server.metrics import HostMetrics, MergedMetrics
from server.sagemaker_container.environment import MULTI_MODEL
from server.sdk import __version__
from server.settings import Settings
from server.store_access import open_settings_store
from server.supervisor.access_control import App
from server.supervisor.actuals.journal import JournalUnreadable
from server.supervisor.actuals.market_metrics import MarketFamilies
from server.supervisor.actuals.rollout import ActualsRollout, greet_worker
from server.supervisor.actuals.service import ActualsService
from server.supervisor.arrival_collector import ArrivalCollector
from server.supervisor.children import Child, Children
from server.supervisor.cluster_view import ClusterView
from server.supervisor.fleet_operations import FleetOperations
from server.supervisor.host_files import (
    StartFailed,
    keep_access_log,
    keep_disk_cache,
    open_access_log,
    prepare_disk_cache,
)
from server.supervisor.host_measures import HostMeasures
from server.supervisor.management_calls import call_management
from server.supervisor.model_server_api.mms import MultiModelApi
from server.supervisor.model_server_api.startup_models import register_startup_models
from server.supervisor.pins import PinnedModels
from server.supervisor.quarantine import ServerQuarantine
from server.supervisor.registrations.rollout import RegistrationRollout
from server.supervisor.registrations.service import RegistrationService
from server.supervisor.releases.rollout import ReleaseRollout
from server.supervisor.releases.service import ReleaseService
from server.supervisor.releases.table import TableUnreadable
from server.supervisor.runtime_folder import RuntimeFolder
from server.supervisor.store_watch.resident_versions import ResidentVersions
from server.supervisor.store_watch.watch import StoreWatch
from server.supervisor.trials import Trials
from server.supervisor.worker_plan import front_cores, plan_workers
from server.supervisor.workers import Workers

SCRAPE_S = 2.0
LOGGED_MODELS = 50  #: of those that ran when a worker died
OPERATION_S = 5.0  #: beyond `request_timeout_s`, for a worker to do what an operator asks
FRONTS_END_S = 1.0  #: beyond `drain_s`, for fronts to refuse what is left and end
LOG_END_S = 1.0  #: for the last rows of the access log
ACTUALS_END_S = 0.5  #: for the last forecasts to be kept
WORKERS_END_S = 1.5  #: for workers to end, which then have no requests
MOST_OWN_DEATHS = 3  #: of a worker in a row, after which the next one begins with empty memory
LONGEST_END_S = 4.0  #: beyond `drain_s`, after which nothing of the server is left
CONNECT_S = 5.0  #: how long the start waits for a front to reach the workers that are up

log = structlog.get_logger()


class Supervisor:
    """See the module. `start`, then `stop` when it is time; the listeners of `management_api` call the rest."""

    def __init__(self, settings: Settings, host: Host | None = None, grpc: Mapping[str, str] | None = None) -> None:
        """`grpc`: the addresses at which a gRPC front listens, by the services there; none: there is no such front."""
        self.settings = settings
        self.host = host or read_host()
        self.plans = plan_workers(settings, self.host)
        workers = [Child("worker", plan.index, plan) for plan in self.plans]
        self.workers = Workers(workers, settings.request_timeout_s + OPERATION_S)
        writes = bool(settings.async_output)
        self.fronts = [Child("front", index, has_output=writes) for index in range(settings.fronts)]
        if grpc:
            self.fronts.append(Child("front", settings.fronts, grpc=grpc))
        on_cpu = [worker for worker in workers if worker.plan is not None and worker.plan.device == "cpu"]
        spare_for = on_cpu[0] if on_cpu and settings.spare_worker == "on" else None
        self._children = Children([*self.workers, *self.fronts], self, settings.worker_timeout_s, spare_for=spare_for)
        self._metrics, self._merged = HostMetrics(__version__), MergedMetrics()
        files = {name: getattr(settings, name) for name in ("tls_certificate", "tls_client_ca")}
        self._measures = HostMeasures({name: path for name, path in files.items() if path is not None})
        self._metrics.registry.register(self._measures)
        self._show_workers()
        for worker in on_cpu if settings.keep_rows == "on" else ():
            assert worker.plan is not None, "every worker has a plan"
            worker.rows = create_row_memory(worker.index, worker.plan.budget_bytes)
        self._folder = RuntimeFolder()
        self._quarantine, self._pins = ServerQuarantine(), PinnedModels(settings.pin)
        self._trials = Trials(self._quarantine, self.workers.find_ready, len(self.workers))
        self.releases = ReleaseService(settings, ReleaseRollout(self.workers, self.fronts, self._pins))
        fleet = RegistrationRollout(self.workers, self.fronts, self._pins)
        self.registrations = RegistrationService(settings.store, fleet)
        self.multi_model_api = MultiModelApi(self.registrations, settings)
        self.actuals = ActualsService(settings, ActualsRollout(self.workers))
        if self.actuals.is_on:
            self._metrics.registry.register(MarketFamilies(self.actuals))
        self._watch = StoreWatch(
            ResidentVersions(self.workers),
            self._metrics,
            settings.revalidate_s,
            max(1, settings.loader_threads // 2),  # the others are for loads that a request waits for
            polls=settings.watch_store == "on",
        )
        self.operations = FleetOperations(self.workers, self._pins, self.releases, self._quarantine, self._watch)
        self._watcher: asyncio.Task[None] | None = None
        self._disk_keeper: asyncio.Task[None] | None = None
        self._actuals_keeper: asyncio.Task[None] | None = None
        self._log_keeper: asyncio.Task[None] | None = None
        self._fronts_gone = asyncio.Event()
        self._listen: Sequence[socket.socket] = ()
        self.cluster: ClusterView | None = None  #: what the management listener shows of the nodes
        self.management: App | None = None  #: the management API with its checks, for calls that come by gRPC

    def __repr__(self) -> str:
        """For example `<Supervisor 2 of 3 workers, 1 of 1 fronts, 4 pins>`."""
        up = [sum(child.ready.is_set() for child in children) for children in (self.workers, self.fronts)]
        workers, fronts = f"{up[0]} of {len(self.workers)} workers", f"{up[1]} of {len(self.fronts)} fronts"
        return f"<Supervisor {workers}, {fronts}, {len(self._pins)} pins>"

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, *listen: socket.socket) -> None:
        """Start all children and wait until they are ready. Raises StartFailed when a worker says it never will be.

        `listen`: the inference listener's socket, and in a cluster the one for other nodes.
        """
        self._listen, access_log = listen, open_access_log(self.settings)
        prepare_disk_cache(self.settings)
        try:
            self.releases.open()
            await asyncio.to_thread(self.actuals.open)
        except (TableUnreadable, JournalUnreadable) as error:
            raise StartFailed(str(error)) from error
        self._children.start(listen)
        self._actuals_keeper = asyncio.create_task(self.actuals.keep())
        self._disk_keeper = asyncio.create_task(self._keep_disk())
        if access_log is not None:
            keeping = keep_access_log(access_log, self._metrics, ArrivalCollector(self.workers).take, self._fronts_gone)
            self._log_keeper = asyncio.create_task(keeping)
        ready = asyncio.create_task(self._wait_until_ready())
        tasks: list[asyncio.Future[Any]] = [ready, self._children.fatal]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._children.fatal.done():
            ready.cancel()
            raise StartFailed(self._children.fatal.result())
        await register_startup_models(self.registrations, self.settings)
        self._watcher = asyncio.create_task(self._watch.run(lambda: open_settings_store(self.settings)))

    async def _keep_disk(self) -> None:
        await self.releases.let_go_leftovers()  # before the first sweep, which could do with their room
        await keep_disk_cache(self.settings, self._metrics)

    async def _await_workers(self) -> None:
        """Wait until all workers are up: SageMaker loads models as soon as `/ping` answers. Raises ControlError."""
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                for worker in self.workers:
                    await worker.ready.wait()
        except TimeoutError:
            raise ControlError("not all workers are up; try again", Situation.NOT_READY) from None

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
        await self.registrations.close()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for each in self._listen:
            each.close()  # each front closes its own: new connections are refused, not left waiting
        await self._children.end(self.fronts, until - loop.time())
        await self._end_access_log()
        await self._end_actuals()
        await self._children.end(list(self.workers), min(WORKERS_END_S, until + WORKERS_END_S - loop.time()))
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

    async def _end_actuals(self) -> None:
        """Keep the last forecasts while the workers are there to be asked for them."""
        if self._actuals_keeper is not None:
            self._actuals_keeper.cancel()
            await asyncio.gather(self._actuals_keeper, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.actuals.close(), ACTUALS_END_S)

    def end_at_once(self) -> None:
        """Kill all children and remove the folder of their sockets. Nothing is answered."""
        self._children.kill()
        self._folder.close()

    # --- what children ask and what becomes of them (children.Parent) -----------------------------------------------

    async def answer_child(self, child: Child, operation: AskedByFront | AskedByWorker) -> object:
        """Answer a child."""
        match operation:
            case JoinAsFront():
                cores = front_cores(self.host.cores, self.plans)
                folder, count = str(self._folder.path), len(self.workers)
                journal = self._folder.make("jobs") if child.has_output else ""
                return FrontAssignment(self.settings, child.index, cores, count, folder, dict(child.grpc), journal)
            case JoinAsWorker():
                return self._worker_assignment(child)
            case Ready():
                await self._welcome(child)
                return None
            case ReportOverrun(model, reason):
                self._quarantine.add(model, reason)
                self._announce_quarantine()
                return None
            case TrySuspect() | EndTrial():
                return await self._try_suspect(child, operation)
            case CallManagement() | ManageModels():
                return await self._manage(operation)
            case ListKnownModels() | LoadForClient() | UnloadForClient() | RecordActuals():
                return await self._serve_client(operation)
            case DescribeNode():
                return await self._describe_node()
            case Fatal(error):
                self._note_failed_start(child, error)
                return None
            case _:
                assert_never(operation)

    async def _try_suspect(self, child: Child, operation: TrySuspect | EndTrial) -> object:
        """A front wants to run a suspect alone, or has done so."""
        model, lost = operation.model, operation.lost
        if isinstance(operation, TrySuspect):
            return await self._trials.begin(child.name, model, operation.for_s, lost)
        waits = 0 <= lost < len(self.workers) and self.workers[lost].ready.is_set()
        self._trials.end(child.name, model, lost if waits else -1)
        return None

    async def _describe_node(self) -> bytes:
        """What this server does, for viewers of another node."""
        if self.cluster is None:
            raise ControlError("the server is starting; try again", Situation.NOT_READY)
        return await self.cluster.describe_own()

    async def _manage(self, operation: CallManagement | ManageModels) -> object:
        """Answer a client of an archived server's management API that has come to a front."""
        if isinstance(operation, CallManagement):
            if self.management is None:
                raise ControlError("the management API is not there yet; try again", Situation.NOT_READY)
            return await call_management(self.management, operation)
        if self.settings.container != MULTI_MODEL:
            raise ControlError("models are managed on the management listener", Situation.NO_ROUTE)
        if operation.method != "GET":
            await self._await_workers()
        return await self.multi_model_api.answer(operation)

    async def _serve_client(
        self, operation: ListKnownModels | LoadForClient | UnloadForClient | RecordActuals
    ) -> object:
        """What a front's client may ask of the fleet."""
        match operation:
            case ListKnownModels(prefix, after, limit):
                return await self.operations.list_known(prefix, after, limit)
            case LoadForClient(model):
                return (await self.operations.load(parse_model_name(model)))["version"]
            case UnloadForClient(model):
                await self.operations.unload(parse_model_name(model))
                return ""
            case RecordActuals(items):
                return await self.actuals.record(items)
            case _:
                assert_never(operation)

    async def _welcome(self, child: Child) -> None:
        """Tell a child that is up what it must know, and the fronts that it is there."""
        if child.kind == "worker":
            child.pulse = PulseReader(self._pulse(child))
            async with self.actuals.hold_bands() as bands:  # none may change between this and its being up
                await greet_worker(child, bands)
                child.ready.set()
        child.ready.set()
        child.proven = True
        if child.kind == "worker" and child.channel is not None:
            child.channel.tell(SetQuarantine(self._quarantine.reasons))
            child.channel.tell(SetBatching(self.registrations.table.list_batching(), whole=True))
            child.channel.tell(SetReplicas(self.registrations.table.list_replicas(), whole=True))
        if child.kind == "front" and child.channel is not None:  # before it learns of workers
            child.channel.tell(SetReleases(self.releases.table.make_routes()))
            child.channel.tell(SetRegistrations(self.registrations.table.make_whole(), whole=True))
        self._announce_workers(child)
        if child.kind == "worker":
            self._trials.note_worker(child.index)
            await self.operations.replay_pins(child)

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
        from_outside = code == -signal.SIGKILL and not worker.condemned
        worker.own_deaths = 0 if from_outside or not code else worker.own_deaths + 1
        running = [] if worker.pulse is None or not code else worker.pulse.running()  # code 0: it was told to end
        if running:
            names = [each.model for each in running]
            log.error("suspects", child=worker.name, models=names[:LOGGED_MODELS], count=len(names))
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
            rows=-1 if worker.rows is None else worker.rows,
            distrusted=self._quarantine.list_suspects(),
            trusts_rows=worker.own_deaths < MOST_OWN_DEATHS,
        )

    def _socket(self, worker: Child) -> str:
        return self._folder.socket(f"{worker.index}.{worker.incarnation}")

    def _pulse(self, worker: Child) -> str:
        return self._socket(worker) + SUFFIX

    def _announce_quarantine(self) -> None:
        self._trials.note_quarantine()
        self.workers.tell(SetQuarantine(self._quarantine.reasons))

    def _announce_workers(self, child: Child) -> None:
        """Tell the fronts which workers are up, after `child` has come up or ended."""
        if child.plan is not None:
            self.note_silence(child)
        sockets = {worker.index: self._socket(worker) for worker in self.workers.list_up()}
        for front in self.fronts:
            if front.channel is not None and front.ready.is_set():
                front.channel.tell(ConnectWorkers(sockets))

    # --- what it says of itself -------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """What `/ready` says: see `server.ipc.readiness`."""
        up = {worker.index: worker.pulse for worker in self.workers.list_up()}
        return describe_workers(up, len(self.workers), stuck_after_s(self.settings))

    def processes(self) -> list[dict[str, Any]]:
        """Every front and worker: pid, incarnation, whether it is up, and a worker's device, cores and budget.

        The spare worker too: it is up when all is imported and it waits.
        """
        pid = self._spare_pid()
        is_waiting = self._children.spare is not None and self._children.spare.is_waiting
        spare = [] if pid is None else [{"kind": "spare", "index": 0, "pid": pid, "incarnation": 0, "up": is_waiting}]
        return spare + [
            {
                "kind": child.kind,
                "index": child.index,
                "pid": child.process.pid if child.process is not None else None,
                "incarnation": child.incarnation,
                "up": child.ready.is_set() and not child.is_silent,
                **({"silent_s": round(child.pulse.silent_s, 1)} if child.pulse is not None and child.is_silent else {}),
                **({} if child.plan is None else asdict(child.plan)),
                **({"grpc": child.grpc} if child.grpc else {}),
            }
            for child in (*self.workers, *self.fronts)
        ]

    def _spare_pid(self) -> int | None:
        return None if self._children.spare is None else self._children.spare.pid

    async def metrics(self) -> MergedMetrics:
        """The metrics of all processes, now. A process too busy to answer contributes what it answered last."""
        children = [child for child in (*self.workers, *self.fronts) if child.ready.is_set() and not child.is_silent]
        everyone = (*self.workers, *self.fronts)
        pids = {f"{child.kind}-{child.index}": child.process.pid for child in everyone if child.process is not None}
        if (spare := self._spare_pid()) is not None:
            pids["spare-0"] = spare
        reading = asyncio.to_thread(self._measures.read, {"supervisor": os.getpid(), **pids})
        await asyncio.gather(reading, *(self._scrape(child) for child in children))
        self._metrics.quarantined.set(len(self._quarantine.reasons))
        self._metrics.pinned.set(len(self._pins))
        self._metrics.store_failing.set(self._watch.failing_s())
        self._merged.update("host", self._metrics.text())
        return self._merged

    async def list_exemplars(self) -> list[Exemplar]:
        """Examples of requests, of all fronts that answer in time."""
        asked = (front.ask(ListExemplars(), SCRAPE_S) for front in self.fronts if front.ready.is_set())
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [exemplar for answer in answers if not isinstance(answer, BaseException) for exemplar in answer]

    def _show_workers(self) -> None:
        """Have the series of every worker from the start."""
        for plan in self.plans:
            self._metrics.up.labels(*_make_labels(plan))
            self._metrics.restarts.labels(*_make_labels(plan))

    async def _scrape(self, child: Child) -> None:
        name = child.name
        with contextlib.suppress(ControlError):
            text = await child.ask(ScrapeMetrics(), SCRAPE_S)
            if name == child.name:  # else it has died meanwhile, and its counters have been kept
                self._merged.update(name, text)


def _make_labels(plan: WorkerPlan) -> tuple[str, str]:
    return str(plan.index), plan.device
