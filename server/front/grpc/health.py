"""Health (grpc.health.v1) and reflection, so that balancers and tools such as grpcurl need nothing of ours.

Runs in the gRPC front. A probe asks no worker: it is answered from what the front sees of them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server.errors import Refused, Situation
from server.front.grpc.calls import Call, Method, Send
from server.front.grpc.messages import POOL

HEALTH = "grpc.health.v1.Health"
REFLECTION = reflection.SERVICE_NAME
#: The newer name, which tools ask first. Its messages are the same on the wire, and grpcio has no classes for it yet.
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
LOOK_S = 0.5  #: between two looks for those who watch

_Response: Any = health_pb2.HealthCheckResponse


class HealthService:
    """See the module. `services`: those of this front, beside the server as a whole, whose name is empty."""

    def __init__(self, is_ready: Callable[[], bool], is_draining: Callable[[], bool], services: Sequence[str]) -> None:
        self._is_ready, self._is_draining = is_ready, is_draining
        self._services = frozenset(("", HEALTH, *services))
        names = (*services, HEALTH, REFLECTION_V1, REFLECTION)
        self._reflection: Any = reflection.ReflectionServicer(names, POOL)

    def list_methods(self) -> Sequence[Method]:
        """The methods of both services."""
        request: Any = health_pb2.HealthCheckRequest
        reflect: Any = reflection_pb2.ServerReflectionRequest
        return (
            Method(f"/{HEALTH}/Check", request, self._check, is_open=True),
            Method(f"/{HEALTH}/Watch", request, stream=self._watch, is_open=True),
            *(
                Method(f"/{name}/ServerReflectionInfo", reflect, stream=self._reflect)
                for name in (REFLECTION_V1, REFLECTION)
            ),
        )

    async def _check(self, request: Any, call: Call) -> Any:
        del call
        if request.service not in self._services:
            raise Refused(Situation.NOT_FOUND, f"no such service: {request.service[:200]}")
        return _Response(status=self._find_status(request.service))

    async def _watch(self, requests: AsyncIterator[Any], send: Send, call: Call) -> None:
        """Send the status, and again whenever it has changed, for as long as the client and the server stay."""
        del call
        request, last = await anext(requests), None
        while True:
            is_last, status = self._is_draining(), self._find_status(request.service)
            if status != last:
                last = status
                await send(_Response(status=status).SerializeToString())
            if is_last:
                return
            await asyncio.sleep(LOOK_S)

    async def _reflect(self, requests: AsyncIterator[Any], send: Send, call: Call) -> None:
        del call
        async for request in requests:  # the library's class for threads answers at once: it has all in memory
            for reply in self._reflection.ServerReflectionInfo([request], None):
                await send(reply.SerializeToString())

    def _find_status(self, service: str) -> Any:
        if service not in self._services:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._is_ready() and not self._is_draining() else _Response.NOT_SERVING
