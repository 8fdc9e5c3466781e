"""SageMaker's response streams and asynchronous invocations, as boto3 asks for them (CONTRACTS 11).

Neither operation of boto3's has a target model: the inference component names it, or the endpoint, or the operator. An
answer is read to its end before its first frame, so that whatever goes wrong is a plain error of SageMaker's.
"""

import re
from dataclasses import dataclass

from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.dataplane import InferencePlane, InferRequest
from server.front.dialects.sagemaker import SageMaker
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit, wrong_method
from server.front.forecasting.event_stream import MEDIA, write_events
from server.front.slices import Pacer
from server.routes.inference import SAGEMAKER_STREAMS
from server.settings import Settings

OK = 200
LINES = "application/jsonlines"
_PATH = re.compile(r"/endpoints/(.+)/(invocations-response-stream|async-invocations)", re.DOTALL)
_ACCEPT = raw_header("X-Amzn-SageMaker-Accept")
_CONTENT_TYPE = raw_header("X-Amzn-SageMaker-Content-Type")
_TARGET_MODEL = raw_header(contract.HEADER_TARGET_MODEL)


@dataclass(frozen=True)
class EndpointOperation(DialectOperation):
    """What is asked of an endpoint, by the name in the path."""

    endpoint: str = ""


class SageMakerStreams:
    """See the module. Errors are SageMaker's."""

    name = "sagemaker_streams"
    routes = SAGEMAKER_STREAMS
    paths = "/endpoints/NAME/invocations-response-stream"

    def __init__(self, settings: Settings) -> None:
        self._sagemaker = SageMaker(settings)
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """POST to an endpoint's stream, or its queue."""
        del query
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        if method != "POST":
            raise wrong_method(method)
        return EndpointOperation(found[2], self._limit, found[1])

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer in frames. Raises Refused for what is asynchronous: answers would need a bucket."""
        assert isinstance(operation, EndpointOperation), "`match` makes no other"
        if operation.name == "async-invocations":
            message = "asynchronous invocations are not served: this server has no bucket to write answers to"
            raise Refused(Situation.BAD_REQUEST, f"{message}; call /endpoints/NAME/invocations")
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

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """As SageMaker's dialect says it: before the first frame an error is a plain one."""
        return self._sagemaker.refused(why, request)
