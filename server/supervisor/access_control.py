"""What protects the management and metrics listeners: where they may listen, which requests they take, the audit log.

Checks themselves are in `server.access`. A request passes when it is not another site's (`Sites`) and, where tokens are
configured, shows one with the listener's scope and for the model in its path. `/ping` and `/ready` are open.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import structlog
from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse

from server.access.access_keys import read_access_keys
from server.access.sites import Sites, WrongSite, is_loopback
from server.access.tls import CLIENT_NAME, open_tls
from server.access.tokens import Forbidden, Scope, Token, TokenFile, Unauthorized
from server.contract import ACCURACY_PAGE_PATH, ACCURACY_PATH
from server.errors import Situation
from server.settings import Settings
from server.supervisor.grpc_port import require_grpcio

LOOPBACK = "127.0.0.1"
OPEN_PATHS = ("/ping", "/ready")
ACCURACY_PATHS = (ACCURACY_PATH, ACCURACY_PAGE_PATH)
#: The console and its files need no token: they hold no data, and a browser sends no token when it opens a page.
CONSOLE_PATH, CONSOLE_FILES = "/", "/console/"
#: The listeners that only operators use, with the scope that a token needs there.
PROTECTED = {"management": Scope.MANAGE, "metrics": Scope.METRICS}
READING = ("GET", "HEAD", "OPTIONS")  #: methods that change nothing
_OF_MODEL = re.compile(r"/fleet/([^/]+)/(.+)", re.DOTALL)
_STATUS = {Situation.UNAUTHORIZED: 401, Situation.FORBIDDEN: 403, Situation.NOT_READY: 503}

log = structlog.get_logger()

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Send], Awaitable[None]]


def listener_hosts(settings: Settings) -> Mapping[str, str]:
    """The address of each listener. Management and metrics stay on loopback unless theirs is named."""
    unnamed = settings.host if is_loopback(settings.host) else LOOPBACK
    return {
        "inference": settings.inference_host or settings.host,
        "management": settings.management_host or unnamed,
        "metrics": settings.metrics_host or unnamed,
    }


def open_tokens(settings: Settings) -> TokenFile | None:
    """The tokens, where there are any. Raises ValueError that names the file and what is wrong with it."""
    return None if settings.tokens is None else TokenFile(settings.tokens)


def read_secrets(settings: Settings) -> Settings:
    """The settings with the keys of `access_keys_file` in `access_keys`.

    Raises ValueError where a file of secrets or certificates cannot be used, or where other hosts could reach the
    management or metrics listener without a token or certificate, and where gRPC is asked for and cannot be had.
    """
    tokens = open_tokens(settings)
    open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    for name, scope in PROTECTED.items():
        host = listener_hosts(settings)[name]
        protected = settings.tls_client_ca is not None or (tokens is not None and tokens.current.allow(scope))
        if not (protected or is_loopback(host)):
            raise ValueError(
                f"other hosts could use the {name} listener at {host} without a token: set tokens (a file with one of "
                f"the scope {scope}) or tls_client_ca, or leave out {name}_host to have it on {LOOPBACK}"
            )
    if settings.access_keys_file is not None:
        keys = {**read_access_keys(settings.access_keys_file), **settings.access_keys}
        settings = settings.model_copy(update={"access_keys": keys})
    if settings.node_name and not (settings.nodes_file and settings.node_key_file):
        raise ValueError("node_name needs nodes_file and node_key_file: set all three, or none")
    if settings.grpc_port is not None or settings.grpc_management_port is not None:
        require_grpcio()
        if settings.access_keys and tokens is None:
            raise ValueError("calls by gRPC cannot be signed: set tokens beside access_keys, or leave out grpc_port")
    if settings.grpc_management_port is not None and settings.model_server_api != "torchserve":
        raise ValueError("grpc_management_port is for TorchServe's service: leave it out, or set model_server_api")
    return settings


class AccessControl:
    """An ASGI application in front of another, which gets only requests that may be made there.

    What may change something by the management API is logged, whatever becomes of it: `management_call` with the names
    of the token and of the client's certificate (`-` without one), the peer's address, verb, model and status.
    """

    def __init__(self, app: App, scope: Scope, sites: Sites, tokens: TokenFile | None) -> None:
        self._app, self._scope, self._sites, self._tokens = app, scope, sites, tokens

    def __repr__(self) -> str:
        """For example `<AccessControl manage, <Sites 127.0.0.1, localhost>, <TokenFile ...>>`."""
        return f"<AccessControl {self._scope}, {self._sites!r}, {self._tokens!r}>"

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """One request: refused with 401 or 403, or handed on."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        token, status, has_begun = None, 500, False

        async def send_and_note(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
            await send(message)

        app = self._app
        try:
            token = self._find_caller(scope)
            self._check(scope, token)
        except Unauthorized as error:
            app = error_reply(Situation.UNAUTHORIZED, str(error), {"www-authenticate": "Bearer"})
        except (Forbidden, WrongSite) as error:
            app = error_reply(Situation.FORBIDDEN, str(error))
        try:
            await app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # the listener stops, and the time for running requests is over
            if not has_begun:
                stopping = error_reply(Situation.NOT_READY, "the server is stopping; what was asked may have happened")
                await stopping(scope, receive, send_and_note)
        finally:
            if self._scope is Scope.MANAGE and scope["method"] not in READING:
                _audit(scope, token, status)

    def _find_caller(self, scope: Any) -> Token | None:
        """The token that the request shows; None where none is needed. Raises WrongSite, Unauthorized."""
        headers = dict(scope["headers"])
        self._sites.check(headers, reached_at=(scope.get("server") or ("",))[0])
        if self._scope is Scope.MANAGE and scope["method"] == "GET" and _is_console(scope["path"]):
            return None
        return None if self._tokens is None else self._tokens.current.find(headers.get(b"authorization"))

    def _check(self, scope: Any, token: Token | None) -> None:
        """That the token allows the request. Raises Forbidden.

        A list of models is allowed to a token of some models where the query's `prefix` is within its own.
        """
        if token is None:
            return
        path, found = scope["path"], _OF_MODEL.fullmatch(scope["path"])
        model = found[2] if found else ""
        if path in ("/fleet/models", *ACCURACY_PATHS):
            model = QueryParams(scope["query_string"]).get("prefix", "")
        token.require(self._scope, model or None)
        if not model or (found and found[1] == "alias"):  # an alias may stand for any model
            token.require_all_models(path[:200])


def _is_console(path: str) -> bool:
    return path == CONSOLE_PATH or path.startswith(CONSOLE_FILES)


def error_reply(situation: Situation, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal of these listeners: 401, 403 or 503, its body as all their errors have it."""
    error = {"code": situation.name.lower(), "message": message}
    return JSONResponse({"error": error}, status_code=_STATUS[situation], headers=headers)


def _audit(scope: Any, token: Token | None, status: int) -> None:
    found = _OF_MODEL.fullmatch(scope["path"])
    verb, model = (found[1], found[2]) if found else (scope["path"], "")
    log.info(
        "management_call",
        token=token.name if token else "-",
        certificate=scope.get(CLIENT_NAME, "-"),
        peer=(scope.get("client") or ("-",))[0],
        verb=verb[:100],
        model=model[:1000],
        status=status,
    )
