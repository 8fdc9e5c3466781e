"""A gRPC front in this process, before a worker that answers as a test says."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec

from server.front.grpc.listener import GrpcListeners
from server.front.grpc.main import GrpcApp
from server.front.grpc.messages import find_message
from server.metrics import FrontMetrics
from server.settings import Settings
from server.supervisor.grpc_port import format_target, hold_port
from tests.server.front.answering import Asked, Worker, attach

Request = find_message("inference.ModelInferRequest")


@dataclass
class GrpcHouse:
    """A front that serves, and a channel to it."""

    app: GrpcApp
    listener: GrpcListeners
    worker: Worker
    metrics: FrontMetrics
    channel: grpc.aio.Channel
    target: str

    def call(self, method: str = "ModelInfer", *, service: str = "inference.GRPCInferenceService") -> Any:
        """A method that takes bytes and gives bytes."""
        return self.channel.unary_unary(f"/{service}/{method}", None, None)

    def stream(self, method: str = "ModelStreamInfer", *, service: str = "inference.GRPCInferenceService") -> Any:
        """A method that takes and gives streams of bytes."""
        return self.channel.stream_stream(f"/{service}/{method}", None, None)

    def counted(self) -> dict[str, float]:
        """How many answers were counted, by code."""
        families = self.metrics.registry.collect()
        return {
            sample.labels["code"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "fleetcast_inference_requests_total" and sample.value
        }


def answer_alike(_: Asked) -> bytes:
    """An answer with no tensors."""
    return msgspec.json.encode({"model_name": "m", "model_version": "1", "outputs": []})


def make_infer(model: str = "m", ident: str = "", **parameters: int) -> bytes:
    """A request with no tensors."""
    request = Request(model_name=model, id=ident)
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return bytes(request.SerializeToString())


@contextlib.asynccontextmanager
async def serve_grpc(
    folder: Path, answer: Callable[[Asked], Any] = answer_alike, **settings: Any
) -> AsyncIterator[GrpcHouse]:
    """A front with these settings at a free port of its own."""
    given = Settings.from_wire({"store": str(folder), "grpc_port": 0, **settings})
    metrics, worker = FrontMetrics(), Worker(answer)
    with hold_port("127.0.0.1", 0) as held:
        app, target = GrpcApp(given, metrics), format_target(held)
        attach(app.plane, worker)
        listener = app.open_listeners({"grpc": target})
        await listener.start()
        async with grpc.aio.insecure_channel(target) as channel:
            yield GrpcHouse(app, listener, worker, metrics, channel, target)
        listener.stop(0.0)
        await listener.wait()
