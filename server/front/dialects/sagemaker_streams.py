"""SageMaker's response streams and asynchronous invocations, as boto3 asks for them (CONTRACTS 11).

Neither operation of boto3's has a target model: the inference component names it, or the endpoint, or the operator.
What goes wrong before the first frame is a plain error of SageMaker's, and later a frame that boto3 raises. Of a
forecaster each line of JSON Lines is asked by itself, and with `Accept: application/jsonlines` each instance of JSON.
Asynchronous invocations are answered 202 at once and go on in the background (`server.front.asynchronous`).
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import msgspec

from model_store.names import ModelName
from server import contract
from server.contract import JSON, raw_header
from server.errors import Refused, Situation
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import MOST_BODY_BYTES, read_call
from server.front.asynchronous.jobs import AsyncJobs
from server.front.asynchronous.journal import JobRecord, Journal
from server.front.chunks import Chunks, Ending
from server.front.dialects.sagemaker import SageMaker, add_code_headers
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit, wrong_method
from server.front.forecasting.calls import ForecastCall
from server.front.forecasting.event_stream import MEDIA, EventWriter, write_exception
from server.front.forecasting.line_calls import LINES, LineCalls, cut_instances, split_lines
from server.front.handler_calls import CallDetails
from server.front.inference import HALF_ANSWER, InferRequest, InferResponse, InferStats
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.slices import Pacer
from server.front.worker_client import WorkerLost
from server.metrics import FrontMetrics
from server.routes.inference import SAGEMAKER_STREAMS
from server.settings import Settings

OK, ACCEPTED = 200, 202
_PATH = re.compile(r"/endpoints/(.+)/(invocations-response-stream|async-invocations)", re.DOTALL)
_ACCEPT = raw_header("X-Amzn-SageMaker-Accept")
_CONTENT_TYPE = raw_header("X-Amzn-SageMaker-Content-Type")
_OUTPUT_LOCATION = raw_header("X-Amzn-SageMaker-OutputLocation")
_FAILURE_LOCATION = raw_header("X-Amzn-SageMaker-FailureLocation")

#: The ErrorCode of a ModelStreamError, by why the stream is broken; the first two are SageMaker's own. What is not here
#: is no fault of the model's or of the request, and is worth another try.
_MODEL_STREAM_ERRORS = {
    Situation.DEADLINE: "ModelInvocationTimeExceeded",
    Situation.WORKER_LOST: "StreamBroken",
    Situation.BAD_REQUEST: "BadRequest",
    Situation.TOO_LARGE: "TooLarge",
    Situation.NOT_FOUND: "NotFound",
    Situation.MODEL_FAILED: "ModelFailed",
    Situation.ARCHIVE_FAILED: "ArchiveFailed",
    Situation.NO_ROOM: "NoRoom",
    Situation.FORBIDDEN: "Forbidden",
}


@dataclass(frozen=True)
class EndpointOperation(DialectOperation):
    """What is asked of an endpoint, by the name in the path."""

    endpoint: str = ""


class SageMakerStreams:
    """See the module. Errors are SageMaker's."""

    name = "sagemaker_streams"
    routes = SAGEMAKER_STREAMS

    def __init__(self, settings: Settings) -> None:
        self._sagemaker = SageMaker(settings)
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._async_limit = Limit(
            min(int(settings.max_body_bytes), MOST_BODY_BYTES),
            "of an asynchronous invocation, as SageMaker has it; put larger inputs into the bucket",
        )
        self._settings = settings
        self._bucket = Bucket(settings) if settings.async_output else None
        self._jobs: AsyncJobs | None = None

    def keep_jobs(self, journal: Journal, metrics: FrontMetrics) -> AsyncJobs:
        """Accept asynchronous invocations, which are kept in this journal."""
        bucket = self._bucket = self._bucket or Bucket(self._settings)
        self._jobs = AsyncJobs(self._settings, bucket, journal, metrics.async_jobs, self._explain)
        return self._jobs

    def _explain(self, why: Refused, request_id: bytes) -> bytes:
        """The failure object: what a caller who had waited would have got."""
        nobody = HttpRequest("POST", "", {}, asyncio.Event().wait, id=request_id)
        return self.refused(why, nobody).body

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """POST to an endpoint's stream, or its queue."""
        del query
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        if method != "POST":
            raise wrong_method(method)
        limit = self._async_limit if found[2] == "async-invocations" else self._limit
        return EndpointOperation(found[2], limit, found[1])

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer in frames, or where it will be written."""
        assert isinstance(operation, EndpointOperation), "`match` makes no other"
        if operation.name == "async-invocations":
            return await self._accept(operation, request, plane)
        return await self._stream(self._sagemaker.find_model(request, operation.endpoint), request, plane)

    async def _stream(self, model: ModelName, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer in frames, each sent as soon as it is there. Raises Refused, ClientGone."""
        accept = request.headers.get(_ACCEPT, b"").decode("latin-1")[:1024] or request.accept
        origin = (request.arrived, request.id, request.client)
        told = CallDetails(request.headers, streams=True) if self._settings.allow_code else None
        asked = InferRequest(
            model, request.body, request.content_type, accept, request.deadline, request.client_gone, *origin, told
        )
        lines = await _find_lines(asked, request, plane, self._limit)
        stream = _Stream(plane, msgspec.structs.replace(asked, client_gone=None), lines)
        stream.headers = self._sagemaker.make_headers(request)
        chunks = await Chunks.open(stream.frames(), self._end, request.deadline, request.client_gone)
        headers = [(_CONTENT_TYPE, stream.content_type.encode()), *stream.headers]
        return HttpReply(OK, MEDIA, b"", headers, stream.stats, chunks=chunks)

    def _end(self, why: Refused) -> Ending:
        """The frame that boto3 raises as an error of its own: the model's, or the service's for all others."""
        status = self._sagemaker.find_status(why.situation)
        code = _MODEL_STREAM_ERRORS.get(why.situation)
        kind = "InternalStreamFailure" if code is None else "ModelStreamError"
        return Ending(status, write_exception(kind, why.detail.say(), code))

    async def _accept(self, operation: EndpointOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """Start an asynchronous invocation, and say where its answer will be. Raises Refused."""
        if self._bucket is None:
            message = "asynchronous invocations are not served: this server has no bucket to write answers to"
            raise Refused(Situation.BAD_REQUEST, f"{message} (async_output); call /endpoints/NAME/invocations")
        model = self._sagemaker.find_model(request, operation.endpoint)
        if not plane.permits(model):
            raise Refused(Situation.FORBIDDEN, f"the token does not allow to ask {model}")
        call = read_call(request, self._bucket)
        if self._jobs is None:
            raise Refused(Situation.NOT_READY, "this front cannot keep asynchronous requests: its log says why")
        origin = (time.monotonic(), request.id, request.client, plane.token_name)
        await self._jobs.accept(JobRecord(call, model, bytes(request.body), *origin), plane)
        headers = [
            (_OUTPUT_LOCATION, f"{self._bucket.url}/{call.output}".encode()),
            (_FAILURE_LOCATION, f"{self._bucket.url}/{call.failure}".encode()),
            *self._sagemaker.make_headers(request),
        ]
        return HttpReply(ACCEPTED, contract.JSON, msgspec.json.encode({"InferenceId": call.id}), headers)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """As SageMaker's dialect says it: before the first frame an error is a plain one."""
        return self._sagemaker.refused(why, request)


class _Stream:
    """One answer on its way. `content_type` and `stats` are the first response's, once the first frame is there.

    `headers`: those of the reply, with what an archive's code has set.
    """

    def __init__(self, plane: InferencePlane, asked: InferRequest, lines: Sequence[bytes] | None) -> None:
        self._plane, self._asked, self._lines = plane, asked, lines
        self.content_type, self.stats = "", cast("InferStats | None", None)
        self.headers: Headers = []

    def __repr__(self) -> str:
        """For example `<_Stream of au/NSW1.mar, application/jsonlines>`."""
        return f"<_Stream of {self._asked.model}, {self.content_type or 'not begun'}>"

    async def frames(self) -> AsyncGenerator[bytes]:
        """The frames: those of each piece that has come from a worker. Raises Refused."""
        lines = [] if self._lines is None else self._lines
        with self._plane.held.hold(len(self._asked.body) + sum(map(len, lines))):
            if self._lines is None:
                async for frames in self._write(await self._infer()):
                    yield frames
                return
            asked = msgspec.structs.replace(self._asked, content_type=LINES, accept=LINES, call=None)
            async with aclosing(LineCalls(self._plane, asked, self._lines).answers()) as answers:
                async for response in answers:
                    async for frames in self._write(response):
                        yield frames

    async def _infer(self) -> InferResponse:
        try:
            return await self._plane.infer(self._asked)
        except Refused as why:
            add_near_names(why, self._asked.model, self._plane)
            raise

    async def _write(self, response: InferResponse) -> AsyncGenerator[bytes]:
        """The frames of one response. A part of it that is not read is given up."""
        if response.head is not None:
            try:
                self.headers = await add_code_headers(self.headers, response)
            except Refused:
                response.cancel()
                raise
        if not self.content_type:
            self.content_type, self.stats = response.content_type, response.stats
        writer = EventWriter(lines=response.content_type.startswith(LINES))
        async with aclosing(response.stream() if response.is_streamed else _list_pieces(response)) as pieces:
            async for piece in pieces:
                if frames := writer.write(piece):
                    yield frames
        if frames := writer.finish():
            yield frames


async def _list_pieces(response: InferResponse) -> AsyncGenerator[bytes]:
    """The pieces of an answer that a worker has whole. What is not read is given up. Raises Refused."""
    try:
        yield response.body
        async for part in response.parts():
            yield part
    except WorkerLost:
        raise Refused(Situation.WORKER_LOST, HALF_ANSWER) from None
    finally:
        response.cancel()


async def _find_lines(
    asked: InferRequest, request: HttpRequest, plane: InferencePlane, limit: Limit
) -> Sequence[bytes] | None:
    """The lines that a forecaster is asked one by one; None for a body that goes to the worker as it is.

    Code of an archive gets every body whole: it may know no lines. Raises Refused, ClientGone.
    """
    sent, wanted = (_read_media(each) for each in (asked.content_type, asked.accept))
    lines = split_lines(asked.body) if sent == LINES and wanted in ("", "*/*", LINES) else None
    if lines is None and not (sent in ("", JSON) and wanted == LINES):
        return None
    if not await ForecastCall(plane, request, limit).is_forecaster(asked.model):
        return None
    return await Pacer().run(cut_instances(asked.body)) if lines is None else lines


def _read_media(text: str) -> str:
    return text.partition(";")[0].strip().lower()
