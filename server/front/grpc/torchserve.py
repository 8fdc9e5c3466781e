"""TorchServe's inference service over gRPC (0.12): its REST dialect, asked in this process.

A call becomes the request that the dialect (`server.front.dialects.torchserve`) knows, so that names, versions,
time-outs and what a handler sees are the same. Runs in the gRPC front.
"""

import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import structlog
from google.protobuf import empty_pb2
from grpc import StatusCode

from server.errors import Refused, Situation
from server.front.chunks import CLIENT_GONE
from server.front.dialects.torchserve import ERRORS, OK, TorchServe
from server.front.exchange import HttpRequest
from server.front.grpc.calls import SERVER_FAILED, Call, Method, Send
from server.front.grpc.messages import find_message
from server.front.grpc.statuses import STATUS, AnsweredBadly, describe_refusal
from server.front.grpc.streams import answer_all
from server.front.inference import ClientWatch, InferResponse
from server.front.inference_plane import InferencePlane
from server.front.registrations import find_version, key_of
from server.ipc.readiness import describe_workers, stuck_after_s
from server.settings import Settings

SERVICE = "org.pytorch.serve.grpc.inference.InferenceAPIsService"
PROTOCOL = "torchserve_grpc"  #: the metrics' label
MAX_NAME = 1024  #: characters of a model's name, and of a version
MAX_INPUTS = 100
BODY = "body"  #: the input that handlers get as the body of a request without a form
FAILED = 500

_package = SERVICE.rpartition(".")[0]
_Request, _Response, _Health = (
    find_message(f"{_package}.{name}")
    for name in ("PredictionsRequest", "PredictionResponse", "TorchServeHealthResponse")
)
_UNSAFE = re.compile(r"[\x00-\x1f\"\\\\]")  # what a name in a form cannot hold
log = structlog.get_logger()


