"""Calls of the management API that come by gRPC are checked and logged as those over HTTP."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from server.access.sites import Sites
from server.access.tls import CLIENT_NAME
from server.access.tokens import Scope, TokenFile, hash_token
from server.ipc.operations import CallManagement, ManagementAnswer
from server.supervisor.access_control import AccessControl
from server.supervisor.management_calls import call_management


async def show(request: Request) -> JSONResponse:
    """What the application sees."""
    who = [request.scope["client"][0], request.scope[CLIENT_NAME]]
    return JSONResponse([request.method, request.url.path, dict(request.query_params), who], status_code=202)


def call(folder: Path, token: str, **more: Any) -> ManagementAnswer:
    """A call before a file with a token `ops` that manages and one, `desk`, that does not."""
    rows = (
        f'[[tokens]]\nname = "{name}"\nsha256 = "{hash_token(name.encode())}"\nscopes = ["{scope}"]\n'
        for name, scope in (("ops", "manage"), ("desk", "invoke"))
    )
    path = folder / "tokens.toml"
    path.write_text("\n".join(rows))
    path.chmod(0o600)
    app = Starlette(routes=[Route("/models/{path:path}", show, methods=["GET", "POST"])])
    checked = AccessControl(app, Scope.MANAGE, Sites(["127.0.0.1"], []), TokenFile(path))
    shown = f"Bearer {token}" if token else ""
    asked = {"method": "POST", "path": "/models/au/a", "query": {"url": "b c.mar"}, "authorization": shown, **more}
    return asyncio.run(call_management(checked, CallManagement(peer="ipv4:127.0.0.1:1", certificate="CN:ops", **asked)))


def test_a_call_is_the_applications(tmp_path: Path) -> None:
    """Path and query arrive as they are, and for the log who it was."""
    answer = call(tmp_path, "ops")
    shown = ["POST", "/models/au/a", {"url": "b c.mar"}, ["ipv4:127.0.0.1:1", "CN:ops"]]
    assert (answer.status, json.loads(answer.body)) == (202, shown)


@pytest.mark.parametrize(("token", "status"), [("", 401), ("nobody", 401), ("desk", 403)])
def test_a_call_without_the_right_token_is_refused(tmp_path: Path, token: str, status: int) -> None:
    """As over HTTP: the front that hands it on has no rights of its own."""
    assert call(tmp_path, token).status == status
