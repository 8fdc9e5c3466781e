"""SageMaker's response streams and asynchronous invocations, as boto3 asks for them (CONTRACTS 11).

Neither operation of boto3's has a target model: the inference component names it, or the endpoint, or the operator. An
answer is read to its end before its first frame, so that whatever goes wrong is a plain error of SageMaker's.
Asynchronous invocations are answered 202 at once and go on in the background (`server.front.asynchronous`).
"""

import asyncio
import re
import time
from dataclasses import dataclass

import msgspec

from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import MOST_BODY_BYTES, read_call
from server.front.asynchronous.jobs import AsyncJobs, Job
from server.front.dataplane import InferencePlane, InferRequest
from server.front.dialects.sagemaker import SageMaker
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit, wrong_method
from server.front.forecasting.event_stream import MEDIA, write_events
from server.front.slices import Pacer
from server.routes.inference import SAGEMAKER_STREAMS
from server.settings import Settings

OK, ACCEPTED = 200, 202
LINES = "application/jsonlines"
_PATH = re.compile(r"/endpoints/(.+)/(invocations-response-stream|async-invocations)", re.DOTALL)
_ACCEPT = raw_header("X-Amzn-SageMaker-Accept")
_CONTENT_TYPE = raw_header("X-Amzn-SageMaker-Content-Type")
_OUTPUT_LOCATION = raw_header("X-Amzn-SageMaker-OutputLocation")
_FAILURE_LOCATION = raw_header("X-Amzn-SageMaker-FailureLocation")


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
        self._bucket = Bucket(settings) if settings.async_output else None
        self._jobs = AsyncJobs(settings, self._bucket) if self._bucket is not None else None

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
            return self._accept(operation, request, plane)
        model = self._sagemaker.find_model(request, operation.endpoint)
        accept = request.headers.get(_ACCEPT, b"").decode("latin-1")[:1024] or request.accept
        response = await plane.infer(
            InferRequest(
                model,
                request.body,
                request.content_type,
                accept,
                request.deadline,
                request.client_gone,
                request.arrived,
                request.id,
                request.client,
            )
        )
        lines = response.content_type.startswith(LINES)
        body = await Pacer().run(write_events(await response.read(), lines=lines))
        headers = [(_CONTENT_TYPE, response.content_type.encode()), *self._sagemaker.make_headers(request)]
        return HttpReply(OK, MEDIA, body, headers, response.stats)

    def _accept(self, operation: EndpointOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """Start an asynchronous invocation, and say where its answer will be. Raises Refused."""
        if self._bucket is None or self._jobs is None:
            message = "asynchronous invocations are not served: this server has no bucket to write answers to"
            raise Refused(Situation.BAD_REQUEST, f"{message} (async_output); call /endpoints/NAME/invocations")
        model = self._sagemaker.find_model(request, operation.endpoint)
        if not plane.permits(model):
            raise Refused(Situation.FORBIDDEN, f"the token does not allow to ask {model}")
        call = read_call(request, self._bucket)
        nobody = HttpRequest("POST", request.path, {}, asyncio.Event().wait, id=request.id)
        job = Job(call, model, request.body, plane, time.monotonic(), request.id, request.client)
        self._jobs.accept(job, lambda why: self.refused(why, nobody).body)
        headers = [
            (_OUTPUT_LOCATION, f"{self._bucket.url}/{call.output}".encode()),
            (_FAILURE_LOCATION, f"{self._bucket.url}/{call.failure}".encode()),
            *self._sagemaker.make_headers(request),
        ]
        return HttpReply(ACCEPTED, contract.JSON, msgspec.json.encode({"InferenceId": call.id}), headers)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """As SageMaker's dialect says it: before the first frame an error is a plain one."""
        return self._sagemaker.refused(why, request)
