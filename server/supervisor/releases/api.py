"""The routes of rollbacks and aliases on the management listener."""

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.names import parse_model_name, parse_version
from server.errors import Situation
from server.ipc.control import ControlError
from server.supervisor.releases.service import ReleaseService
from server.supervisor.releases.table import AliasRequest
from server.supervisor.request_bodies import read_body

MAX_ALIAS_BYTES = 64 * 1024

_ALIAS = msgspec.json.Decoder(AliasRequest)


def list_release_routes(service: ReleaseService) -> list[Route]:
    """`/fleet/rollback`, `/fleet/follow`, `/fleet/versions`, `/fleet/alias` and `/fleet/aliases`."""

    async def rollback(request: Request) -> Response:
        wanted = request.query_params.get("version", "")
        model = parse_model_name(request.path_params["model"])
        return JSONResponse(await service.rollback(model, parse_version(wanted) if wanted else ""))

    async def follow(request: Request) -> Response:
        return JSONResponse(await service.follow(parse_model_name(request.path_params["model"])))

    async def versions(request: Request) -> Response:
        return JSONResponse(await service.list_versions(parse_model_name(request.path_params["model"])))

    async def alias(request: Request) -> Response:
        name = parse_model_name(request.path_params["model"])
        if request.method == "DELETE":
            return JSONResponse(await service.remove_alias(name))
        try:
            asked = _ALIAS.decode(await read_body(request, MAX_ALIAS_BYTES))
        except FAULTS as error:
            message = f"not an alias: {explain_fault(error)}; send model, and perhaps version and canary with share"
            raise ControlError(message, Situation.BAD_REQUEST) from None
        return JSONResponse(await service.set_alias(name, asked))

    async def aliases(_: Request) -> Response:
        return JSONResponse(service.describe())

    return [
        Route("/fleet/rollback/{model:path}", rollback, methods=["POST"]),
        Route("/fleet/follow/{model:path}", follow, methods=["POST"]),
        Route("/fleet/versions/{model:path}", versions),
        Route("/fleet/alias/{model:path}", alias, methods=["POST", "DELETE"]),
        Route("/fleet/aliases", aliases),
    ]