class TorchServeService:
    """See the module."""

    def __init__(self, settings: Settings, plane: InferencePlane) -> None:
        self._plane, self._stuck_s = plane, stuck_after_s(settings)
        self._dialect = TorchServe(settings)
        self._code = tuple("" if key == "*" else key for key in settings.allow_code)

    def list_methods(self) -> Sequence[Method]:
        """The service's methods."""
        empty: Any = empty_pb2.Empty
        path = f"/{SERVICE}/"
        return (
            Method(path + "Ping", empty, self._ping, is_open=True),
            Method(path + "Predictions", _Request, self._predict, protocol=PROTOCOL),
            Method(path + "StreamPredictions", _Request, stream=self._predict_once, protocol=PROTOCOL),
            Method(path + "StreamPredictions2", _Request, stream=self._predict_all, protocol=PROTOCOL),
        )

    async def _ping(self, _: Any, call: Call) -> Any:
        del call
        ready = describe_workers(self._plane.workers, self._plane.expected, self._stuck_s).ready
        return _Health(health='{\n  "status": "%s"\n}\n' % ("Healthy" if ready else "Unhealthy"))

    async def _predict(self, request: Any, call: Call) -> Any:
        return _Response(prediction=await self._ask(request, call))

    async def _predict_once(self, requests: AsyncIterator[Any], send: Send, call: Call) -> None:
        """One answer: a message for each part that its handler sends while it makes it, else one."""
        started = time.monotonic()
        async for request in requests:
            response = await self._infer(request, call, streams=True)
            await _require_ok(response)
            parts = response.stream() if response.is_streamed else _read_whole(response)
            async with aclosing(parts):
                async for part in parts:
                    await send(_Response(prediction=bytes(part)).SerializeToString())
            call.count(OK, time.monotonic() - started)  # a refusal is counted by whoever says it
            return

    async def _predict_all(self, requests: AsyncIterator[Any], send: Send, call: Call) -> None:
        """Each message is answered; an error is in the answer's `status`."""
        await answer_all(requests, send, call.plane.held, partial(self._answer_one, call))

    async def _answer_one(self, call: Call, request: Any) -> bytes:
        started, sequence, status = time.monotonic(), request.sequence_id, CLIENT_GONE
        try:
            _require_sequence(sequence)
            reply = _Response(prediction=await self._ask(request, call), sequence_id=sequence)
            status = OK
        except Refused as refused:
            status = refused.status if isinstance(refused, AnsweredBadly) else ERRORS[refused.situation].status
            code = refused.code if isinstance(refused, AnsweredBadly) else STATUS[refused.situation]
            reply = _make_error(sequence, code, describe_refusal(refused))
        except Exception:
            log.exception("request_failed")
            status = FAILED
            reply = _make_error(sequence, StatusCode.INTERNAL, SERVER_FAILED)
        finally:
            call.count(status, time.monotonic() - started)
        raw: bytes = reply.SerializeToString()
        return raw

    async def _ask(self, request: Any, call: Call) -> bytes:
        """The answer's bytes. Raises Refused."""
        response = await self._infer(request, call, streams=False)
        await _require_ok(response)
        return bytes(await response.read())

    async def _infer(self, request: Any, call: Call, *, streams: bool) -> InferResponse:
        """The model's answer; `streams`: it may be sent while it is made. Raises Refused."""
        name, version = request.model_name, request.model_version
        if not name:
            raise Refused(Situation.NO_TARGET, "Parameter model_name is required.")
        if len(name) > MAX_NAME or len(version) > MAX_NAME or len(request.input) > MAX_INPUTS:
            message = f"a name has {MAX_NAME} characters at most, a request {MAX_INPUTS} inputs"
            raise Refused(Situation.BAD_NAME, message)
        asked = self._make_request(name, version, request.input, call)
        del request
        operation = self._dialect.match(asked.method, asked.path)
        assert operation is not None, "every name has a path of predictions"
        response = await self._dialect.predict(operation, asked, call.plane, streams=streams)
        call.stats = response.stats
        return response

    def _make_request(self, name: str, version: str, inputs: Mapping[str, bytes], call: Call) -> HttpRequest:
        """The request of the dialect. One input is the body, unless code may run that wants to know its name."""
        path = f"/predictions/{name}/{version}" if version else f"/predictions/{name}"
        (only,) = inputs if len(inputs) == 1 else ("",)
        if not inputs or only == BODY or (len(inputs) == 1 and not self._may_run_code(name, version, call.plane)):
            content_type, body = "", inputs[only] if inputs else b""
        else:
            content_type, body = _write_form(inputs)
        headers = {**call.headers, b"content-type": content_type.encode()} if content_type else call.headers
        now = time.monotonic()
        watched = cast("ClientWatch", None)  # the dialect only hands it on, and grpcio cancels a call that is given up
        return HttpRequest(
            "POST", path, headers, watched, id=call.id, content_type=content_type, deadline=call.limit(), body=body,
            arrived=now, client=call.client,
        )  # fmt: skip

    def _may_run_code(self, name: str, version: str, plane: InferencePlane) -> bool:
        if not self._code:
            return False
        registered = plane.registrations.models.get(name)
        found = find_version(registered, version or None) if registered is not None else None
        key = name if found is None else key_of(found)
        return key.startswith(self._code)


async def _require_ok(response: InferResponse) -> None:
    """Raises AnsweredBadly where the code of the archive has said so: a client's mistake, or its own failure."""
    status = OK if response.head is None else response.head.status
    if status == OK:
        return
    body = response.body if response.is_streamed else await response.read()
    response.cancel()
    code = StatusCode.INTERNAL if status >= FAILED else None
    raise AnsweredBadly(status, bytes(body).decode(errors="replace"), code)


async def _read_whole(response: InferResponse) -> AsyncGenerator[bytes, None]:
    """An answer in one piece, as the one part of itself. Raises Refused."""
    yield await response.read()


def _require_sequence(sequence: str) -> None:
    if not sequence:
        raise Refused(Situation.BAD_REQUEST, "Parameter sequence_id is required.")


def _make_error(sequence: str, code: StatusCode, message: str) -> Any:
    number, _ = code.value
    return _Response(sequence_id=sequence, status={"code": number, "message": message})


def _write_form(inputs: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The inputs as multipart/form-data without types: a handler gets the bytes of each by its name."""
    boundary = f"fleetcast-{os.urandom(16).hex()}"
    parts = list[bytes]()
    for name, value in sorted(inputs.items()):
        shown = _UNSAFE.sub("_", name)
        parts += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{shown}"\r\n\r\n'.encode(), value, b"\r\n",
        )  # fmt: skip
    parts.append(f"--{boundary}--\r\n".encode())
    return f"multipart/form-data; boundary={boundary}", b"".join(parts)
