"""The gRPC front's process: the services over a data plane of its own, and connections to the workers as every front.

The supervisor starts it as `python -m server.front.grpc.main CONTROL_FD`. It imports no torch and no numpy.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain

import structlog
import uvloop

from server.front.grpc import open_inference, torchserve, torchserve_management
from server.front.grpc.calls import Calls, Method
from server.front.grpc.health import HealthService
from server.front.grpc.listener import GrpcListener, GrpcListeners
from server.front.grpc.open_inference import OpenInferenceService
from server.front.grpc.torchserve_management import TorchServeManagement
from server.front.main import ORPHAN_S, Front
from server.front.nodes.cluster_plane import open_cluster
from server.front.plane_settings import open_plane
from server.front.releases import Releases
from server.front.tracing.opening import open_tracing
from server.front.tracing.tracer import Tracer
from server.ipc.control import ChildChannel, ControlChannel
from server.ipc.operations import AskedOfFront, JoinAsFront
from server.logs import configure_logs
from server.metrics import FrontMetrics
from server.settings import Settings

log = structlog.get_logger()


class GrpcApp:
    """What a front keeps up for its services: the data plane, and what names stand for."""

    def __init__(self, settings: Settings, metrics: FrontMetrics, channel: ControlChannel | None = None) -> None:
        """`channel`: to the supervisor; None: in tests. Raises ValueError for a file of tokens that is wrong."""
        self.plane = open_plane(settings, metrics)
        self.plane.suspects.channel = self.plane.supervisor = channel
        self.cluster = open_cluster(settings, self.plane, metrics)
        self._entry = self.cluster or self.plane
        self.releases = Releases(metrics)
        self.tracer: Tracer | None = None
        self._settings, self._metrics, self._channel = settings, metrics, channel

    def __repr__(self) -> str:
        """For example `<GrpcApp over <DataPlane ...>>`."""
        return f"<GrpcApp over {self.plane!r}>"

    def open_listeners(self, addresses: Mapping[str, str]) -> GrpcListeners:
        """A listener at each address, with the services that it is for.

        Raises ValueError for files of tokens or certificates that are wrong, RuntimeError where an address is taken.
        """
        makers = {"grpc": self._list_inference, "grpc_management": self._list_management}
        return GrpcListeners(
            [GrpcListener(self._settings, self._make_calls(makers[name]()), at) for name, at in addresses.items()]
        )

    def _make_calls(self, services: Mapping[str, Sequence[Method]]) -> Calls:
        inference = OpenInferenceService(self._settings, self._entry)
        health = HealthService(inference.has_ready_worker, lambda: calls.is_draining, list(services))
        methods = [*chain(*services.values()), *health.list_methods()]
        calls = Calls(self._settings, self._metrics, self._entry, self.releases, methods)
        calls.tracer = self.tracer
        return calls

    def _list_inference(self) -> Mapping[str, Sequence[Method]]:
        services = {open_inference.SERVICE: OpenInferenceService(self._settings, self._entry).list_methods()}
        if self._settings.model_server_api == "torchserve":
            services[torchserve.SERVICE] = torchserve.TorchServeService(self._settings, self._entry).list_methods()
        return services

    def _list_management(self) -> Mapping[str, Sequence[Method]]:
        if self._channel is None or self._settings.model_server_api != "torchserve":
            return {}
        return {torchserve_management.SERVICE: TorchServeManagement(self._channel).list_methods()}


async def main(control_fd: int) -> None:
    """Get an assignment from the supervisor, serve until told to stop or the supervisor is gone."""
    member = ChildChannel(AskedOfFront)
    assignment = await member.join(control_fd, JoinAsFront())
    if assignment is None:
        return
    settings = assignment.settings
    configure_logs(settings.log_level, settings.log_format, front=assignment.index)
    os.sched_setaffinity(0, assignment.cores)
    metrics = FrontMetrics()
    try:
        app = GrpcApp(settings, metrics, member.channel)
        app.plane.expected = assignment.workers
        tracing = open_tracing(settings, metrics)
        app.tracer = tracing.tracer
        listener = app.open_listeners(assignment.grpc)
    except (ValueError, RuntimeError) as error:  # a file went bad since the supervisor has read it, or a port is taken
        log.error("front_not_started", error=str(error))  # noqa: TRY400 -- the operator's, not our bug
        return
    front = Front(app, listener, metrics, app.cluster)
    tasks = [asyncio.create_task(front.sweep())]
    if app.cluster is not None:
        tasks.append(asyncio.create_task(app.cluster.keep()))
    await listener.start()
    serving = asyncio.create_task(listener.wait())
    member.serve(front.handle)
    await asyncio.wait([serving, member.released], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        listener.stop(ORPHAN_S)
    await serving
    for task in tasks:
        task.cancel()
    await tracing.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
