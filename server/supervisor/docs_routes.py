"""`/openapi.json`, and `/docs`: a page of all routes with requests to try. Runs in the supervisor's process.

The page takes nothing from elsewhere, and its policy forbids it to: neither scripts, nor styles, nor other listeners.
"""

from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.contract import DOCS_PATH, OPENAPI_PATH
from server.routes.inference import choose_protocols
from server.routes.management import METRICS, choose_management
from server.routes.openapi import build_document
from server.sdk import __version__
from server.settings import Settings

_FOLDER = Path(__file__).with_name("docs_page")
_FILES = {"docs.css": "text/css", "docs.js": "text/javascript"}
#: Headers of a page that takes nothing from elsewhere.
SAFE_PAGE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def list_docs_routes(settings: Settings, addresses: Mapping[str, str]) -> list[Route]:
    """The routes. `addresses`: of the listeners, by name."""
    inference = choose_protocols(settings.model_server_api, settings.container)
    asked = {
        "inference": inference,
        "management": choose_management(settings.model_server_api, settings.container),
        "metrics": (METRICS,),
    }
    listeners = [(addresses.get(name, "/"), protocols) for name, protocols in asked.items()]
    document = build_document(__version__, listeners)
    page = (_FOLDER / "docs.html").read_bytes()
    files = {name: (_FOLDER / name).read_bytes() for name in _FILES}

    async def openapi(_: Request) -> Response:
        return JSONResponse(document)

    async def docs(_: Request) -> Response:
        return Response(page, media_type="text/html", headers=SAFE_PAGE)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in files:
            message = f"the page has no file {name[:100]!r}; see {DOCS_PATH}"
            return JSONResponse({"error": {"code": "no_route", "message": message}}, status_code=404)
        return Response(files[name], media_type=_FILES[name], headers=SAFE_PAGE)

    return [Route(OPENAPI_PATH, openapi), Route(DOCS_PATH, docs), Route(f"{DOCS_PATH}/{{file}}", file)]
