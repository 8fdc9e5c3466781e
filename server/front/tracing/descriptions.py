"""Names and attributes of a front's spans, after OpenTelemetry's conventions for HTTP and RPC servers. Pure."""

import re
from collections.abc import Sequence
from functools import cache

from server.front.tracing.request_trace import MAX_TEXT, RequestTrace
from server.routes.record import Protocol

FAILED = 400  #: the least HTTP status that is no answer
_PARAMETER = re.compile(r"\\\{\w+\\\}")


def describe_http(
    trace: RequestTrace,
    method: str,
    path: str,
    routes: Protocol,
    request_id: bytes,
    status: int,
    statuses: Sequence[int],
) -> None:
    """Name the trace of an HTTP request. `statuses`: what was counted of it, one for each item of a call for many."""
    route = find_route(routes, method, path)
    trace.name = f"{method} {route}"
    trace.attributes = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "url.path": path[:MAX_TEXT],
        "fleetcast.protocol": routes.name,
        "fleetcast.request_id": request_id.decode("latin-1"),
    }
    if len(statuses) > 1:
        trace.attributes["fleetcast.items"] = len(statuses)
        trace.attributes["fleetcast.items_failed"] = sum(status >= FAILED for status in statuses)


def describe_rpc(trace: RequestTrace, path: str, request_id: bytes, code: int) -> None:
    """Name the trace of a call by gRPC. `path`: `/service/method`; `code`: gRPC's of its status."""
    trace.name = path.lstrip("/")
    service, _, method = trace.name.rpartition("/")
    trace.attributes = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": code,
        "fleetcast.request_id": request_id.decode("latin-1"),
    }


def find_route(routes: Protocol, method: str, path: str) -> str:
    """The route's template, such as `/v2/models/{model}/infer`: of few values, whatever the model's name."""
    for route in routes.routes:
        if route.method == method and _compile(route.path).fullmatch(path):
            return route.path
    return routes.main_path


@cache
def _compile(template: str) -> re.Pattern[str]:
    return re.compile(_PARAMETER.sub(".+", re.escape(template)), re.DOTALL)
