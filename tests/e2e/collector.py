"""A collector of traces: it takes OTLP over HTTP as OpenTelemetry's own does, and keeps the spans."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.http_servers import serve_on_thread
from tests.patience import wait_until


@dataclass(frozen=True)
class Seen:
    """One span. Ids in hexadecimal, times in nanoseconds; `error`: what its status says, None where that is unset."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    began: int
    ended: int
    attributes: Mapping[str, Any]
    error: str | None
    state: str

    @property
    def place(self) -> tuple[int, int]:
        """What orders it: when it began, a longer one before those within it."""
        return self.began, -self.ended


@dataclass
class Collector:
    """`status`: what it answers; the spans are kept where that is 200."""

    url: str = ""
    status: int = 200
    spans: list[Seen] = field(default_factory=list)
    resources: list[Mapping[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)

    def find(self, trace_id: str) -> list[Seen]:
        """The spans of a trace, in order."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.place)

    def await_trace(self, trace_id: str) -> list[Seen]:
        """The spans of a trace, once it is here: a trace leaves as a whole."""
        return wait_until(lambda: self.find(trace_id), f"the trace {trace_id} arrives")

    def take(self, path: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The status of one request."""
        if path != "/v1/traces" or headers["content-type"] != "application/x-protobuf":
            return 404
        if self.status == 200:
            self.headers.append(headers)
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(_read_attributes(each.resource.attributes))
                self.spans += [_read_span(span) for scope in each.scope_spans for span in scope.spans]
        return self.status


def _read_attributes(found: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in found}


def _read_span(span: Any) -> Seen:
    return Seen(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _read_attributes(span.attributes),
        span.status.message if span.status.code == 2 else None,
        span.trace_state,
    )


@contextmanager
def run_collector() -> Iterator[Collector]:
    """A collector until the end of the block."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(collector.take(self.path, body, headers))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: a test's output is its own."""

    with serve_on_thread(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        collector.url = f"http://{address}"
        yield collector
