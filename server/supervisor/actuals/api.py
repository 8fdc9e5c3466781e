"""The routes of `server.supervisor.actuals` on the management listener: for programs, the page, and to forget."""

from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_store.names import parse_versioned_name
from server.contract import ACCURACY_PAGE_PATH, ACCURACY_PATH
from server.errors import Situation
from server.ipc.control import ControlError
from server.supervisor.actuals.page import render_page
from server.supervisor.actuals.report import list_reports
from server.supervisor.actuals.service import ActualsService
from server.supervisor.docs_routes import SAFE_PAGE

MOST_LISTED = 1000
PAGE_ROWS = 100  #: archives of the page, which draws each
CSS = "accuracy.css"
_SAFE = {
    **SAFE_PAGE,  # but for its policy: this page has no script at all
    "content-security-policy": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cache-control": "no-store",
}


def list_accuracy_routes(service: ActualsService) -> list[Route]:
    """`/fleet/accuracy`, `/accuracy` with its style, and `/fleet/forget`."""
    style = Path(__file__).with_name(CSS).read_bytes()

    async def accuracy(request: Request) -> Response:
        query = request.query_params
        try:
            limit = min(MOST_LISTED, max(1, int(query.get("limit", "100"))))
        except ValueError:
            raise ControlError("limit must be a number", Situation.BAD_REQUEST) from None
        whole = query.get("days", "") not in ("", "0")
        reports, more = list_reports(service.book, query.get("prefix", ""), query.get("after", ""), limit, whole=whole)
        found = {"models": msgspec.to_builtins(reports), "next_after": reports[-1].model if more else None}
        return JSONResponse({**found, "kept": service.is_on})

    async def page(request: Request) -> Response:
        query = request.query_params
        prefix = query.get("prefix", "")
        reports, more = list_reports(service.book, prefix, query.get("after", ""), PAGE_ROWS, whole=True)
        html = render_page(reports, is_on=service.is_on, prefix=prefix, following=reports[-1].model if more else None)
        return Response(html, media_type="text/html", headers=_SAFE)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if name != CSS:
            message = f"the page has no file {name[:100]!r}; see {ACCURACY_PAGE_PATH}"
            return JSONResponse({"error": {"code": "no_route", "message": message}}, status_code=404)
        return Response(style, media_type="text/css", headers=_SAFE)

    async def forget(request: Request) -> Response:
        return JSONResponse(await service.reset(parse_versioned_name(request.path_params["model"])))

    return [
        Route(ACCURACY_PATH, accuracy),
        Route(ACCURACY_PAGE_PATH, page),
        Route(f"{ACCURACY_PAGE_PATH}/{{file}}", file),
        Route("/fleet/forget/{model:path}", forget, methods=["POST"]),
    ]
