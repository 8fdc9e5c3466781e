"""A front process: uvicorn on the shared inference socket, and connections to the workers that the supervisor names.

The supervisor starts it as `python -m server.front.main CONTROL_FD LISTEN_FD [NODE_FD]`. It imports no torch.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Protocol, assert_never

import structlog
import uvloop

from server.access.tls import open_tls
from server.contract import MIB
from server.freed_memory import keep_freed_memory
from server.front.app import App
from server.front.dataplane import DataPlane
from server.front.finished_jobs import FinishedJobs
from server.front.nodes.cluster_plane import ClusterPlane, open_cluster, open_node_tls
from server.front.releases import Releases
from server.front.tracing.opening import open_tracing
from server.front.worker_client import WorkerLink, connect_to_worker
from server.http_listener import make_listener
from server.ipc.control import ChildChannel
from server.ipc.operations import (
    AskedOfFront,
    AwaitConnections,
    ConnectWorkers,
    DescribeNodes,
    Drain,
    Exemplar,
    JoinAsFront,
    ListExemplars,
    Ping,
    ScrapeMetrics,
    SetRegistrations,
    SetReleases,
)
from server.ipc.pulse import SUFFIX, PulseReader
from server.logs import configure_logs
from server.metrics import FrontMetrics
from server.single_thread_metrics import BucketExample

log = structlog.get_logger()

SWEEP_S = 0.1
JOBS_FOLDER = "finished_jobs"  #: of finished jobs, within the server's own
RECONNECT_S = 0.1
#: Of freed memory, see `server.freed_memory`. A call for 1,000 models holds more than 8 MiB, and what is given back is
#: cleared anew with the next.
KEPT_BYTES, LARGE_BYTES = 16 * MIB, 4 * MIB
ORPHAN_S = 1.0  #: for the requests of a front whose supervisor has died, with which the workers die


class FrontApp(Protocol):
    """What a front keeps up: the data plane, and what names stand for."""

    plane: DataPlane
    releases: Releases


class Stoppable(Protocol):
    """A listener."""

    def stop(self) -> None:
        """Take no new requests, and end when those that run are answered."""


class Front:
    """Keeps the links as the supervisor's list of workers says; the app sees only those that are connected."""

    def __init__(
        self, app: FrontApp, server: Stoppable, metrics: FrontMetrics, cluster: ClusterPlane | None = None
    ) -> None:
        """`cluster`: the plane of all nodes; None: this server is alone."""
        self._app, self._server, self._metrics, self._cluster = app, server, metrics, cluster
        self._wanted: dict[int, str] = {}  # worker -> socket path, which is new for each incarnation
        self._linked: dict[int, str] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        """For example `<Front 2 of 3 workers linked>`."""
        return f"<Front {len(self._linked)} of {len(self._wanted)} workers linked>"

    async def handle(self, operation: AskedOfFront) -> object:
        """Perform what the supervisor tells and asks."""
        match operation:
            case ConnectWorkers(sockets):
                self._follow(sockets)
                return None
            case SetReleases(routes):
                self._app.releases.replace(routes)
                return None
            case SetRegistrations(models, whole):
                self._app.plane.registrations.follow(models, whole=whole)
                return None
            case AwaitConnections():
                await asyncio.gather(*self._connecting.values(), return_exceptions=True)
                if self._cluster is not None:
                    await self._cluster.join()
                return None
            case ScrapeMetrics() | ListExemplars() | DescribeNodes():
                return await self._report(operation)
            case Ping():
                return repr(self)
            case Drain():
                self._server.stop()
                self._app.plane.background.stop()
                return None
            case _:
                assert_never(operation)

    async def _report(self, operation: ScrapeMetrics | ListExemplars | DescribeNodes) -> object:
        """What the supervisor shows of this front, and of the nodes that it is linked to."""
        if isinstance(operation, DescribeNodes):
            return [] if self._cluster is None else await self._cluster.describe_nodes(operation.within_s)
        if isinstance(operation, ListExemplars):
            return [_make_exemplar(*each) for each in self._metrics.list_examples()]
        links = self._app.plane.links
        self._metrics.show_under_way({worker: len(link.backlog) for worker, link in links.items()})
        return self._metrics.text()

    async def sweep(self) -> None:
        """Sweep the data plane for as long as the front lives."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._app.plane.sweep()

    def _follow(self, wanted: dict[int, str]) -> None:
        self._wanted = wanted
        for worker, path in list(self._linked.items()):
            if wanted.get(worker) != path:
                self._app.plane.links[worker].close()
        for worker in wanted:
            task = self._connecting.get(worker)
            if worker not in self._linked and (task is None or task.done()):
                self._connecting[worker] = asyncio.create_task(self._connect(worker))

    async def _connect(self, worker: int) -> None:
        """Try until the worker is connected or no longer wanted."""
        while (path := self._wanted.get(worker)) is not None and worker not in self._linked:
            try:
                pulse = PulseReader(path + SUFFIX)
                link = await connect_to_worker(path, worker, self._lost, self._app.plane.held)
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            self._linked[worker] = path
            self._app.plane.links[worker], self._app.plane.pulses[worker] = link, pulse
            self._app.plane.note_up(worker)

    def _lost(self, link: WorkerLink) -> None:
        """A link has ended. The front learns it before the supervisor does: the socket closes with the process."""
        if self._app.plane.links.get(link.worker) is link:
            self._app.plane.note_loss(link.worker)
            del self._app.plane.links[link.worker], self._app.plane.pulses[link.worker], self._linked[link.worker]
            self._app.plane.router.worker_down(link.worker)
            if link.worker in self._wanted:
                self._connecting[link.worker] = asyncio.create_task(self._connect(link.worker))


def _make_exemplar(labels: dict[str, str], example: BucketExample) -> Exemplar:
    request_id = example.request_id.decode("ascii", "replace")
    return Exemplar(labels, request_id, example.value, example.at, example.trace_id)


def _keep_jobs(app: App, folder: str) -> "asyncio.Task[None] | None":
    """What looks for jobs of fronts that have died; None where this front accepts none."""
    if not folder:
        return None
    try:
        return app.keep_jobs(Path(folder))
    except OSError as error:  # the folder of temporary files is full or gone: all else can be served
        log.error("async_jobs_not_kept", error=str(error))  # noqa: TRY400 -- the disk's fault
        return None


async def main(control_fd: int, listen_fd: int, node_fd: int = -1) -> None:
    """Get an assignment from the supervisor, serve until told to stop or the supervisor is gone.

    `node_fd`: where other nodes connect; -1: the server is no node of a cluster.
    """
    member = ChildChannel(AskedOfFront)
    assignment = await member.join(control_fd, JoinAsFront())
    if assignment is None:
        return
    settings = assignment.settings
    configure_logs(settings.log_level, settings.log_format, front=assignment.index)
    os.sched_setaffinity(0, assignment.cores)
    metrics = FrontMetrics()
    try:
        app = App(settings, metrics)
        app.plane.expected, app.plane.supervisor = assignment.workers, member.channel
        app.plane.suspects.channel = member.channel
        app.plane.finished_jobs = FinishedJobs(Path(assignment.folder, JOBS_FOLDER))
        cluster = open_cluster(settings, app.plane, metrics)
        tracing = open_tracing(settings, metrics)
        app.tracer = tracing.tracer
        tls = open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    except ValueError as error:  # a file of tokens or certificates went bad since the supervisor has read it
        log.error("front_not_started", error=str(error))  # noqa: TRY400 -- the operator's file, not our bug
        return
    server = make_listener(app, settings.drain_s, settings.client_timeout_s, settings.keep_alive_s, tls)
    front = Front(app, server, metrics, cluster)
    tasks = [asyncio.create_task(front.sweep())]
    if cluster is not None:
        app.entry = cluster
        await cluster.listen(socket.socket(fileno=node_fd), open_node_tls(settings))
        tasks.append(asyncio.create_task(cluster.keep()))
    keeper = _keep_jobs(app, assignment.journal)
    serving = asyncio.create_task(server.serve(sockets=[socket.socket(fileno=listen_fd)]))
    member.serve(front.handle)
    await asyncio.wait([serving, member.released], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        app.plane.abandon()
        server.stop(ORPHAN_S)
        await serving
    for link in app.plane.links.values():
        if link.lent is not None:
            link.lent.return_all()
    app.plane.background.stop(0.0)  # the supervisor has died, and the workers with it
    await app.plane.background.wait_ended()
    for task in (*tasks, *([] if keeper is None else [keeper])):
        task.cancel()
    await tracing.close()


if __name__ == "__main__":
    keep_freed_memory(KEPT_BYTES, LARGE_BYTES)
    uvloop.run(main(*map(int, sys.argv[1:])))
