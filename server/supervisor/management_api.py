"""The management and metrics listeners (Starlette), and the server's life from sockets to drained.

Runs in the supervisor's process. Model names have slashes, so paths put the verb first: `POST /fleet/load/au/NSW1.mar`.
"""

import asyncio
import http
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_store.names import InvalidModelName, ModelName, parse_model_name, parse_versioned_name
from server.access.sites import Sites
from server.access.tls import open_tls
from server.contract import EVENTS_PATH, TARGETS_PATH
from server.errors import Situation
from server.host import raise_open_files_limit
from server.http_listener import Listener, make_listener
from server.ipc.control import ControlError
from server.model_server_api.bodies import encode_pretty
from server.model_server_api.torchserve_description import describe_metrics
from server.routes.example_requests import NoExample, make_forecast_example
from server.sdk import __version__
from server.settings import Settings
from server.supervisor.access_control import PROTECTED, AccessControl, listener_hosts, open_tokens, read_secrets
from server.supervisor.actuals.api import list_accuracy_routes
from server.supervisor.cluster_view import ClusterView
from server.supervisor.console.routes import list_console_routes
from server.supervisor.docs_routes import list_docs_routes
from server.supervisor.exemplars import render_open_metrics, wants_open_metrics
from server.supervisor.grpc_port import format_target, hold_port, list_grpc_ports
from server.supervisor.model_server_api.mms_routes import list_mms_routes
from server.supervisor.model_server_api.torchserve import TorchServeApi
from server.supervisor.model_server_api.torchserve_answers import refuse_path, reply
from server.supervisor.model_server_api.torchserve_metrics import CpuClock, HostFamilies, NamedFamilies
from server.supervisor.node_label import label_exemplars, label_registry
from server.supervisor.overview import Overview
from server.supervisor.releases.api import list_release_routes
from server.supervisor.request_bodies import read_body
from server.supervisor.stop_signals import StopSignals
from server.supervisor.store_watch.events import MAX_EVENT_BYTES, BadEvent, parse_event
from server.supervisor.store_watch.watch import TooManyEvents
from server.supervisor.supervisor import Supervisor

log = structlog.get_logger()

MAX_PAGE = 1000
_STATUS = {
    Situation.BAD_NAME: 400,
    Situation.BAD_REQUEST: 400,
    Situation.FORBIDDEN: 403,
    Situation.TOO_LARGE: 413,
    Situation.OVERLOADED: 503,
    Situation.NOT_FOUND: 404,
    Situation.ARCHIVE_FAILED: 422,
    Situation.STORE_FAILED: 503,
    Situation.NO_ROOM: 507,
    Situation.NOT_READY: 503,
    Situation.WORKER_LOST: 503,
    Situation.DEADLINE: 504,
}

Verb = Callable[[ModelName], Awaitable[dict[str, object]]]


def management_app(supervisor: Supervisor, addresses: Mapping[str, str]) -> Starlette:
    """`/fleet/...`: lists models and processes; loads, unloads, pins, releases from quarantine.

    Errors are `{"error": {code, message}}`. `addresses`: of the listeners, by name, for the document of all routes.
    """
    operations = supervisor.operations

    async def models(request: Request) -> Response:
        after, prefix = request.query_params.get("after", ""), request.query_params.get("prefix", "")
        try:
            limit = min(MAX_PAGE, max(1, int(request.query_params.get("limit", "100"))))
        except ValueError:
            return _make_error_response(Situation.BAD_REQUEST, 400, "limit must be a number")
        page = await operations.list_models(prefix, after, limit)
        listed = {"models": page.rows, "next_after": page.rows[-1]["model"] if page.more else None}
        found = {**listed, **({"unheard_workers": page.unheard} if page.unheard else {})}
        return Response(msgspec.json.encode(found), media_type="application/json")  # a sixth of the time of json.dumps

    async def describe(request: Request) -> Response:
        name = parse_model_name(request.path_params["model"])
        rows, *_ = await operations.list_models(
            prefix=name, whole=True
        )  # of all with this prefix the name itself comes first
        if not rows or rows[0]["model"] != name:
            message = f"{name} is not resident, loading, failed or pinned here; POST /fleet/load/{name} loads it"
            return _make_error_response(Situation.NOT_FOUND, 404, message)
        return JSONResponse(rows[0] | _make_example(rows[0]["holders"]))

    def post(verb: Verb) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(await verb(parse_versioned_name(request.path_params["model"])))

        return endpoint

    verbs = {name: getattr(operations, name) for name in ("load", "unload", "pin", "unpin", "reload", "release")}
    routes = [Route(f"/fleet/{name}/{{model:path}}", post(verb), methods=["POST"]) for name, verb in verbs.items()]
    routes += [
        Route("/fleet/models", models),
        Route("/fleet/models/{model:path}", describe),
        Route(EVENTS_PATH, _make_events_endpoint(supervisor), methods=["POST"]),
        *list_release_routes(supervisor.releases),
        *list_docs_routes(supervisor.settings, addresses),
        *list_accuracy_routes(supervisor.actuals),
        *_list_status_routes(supervisor),
        *list_console_routes(supervisor.workers, operations),
    ]
    routes += _list_model_server_routes(supervisor)
    handlers = {ControlError: _control_error, InvalidModelName: _bad_name, HTTPException: _no_such_path}
    return Starlette(routes=routes, exception_handlers=handlers)


