"""Probes of load balancers and orchestrators: `/ping`, the front answers; `/ready`, a worker takes requests."""

import msgspec

from server import contract
from server.errors import Refused
from server.front.dataplane import InferencePlane
from server.front.exchange import DialectOperation, HttpReply, HttpRequest
from server.settings import Settings

_PING, _READY = DialectOperation("ping", None), DialectOperation("ready", None)
_OPERATIONS = {contract.PING_PATH: _PING, contract.READY_PATH: _READY}


class Health:
    """See the module. Probes are not counted."""

    name = "health"
    paths = f"{contract.PING_PATH}, {contract.READY_PATH}"

    def __init__(self, settings: Settings) -> None:
        del settings

    def match(self, method: str, path: str) -> DialectOperation | None:
        """Any method: SageMaker's platform and Kubernetes ask by GET, some balancers by HEAD or OPTIONS."""
        del method
        return _OPERATIONS.get(path)

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """From what the front knows: no worker is asked."""
        del request
        if operation is _PING:
            return HttpReply(200, contract.JSON, b'{"status": "Healthy"}\n', counted=())
        workers = plane.workers
        body = msgspec.json.encode({"ready": workers > 0, "workers": workers})
        return HttpReply(200 if workers else 503, contract.JSON, body, counted=())

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """A probe has nothing that could be refused, so this is a failure of the server."""
        del request
        return HttpReply(500, contract.JSON, msgspec.json.encode({"error": why.detail.message}), counted=())
