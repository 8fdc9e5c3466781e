"""TorchServe's management API on the management listener: registers, scales, describes and removes models.

Names have slashes here, so that a path is read from its beginning: the longest registered name wins, and what follows
is a version. `/fleet/...` stays this server's own, with names of archives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.model_server_api.bodies import encode_pretty, encode_status
from server.model_server_api.torchserve_description import describe_management, describe_management_of
from server.settings import Settings
from server.supervisor.model_server_api.parameters import parse_leniently, parse_registration, read_parameters
from server.supervisor.model_server_api.torchserve_answers import guard, refuse, reply
from server.supervisor.model_server_api.torchserve_versions import describe_version
from server.supervisor.registrations.refusals import ModelUnknown, VersionUnknown, shorten_name
from server.supervisor.registrations.service import RegistrationService, ScaleRequest
from server.supervisor.registrations.table import Registration

LIMIT = 100  #: models of one page by default, and at most
CUSTOMIZED = "customized"
CREDENTIALS = ("authorization", "proxy-authorization", "x-amz-security-token", "cookie")
SET_DEFAULT, ALL_VERSIONS = "set-default", "all"
ACCEPTED = 202
UPDATING = "Processing worker updates..."


class TorchServeApi:
    """See the module. `list_routes` for the listener."""

    def __init__(self, service: RegistrationService, settings: Settings) -> None:
        self._service, self._settings = service, settings

    def __repr__(self) -> str:
        """For example `<TorchServeApi over <RegistrationService ...>>`."""
        return f"<TorchServeApi over {self._service!r}>"

    def list_routes(self) -> list[Route]:
        """`/models`, `/models/{name}[/{version}][/set-default]`, `/v1/models/{name}`, and the description."""
        return [
            Route("/models", guard(self._collection), methods=["GET", "POST"]),
            Route("/models/", guard(self._collection), methods=["GET", "POST"]),
            Route("/models/{path:path}", guard(self._model), methods=["GET", "PUT", "DELETE", "OPTIONS"]),
            Route("/v1/models/{path:path}", guard(self._readiness), methods=["GET"]),
            Route("/", guard(self._describe_api), methods=["OPTIONS"]),
            Route("/api-description", guard(self._describe_api), methods=["GET"]),
        ]

    # --- what is asked of all models --------------------------------------------------------------------------------

    async def _collection(self, request: Request) -> Response:
        return await self._register(request) if request.method == "POST" else self._list(request)

    def _list(self, request: Request) -> Response:
        """A page of names. INVARIANT: a token is given only where more follow, so that no page is empty."""
        limit, start = (parse_leniently(request.query_params.get(key)) for key in ("limit", "next_page_token"))
        limit, start = limit if limit is not None and 0 < limit <= LIMIT else LIMIT, start or 0
        names = list(self._service.table)
        page = names[start : start + limit]
        more = {"nextPageToken": str(start + limit)} if start + limit < len(names) else {}
        models = [{"modelName": name, "modelUrl": self._service.table.find(name).url} for name in page]
        return reply(encode_pretty({**more, "models": models}))

    async def _register(self, request: Request) -> Response:
        parameters = await read_parameters(request)
        asked = parse_registration(parameters, self._settings)
        wait = parameters.parse_flag("synchronous") or not asked.options.min_workers
        found = await self._service.register(asked, wait=wait)
        if not wait:
            return reply(encode_status(UPDATING), ACCEPTED)
        workers = found.options.min_workers
        text = f'Model "{found.name}" Version: {found.version} registered with {workers} initial workers'
        text += self._note_most(found)
        if not workers:
            text += ". Use scale workers API to add workers for the model."
        return reply(encode_status(text))

    async def _describe_api(self, request: Request) -> Response:
        del request
        return reply(encode_pretty(describe_management(self._settings.code_timeout_s)))

    # --- what is asked of one ---------------------------------------------------------------------------------------

    async def _model(self, request: Request) -> Response:
        path, last = request.path_params["path"], ""
        if request.method == "PUT" and path.endswith(f"/{SET_DEFAULT}"):
            path, last = path.removesuffix(f"/{SET_DEFAULT}"), SET_DEFAULT
        where = self._find_place(path)
        match request.method:
            case "GET" | "HEAD":
                return await self._describe(where, request)
            case "DELETE":
                await self._service.unregister(where.name, where.version)
                return reply(encode_status(f'Model "{where.name}" unregistered'))
            case "OPTIONS":
                return reply(encode_pretty(describe_management_of(where.name)))
            case _:
                return await (self._set_default(where) if last else self._scale(where, request))

    def _find_place(self, path: str) -> "Place":
        """The longest registered name that the path begins with, and the version that follows."""
        end = len(path)
        while end > 0:
            if path[:end] in self._service.table:
                return Place(path[:end], path[end + 1 :] or None)
            end = path.rfind("/", 0, end)
        return Place(path, None)

    async def _set_default(self, where: "Place") -> Response:
        name, version = where.name, where.version
        if version is None:  # no registered name is followed by a version
            raise ModelUnknown(name.rpartition("/")[0] or name)
        try:
            await self._service.set_default(name, version)
        except VersionUnknown:
            return refuse(
                404,
                "ModelVersionNotFoundException",
                f"Model version {shorten_name(version)} does not exist for model {shorten_name(name)}",
            )
        return reply(encode_status(f'Default version successfully updated for model "{name}" to "{version}"'))

    async def _scale(self, where: "Place", request: Request) -> Response:
        parameters = await read_parameters(request)
        least = parameters.parse_number("min_worker", 1, 0)
        most = parameters.parse_number("max_worker", least, 0)
        wait = parameters.parse_flag("synchronous")
        self._service.table.find(where.name, where.version)
        found = await self._service.scale(ScaleRequest(where.name, where.version, least, most), wait=wait)
        if not wait:
            return reply(encode_status(UPDATING), ACCEPTED)
        version = "" if where.version is None else f", version: {where.version}"
        return reply(
            encode_status(f"Workers scaled to {least} for model: {where.name}{version}{self._note_most(found)}")
        )

    def _note_most(self, registration: Registration) -> str:
        """What the answer says besides where code is to have more processes than the operator allows."""
        most = self._settings.code_replicas
        if not registration.has_code or registration.options.min_workers <= most:
            return ""
        return f"; {most} of them run, as many as an archive may have (code_replicas)"

    async def _describe(self, where: "Place", request: Request) -> Response:
        table = self._service.table
        found: Sequence[Registration]
        if where.version == ALL_VERSIONS:
            found = table.list_versions(where.name)
        else:
            found = [table.find(where.name, where.version)]
        described = [await self._describe_version(each) for each in found]
        if request.query_params.get(CUSTOMIZED, "").lower() == "true":
            for each, row in zip(found, described, strict=True):
                if each.has_code and each.options.min_workers:
                    row["customizedMetadata"] = await self._ask_code(each, request)
        return reply(encode_pretty(described))

    async def _ask_code(self, registration: Registration, request: Request) -> Any:
        """What the handler says: JSON where it is that. INVARIANT: no client's credentials reach it."""
        headers = [(name, value) for name, value in request.headers.items() if name not in CREDENTIALS]
        said = await self._service.describe_by_code(registration, headers)
        try:
            return msgspec.json.decode(said)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return said.decode(errors="replace")

    async def _describe_version(self, registration: Registration) -> dict[str, Any]:
        observed = await self._service.observe(registration) if registration.options.min_workers else ()
        return describe_version(registration, observed, self._settings.queue_per_model)

    async def _readiness(self, request: Request) -> Response:
        """KServe's question: whether requests are answered now."""
        where = self._find_place(request.path_params["path"])
        found = self._service.table.find(where.name, where.version)
        ready = found.options.min_workers > 0 and not found.is_loading
        return reply(encode_pretty({"name": where.name, "ready": ready}))


@dataclass(frozen=True, slots=True)
class Place:
    """What a path names: a registered name, or else all of the path, and what follows the name."""

    name: str
    version: str | None
