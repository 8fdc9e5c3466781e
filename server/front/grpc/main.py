"""The gRPC front's process: the services over a data plane of its own, and connections to the workers as every front.

The supervisor starts it as `python -m server.front.grpc.main CONTROL_FD`. It imports no torch and no numpy.
"""

import asyncio
import os
import sys
from itertools import chain

import structlog
import uvloop

from server.front.backlog import Bounds
from server.front.dataplane import DataPlane
from server.front.grpc import torchserve
from server.front.grpc.calls import Calls
from server.front.grpc.health import HealthService
from server.front.grpc.listener import GrpcListener
from server.front.grpc.open_inference import SERVICE, OpenInferenceService
from server.front.handler_calls import open_code_calls
from server.front.main import ORPHAN_S, Front
from server.front.releases import Releases
from server.front.torchserve_metrics import RegisteredFamilies
from server.ipc.control import ChildChannel
from server.ipc.operations import AskedOfFront, JoinAsFront
from server.logs import configure_logs
from server.metrics import FrontMetrics
from server.settings import Settings

log = structlog.get_logger()


class GrpcApp:
    """What a front keeps up for its services: the data plane, and what names stand for."""

    def __init__(self, settings: Settings, metrics: FrontMetrics) -> None:
        """Raises ValueError for a file of tokens that is wrong."""
        bounds = Bounds(settings.queue_per_worker, settings.queue_per_model)
        self.plane = DataPlane(int(settings.max_inflight_bytes), bounds, open_code_calls(settings))
        metrics.registry.register(RegisteredFamilies(self.plane.registrations, os.uname().nodename))
        self.releases = Releases(metrics)
        inference = OpenInferenceService(settings, self.plane)
        services = {SERVICE: inference.list_methods()}
        if settings.model_server_api == "torchserve":
            services[torchserve.SERVICE] = torchserve.TorchServeService(settings, self.plane).list_methods()
        health = HealthService(inference.has_ready_worker, lambda: self.calls.is_draining, list(services))
        methods = chain(*services.values(), health.list_methods())
        self.calls = Calls(settings, metrics, self.plane, self.releases, methods)

    def __repr__(self) -> str:
        """For example `<GrpcApp <Calls ...> over <DataPlane ...>>`."""
        return f"<GrpcApp {self.calls!r} over {self.plane!r}>"


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
        app = GrpcApp(settings, metrics)
        app.plane.expected, app.plane.suspects.channel = assignment.workers, member.channel
        listener = GrpcListener(settings, app.calls, assignment.addresses)
    except (ValueError, RuntimeError) as error:  # a file went bad since the supervisor has read it, or a port is taken
        log.error("front_not_started", error=str(error))  # noqa: TRY400 -- the operator's, not our bug
        return
    front = Front(app, listener, metrics)
    sweeper = asyncio.create_task(front.sweep())
    await listener.start()
    serving = asyncio.create_task(listener.wait())
    member.serve(front.handle)
    await asyncio.wait([serving, member.released], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        listener.stop(ORPHAN_S)
    await serving
    sweeper.cancel()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