def _list_status_routes(supervisor: Supervisor) -> list[Route]:
    """How the server is, and what it does."""
    shared = Overview(supervisor.metrics, partial(_describe_server, supervisor))
    cluster = supervisor.cluster = ClusterView(supervisor.settings.node_name, supervisor.fronts, shared)

    async def ready(_: Request) -> Response:
        found = supervisor.readiness()
        return JSONResponse(msgspec.to_builtins(found), status_code=found.status)

    async def processes(_: Request) -> Response:
        return JSONResponse({"processes": supervisor.processes()})

    async def overview(_: Request) -> Response:
        return JSONResponse(await shared.read())

    async def nodes(_: Request) -> Response:
        return JSONResponse(await cluster.read())

    async def ping(_: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    return [
        Route("/fleet/processes", processes),
        Route("/fleet/overview", overview),
        Route("/fleet/nodes", nodes),
        Route("/ping", ping),
        Route("/ready", ready),
    ]


def _describe_server(supervisor: Supervisor) -> dict[str, object]:
    """What `/fleet/overview` says of the server that no metric says."""
    ready = msgspec.to_builtins(supervisor.readiness())
    return {
        "version": __version__,
        "store": supervisor.settings.store,
        "node": supervisor.settings.node_name,
        "ready": ready["ready"],
        "processes": supervisor.processes(),
    }


def _list_model_server_routes(supervisor: Supervisor) -> list[Route]:
    """The management API of the archived server whose clients come here."""
    settings = supervisor.settings
    if settings.model_server_api == "mms" or settings.container != "off":
        return list_mms_routes(supervisor.multi_model_api)
    return TorchServeApi(supervisor.registrations, settings).list_routes()


def metrics_app(supervisor: Supervisor) -> Starlette:
    """`/metrics`, merged over all processes. `?name[]=` leaves only families of these names, as TorchServe has it.

    Prometheus asks for OpenMetrics, which has exemplars. `/targets` tells it the nodes (its HTTP service discovery).
    """
    clock = CpuClock()

    async def metrics(request: Request) -> Response:
        registry = CollectorRegistry()
        merged = await supervisor.metrics()
        registry.register(merged)
        if supervisor.registrations.is_used:
            registry.register(HostFamilies(merged, supervisor.settings.disk_cache, clock))
        names = request.query_params.getlist("name[]")
        if names:
            named = NamedFamilies(registry, names)
            registry = CollectorRegistry()
            registry.register(named)
        node = supervisor.settings.node_name
        registry = label_registry(registry, node)
        if wants_open_metrics(request.headers.get("accept", "")):
            exemplars = label_exemplars(await supervisor.list_exemplars(), node)
            body, media_type = render_open_metrics(registry, exemplars)
            return Response(body, media_type=media_type)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def targets(request: Request) -> Response:
        assert supervisor.cluster is not None, "the management listener has made it"
        found = await supervisor.cluster.list_targets(request.url.netloc)
        return JSONResponse([{"targets": found, "labels": {}}])

    async def describe(_: Request) -> Response:
        return reply(encode_pretty(describe_metrics()))

    routes = [Route("/metrics", metrics), Route(TARGETS_PATH, targets), Route("/", describe, methods=["OPTIONS"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse_path, ControlError: _control_error})


def bind_socket(host: str, port: int, name: str) -> socket.socket:
    """A listening socket. Raises OSError whose message names the flags to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as error:
        sock.close()
        what = f"cannot listen on {host}:{port}: {error.strerror}"
        raise OSError(f"{what}; choose another port with --{name}-port or address with --{name}-host") from error
    sock.listen(2048)
    return sock


@asynccontextmanager
async def run_server(settings: Settings, signals: StopSignals) -> AsyncIterator[tuple[Supervisor, dict[str, str]]]:
    """The whole server: yields the supervisor and the listeners' addresses once everything is ready, drains on exit.

    Raises OSError, ValueError or StartFailed when it cannot start. Nothing is left behind, also when `signals` end it.
    """
    raise_open_files_limit()
    settings = read_secrets(settings)
    async with AsyncExitStack() as stack:
        hosts = {**listener_hosts(settings), "node": settings.node_host}
        ports = {
            "inference": settings.inference_port,
            "management": settings.management_port,
            "metrics": settings.metrics_port,
            **({"node": settings.node_port} if settings.node_name else {}),
        }
        socks = {name: stack.enter_context(bind_socket(hosts[name], port, name)) for name, port in ports.items()}
        scheme = "http" if settings.tls_certificate is None else "https"
        addresses = {name: _format_address(sock, scheme) for name, sock in socks.items()}
        targets = {
            name: format_target(stack.enter_context(hold_port(host, port)))
            for name, (host, port) in list_grpc_ports(settings, hosts["management"]).items()
        }
        addresses |= {name: f"grpc{scheme.removeprefix('http')}://{target}" for name, target in targets.items()}
        supervisor = Supervisor(settings, grpc=targets)
        signals.call_at_once(supervisor.end_at_once)
        listeners: list[tuple[Listener, asyncio.Task[None]]] = []
        stack.push_async_callback(_stop, supervisor, listeners)
        management = management_app(supervisor, addresses)
        for name, app in (("management", management), ("metrics", metrics_app(supervisor))):
            tls = open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            sites = Sites([hosts[name]], settings.allowed_hosts)
            checked = AccessControl(app, PROTECTED[name], sites, open_tokens(settings))
            server = make_listener(checked, 1, settings.client_timeout_s, settings.keep_alive_s, tls)
            if name == "management":
                supervisor.management = checked
            listeners.append((server, asyncio.create_task(server.serve(sockets=[socks[name]]))))
        await supervisor.start(*(socks[name] for name in ("inference", "node") if name in socks))
        if settings.announce is not None:
            forget = partial(settings.announce.unlink, missing_ok=True)
            signals.call_at_once(forget)
            stack.callback(forget)
            _write_atomically(settings.announce, json.dumps(addresses) + "\n")
        yield supervisor, addresses


def _make_events_endpoint(supervisor: Supervisor) -> Callable[[Request], Awaitable[Response]]:
    """`POST /fleet/events`: what a store says of changed archives. Answered before they are reloaded."""

    async def events(request: Request) -> Response:
        try:
            changes = parse_event(await read_body(request, MAX_EVENT_BYTES), supervisor.settings.store)
            supervisor.operations.tell_changed(changes.models)
        except BadEvent as error:
            raise ControlError(str(error), Situation.BAD_REQUEST) from None
        except TooManyEvents as error:
            raise ControlError(str(error), Situation.OVERLOADED) from None
        return JSONResponse({"accepted": len(changes.models), "ignored": changes.ignored}, status_code=202)

    return events


def _make_example(holders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A body that the model answers, where its holders say that it forecasts."""
    recipe = next((holder["forecast"] for holder in holders if "forecast" in holder), None)
    if recipe is None:
        return {}
    try:
        return {"example": make_forecast_example(recipe)}
    except NoExample as error:
        return {"no_example": str(error)}


async def _stop(supervisor: Supervisor, listeners: Sequence[tuple[Listener, asyncio.Task[None]]]) -> None:
    """End all at the same time. What fails keeps none of the others from ending."""
    for listener, _ in listeners:
        listener.stop()
    ended = await asyncio.gather(supervisor.stop(), *(task for _, task in listeners), return_exceptions=True)
    for each in ended:
        if isinstance(each, BaseException):
            raise each


def _write_atomically(path: Path, text: str) -> None:
    """Replace the file at once: a reader never sees half of it. The draft is a new file, so no link is followed."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            os.fchmod(descriptor, 0o644)  # addresses are no secret
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _format_address(sock: socket.socket, scheme: str) -> str:
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _make_error_response(situation: Situation, status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": situation.name.lower(), "message": message}}, status_code=status)


async def _control_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ControlError)
    situation = Situation(error.situation) if error.situation else Situation.INTERNAL
    return _make_error_response(situation, _STATUS.get(situation, 500), str(error))


async def _bad_name(_: Request, error: Exception) -> Response:
    return _make_error_response(Situation.BAD_NAME, 400, str(error))


async def _no_such_path(request: Request, error: Exception) -> Response:
    if not request.url.path.startswith("/fleet/"):  # other paths may be those of clients of an archived server
        return refuse_path(request, error)
    assert isinstance(error, HTTPException)
    situation = Situation.BAD_METHOD if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED else Situation.NO_ROUTE
    return _make_error_response(
        situation, error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}; see /fleet/models"
    )
