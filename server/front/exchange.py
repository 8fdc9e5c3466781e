"""What a dialect works with: an HTTP request and its reply, and what a dialect is. Runs in a front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from server.errors import Refused, Situation
from server.front.chunks import Chunks
from server.front.inference import ClientWatch, InferResponse, InferStats
from server.front.inference_plane import InferencePlane
from server.front.tracing.request_trace import RequestTrace
from server.routes.record import Protocol as Routes

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Limit:
    """The bytes that a body may have, and the setting that says so."""

    bytes: int
    setting: str

    def exceeded(self, size: int) -> Refused:
        """Why a body of `size` bytes is refused."""
        message = f"the body has {size} bytes or more, the limit is {self.bytes} ({self.setting})"
        return Refused(Situation.TOO_LARGE, message)


@dataclass(frozen=True)
class DialectOperation:
    """What method and path ask of a dialect. A dialect whose paths say more adds fields in a subclass."""

    name: str
    body_limit: Limit | None  #: None: an open operation, for which no body is read and no signature is asked


class HttpRequest(msgspec.Struct):
    """One HTTP request; for an operation that is not open, the fields from `content_type` on have been read."""

    method: str
    path: str
    headers: Mapping[bytes, bytes]  #: by lower-case name
    client_gone: ClientWatch
    query: bytes = b""  #: as it was sent
    id: bytes = b""  #: the client's own, or made by the app
    content_type: str = ""
    accept: str = ""
    deadline: float = 0.0  #: on the monotonic clock (s)
    body: bytes = b""
    arrived: float = 0.0  #: on the same clock: when all of the body was here
    client: str = ""  #: the name of its token, access key or certificate; empty where the server asks for none
    stats: InferStats | None = None  #: of forecasts whose dialect replies without `stats`, for their marks
    trace: RequestTrace | None = None  #: where it is sampled


class HttpReply(msgspec.Struct):
    """An answer to be sent. The app adds Content-Length, X-Request-Id and the headers that `stats` become.

    An empty `content_type` leaves the header out. `reason`: that of the status line; None for the usual one.
    `chunks`: a body that is sent while it is made, in the place of `body` and without Content-Length.
    """

    status: int
    content_type: str
    body: bytes
    headers: Headers = []
    stats: InferStats | None = None
    stream: InferResponse | None = None  #: the answer of which `body` is the first part
    counted: Sequence[int] | None = None  #: status codes that the metrics count; None: `status` once
    reason: str | None = None
    chunks: Chunks | None = None
    marked: InferStats | None = None  #: only for its marks: what the app takes of the request where `stats` are None


class Dialect(Protocol):
    """One protocol that clients speak: its paths, its requests, its replies and its errors.

    The registry is `server.front.dialects.DIALECTS`.
    """

    name: str  #: the metrics' label `protocol`
    routes: Routes  #: its part of the table of `server.routes.inference`, with which `match` agrees

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """The operation that is asked for; None for a path that is not this dialect's. `query`: as it was sent.

        Raises Refused(BAD_METHOD) for a path of this dialect with a method that it does not take.
        """

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The reply to a request. Raises Refused, ClientGone."""

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The reply that says why there is no answer. Any situation but OK can come."""


def list_code_headers(response: InferResponse) -> Headers:
    """The headers that an archive's code has set; none where it was not told of the request."""
    if response.head is None:
        return []
    return [(name.encode(), value.encode()) for name, value in response.head.headers]


def wrong_method(method: str) -> Refused:
    """Why an operation that is POSTed is not done."""
    return Refused(Situation.BAD_METHOD, f"requests are POSTed, not {method}")
