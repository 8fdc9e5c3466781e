"""The routes of the console: the page and its files, and what it asks besides `/fleet/...` of operators' programs.

The page takes nothing from elsewhere, and its policy forbids it to. It holds no data: what it shows it asks for, with
the operator's token where one is needed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_store.names import parse_model_name
from server.contract import JSON
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ReadSample, TryModel
from server.routes.example_requests import NoExample, make_forecast_example
from server.supervisor.docs_routes import SAFE_PAGE
from server.supervisor.fleet_operations import FleetOperations
from server.supervisor.request_bodies import read_body
from server.supervisor.workers import Workers

MAX_TRIAL_BYTES = 1024 * 1024  #: of a request that an operator tries
FILES = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "shapes.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_FOLDER = Path(__file__).parent
_POLICY = "content-security-policy"
_SAFE = {**SAFE_PAGE, _POLICY: f"{SAFE_PAGE[_POLICY]}; img-src 'self'"}  #: its icon is a file of its own


def list_console_routes(workers: Workers, operations: FleetOperations) -> list[Route]:
    """`/`, `/console/FILE`, `/fleet/sample/MODEL` and `/fleet/try/MODEL`."""
    page = (_FOLDER / "console.html").read_bytes()
    files = {name: (_FOLDER / name).read_bytes() for name in FILES}

    async def console(_: Request) -> Response:
        return Response(page, media_type="text/html", headers=_SAFE)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in files:
            raise ControlError(f"the console has no file {name[:100]!r}", Situation.NOT_FOUND)
        return Response(files[name], media_type=FILES[name], headers=_SAFE)

    async def sample(request: Request) -> Response:
        model = parse_model_name(request.path_params["model"])
        golden = await workers.ask(workers.home(model), ReadSample(model))
        if golden:
            return JSONResponse({"model": model, "source": "golden", "body": msgspec.json.decode(golden)})
        page = await operations.list_models(prefix=model, whole=True)
        holders = page.rows[0]["holders"] if page.rows and page.rows[0]["model"] == model else []
        recipe: Mapping[str, Any] = next((holder["forecast"] for holder in holders if "forecast" in holder), {})
        try:
            return JSONResponse({"model": model, "source": "example", "body": make_forecast_example(recipe)})
        except NoExample as error:
            what = f"{model} has no golden sample, and {error}; load it first, or write the request yourself"
            raise ControlError(what, Situation.NOT_FOUND) from None

    async def try_model(request: Request) -> Response:
        model = parse_model_name(request.path_params["model"])
        body = await read_body(request, MAX_TRIAL_BYTES)
        answer = await workers.ask(workers.home(model), TryModel(model, body))
        return Response(answer, media_type=JSON)

    return [
        Route("/", console),
        Route("/console/{file}", file),
        Route("/fleet/sample/{model:path}", sample),
        Route("/fleet/try/{model:path}", try_model, methods=["POST"]),
    ]
