"""Probes of load balancers and orchestrators: `/ping`, the front answers; `/ready`, a worker takes all requests."""

import msgspec

from server import contract
from server.errors import Refused
from server.front.exchange import DialectOperation, HttpReply, HttpRequest
from server.front.inference_plane import InferencePlane
from server.ipc.readiness import describe_workers, stuck_after_s
from server.model_server_api.bodies import NO_CACHE, encode_pretty
from server.routes.inference import HEALTH
from server.settings import Settings

_PING, _READY = DialectOperation("ping", None), DialectOperation("ready", None)
_HEALTHY = encode_pretty({"status": "Healthy"})  #: as the archived model servers lay it out
_OPERATIONS = {contract.PING_PATH: _PING, contract.READY_PATH: _READY}


class Health:
    """See the module. Probes are not counted."""

    name = "health"
    routes = HEALTH

    def __init__(self, settings: Settings) -> None:
        self._stuck_s = stuck_after_s(settings)

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """Any method: SageMaker's platform and Kubernetes ask by GET, some balancers by HEAD or OPTIONS."""
        del method, query
        return _OPERATIONS.get(path)

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """From what the front sees of the workers: none is asked, so a stopped one holds no probe up."""
        del request
        if operation is _PING:
            return HttpReply(200, contract.JSON, _HEALTHY, list(NO_CACHE), counted=())
        found = describe_workers(plane.workers, plane.expected, self._stuck_s)
        return HttpReply(found.status, contract.JSON, msgspec.json.encode(found), counted=())

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """A probe has nothing that could be refused, so this is a failure of the server."""
        del request
        return HttpReply(500, contract.JSON, msgspec.json.encode({"error": why.detail.message}), counted=())
