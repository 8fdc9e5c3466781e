"""Multi Model Server's management API on the management listener (Starlette)."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.ipc.operations import ManageModels
from server.model_server_api.bodies import JSON, NO_CACHE, encode_pretty
from server.model_server_api.mms_description import describe_api
from server.supervisor.model_server_api.mms import MODELS, MultiModelApi
from server.supervisor.model_server_api.parameters import MAX_BODY
from server.supervisor.request_bodies import read_body

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")


def list_mms_routes(api: MultiModelApi) -> list[Route]:
    """`/models`, `/models/{name}` and the description."""

    async def manage(request: Request) -> Response:
        body = await read_body(request, MAX_BODY)
        asked = ManageModels(request.method, request.scope["path"], request.url.query, body)
        reply = await api.answer(asked)
        return _make_response(reply.body, reply.status)

    async def describe(_: Request) -> Response:
        return _make_response(encode_pretty(describe_api(predicts=False)))

    return [
        Route(MODELS, manage, methods=METHODS),
        Route(f"{MODELS}/{{name:path}}", manage, methods=METHODS),
        Route("/", describe, methods=["OPTIONS"]),
        Route("/api-description", describe, methods=["GET", "OPTIONS"]),
    ]


def _make_response(body: bytes, status: int = 200) -> Response:
    response = Response(body, status, media_type=JSON)
    response.raw_headers += NO_CACHE
    return response
