"""Answers Multi Model Server's management API from the table of registrations. Runs on the supervisor's event loop.

Requests come from the management listener, or from a front whose one port is that of a SageMaker container. Such a
container loads what is registered before it answers, with a worker where the client says no number: SageMaker sends
requests as soon as it has the answer.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from model_store.archives.json_faults import FAULTS, explain_fault
from server.errors import Situation
from server.ipc.operations import ManagementReply, ManageModels, ModelState
from server.model_server_api.bodies import NO_SUCH_METHOD, encode_error, encode_pretty
from server.model_server_api.mms_errors import BAD_REQUEST, ERRORS, INTERNAL, NO_MODEL
from server.settings import Settings
from server.supervisor.model_server_api.name_pages import NamePattern, make_token, read_token
from server.supervisor.model_server_api.parameters import MAX_BATCH, MAX_BATCH_DELAY_MS, Parameters
from server.supervisor.model_server_api.torchserve_versions import list_processes
from server.supervisor.registrations.refusals import (
    AlreadyRegistered,
    ArchiveUnreadable,
    BadOption,
    ModelUnknown,
    NotInStore,
    NotLoaded,
    RegistrationRefused,
    TableFull,
    UrlOutsideStore,
)
from server.supervisor.registrations.service import RegisterRequest, RegistrationService, ScaleRequest
from server.supervisor.registrations.table import Registration, ServingOptions

MODELS = "/models"
MAX_PAGE = 100
MAX_FIELDS, MAX_QUERY = 200, 16 * 1024
RUNTIMES = ("python", "python2", "python3")  #: of Multi Model Server; all of them are this server's own
PATTERN = "model_name_pattern"
RESPONSE_TIMEOUT_S = 120
OK = 200
ACCEPTED, SCALED = {"status": "Processing worker updates..."}, {"status": "Workers scaled"}
_DOWNLOADED = ("http://", "https://", "s3://", "ftp://")
_STATES = {"ready": "READY", "loading": "LOADING", "retiring": "UNLOADING"}


class Failure(NamedTuple):
    """How a refusal is said."""

    status: int
    type: str
    message: str


class MultiModelApi:
    """See the module."""

    def __init__(self, registrations: RegistrationService, settings: Settings) -> None:
        self._registrations, self._table = registrations, registrations.table
        self._is_container = settings.container != "off"
        self._default_workers = settings.default_workers_per_model

    def __repr__(self) -> str:
        """For example `<MultiModelApi over <RegistrationService of ...>>`."""
        return f"<MultiModelApi over {self._registrations!r}>"

    async def answer(self, request: ManageModels) -> ManagementReply:
        """The reply to one request. Raises nothing that a client can cause."""
        try:
            status, body = await self._route(request)
        except RegistrationRefused as error:
            status, kind, message = _explain(error)
            return ManagementReply(status, encode_error(status, kind, message))
        return ManagementReply(status, encode_pretty(body))

    async def _route(self, request: ManageModels) -> tuple[int, Any]:
        """Status and body. Raises RegistrationRefused."""
        name = request.path.removeprefix(MODELS).strip("/")
        given = _read_parameters(request)
        match request.method, bool(name):
            case "GET", False:
                return OK, self._list(given)
            case "POST", False:
                return await self._register(given)
            case "GET", True:
                return OK, await self._describe(name)
            case "PUT", True:
                return await self._scale(name, given)
            case "DELETE", True:
                await self._registrations.unregister(name)
                return OK, {"status": f'Model "{name}" unregistered'}
        raise _MethodRefused

    async def _register(self, given: Parameters) -> tuple[int, Any]:
        url, runtime = given.get("url") or "", given.get("runtime") or ""
        if not url:
            raise BadOption("Parameter url is required.")
        if runtime and runtime.lower() not in RUNTIMES:
            raise BadOption(f"Invalid RuntimeType value: {runtime[:80]}")
        workers = given.parse_number("initial_workers", self._default_workers, 0)
        options = ServingOptions(
            min_workers=workers,
            max_workers=workers,
            batch_size=given.parse_number("batch_size", 1, 1, MAX_BATCH),
            max_batch_delay_ms=given.parse_number("max_batch_delay", 100, 0, MAX_BATCH_DELAY_MS),
            response_timeout_s=float(given.parse_number("response_timeout", RESPONSE_TIMEOUT_S, 1)),
            says_batching=given.says_batching,
        )
        name, handler = given.get("model_name") or "", given.get("handler") or ""
        if name in self._table:  # before the archive is read
            raise AlreadyRegistered(name, "")
        wait = self._waits(given)
        asked = RegisterRequest(url, name=name, handler=handler, runtime=runtime.lower(), options=options)
        done = await self._registrations.register(asked, wait=wait)
        if not workers:
            return OK, {"status": f'Model "{done.name}" registered'}
        return (OK, SCALED) if wait else (202, ACCEPTED)

    async def _scale(self, name: str, given: Parameters) -> tuple[int, Any]:
        self._table.find(name)
        least = given.parse_number("min_worker", 1, 0)
        asked = ScaleRequest(name, None, least, given.parse_number("max_worker", least, 0))
        wait = self._waits(given)
        await self._registrations.scale(asked, wait=wait)
        return (OK, SCALED) if wait else (202, ACCEPTED)

    def _waits(self, given: Parameters) -> bool:
        """Whether the answer comes when all is done."""
        return self._is_container or given.parse_flag("synchronous")

    def _list(self, given: Parameters) -> dict[str, Any]:
        """A page of names. INVARIANT: a page begins after a name, so that what goes meanwhile hides no other."""
        limit = min(given.parse_number("limit", MAX_PAGE, 1), MAX_PAGE)
        after, pattern = read_token(given.get("next_page_token") or ""), NamePattern(given.get(PATTERN) or "*")
        page = list(islice((name for name in self._table if name > after and pattern.fits(name)), limit + 1))
        rows = [{"modelName": name, "modelUrl": self._table.find(name).url} for name in page[:limit]]
        token = {"nextPageToken": make_token(page[limit - 1])} if len(page) > limit else {}
        return {**token, "models": rows}

    async def _describe(self, name: str) -> dict[str, Any]:
        found = self._table.find(name)
        options = found.options
        return {
            "modelName": found.name,
            "modelVersion": found.version,
            "modelUrl": found.url,
            "runtime": found.runtime,
            "minWorkers": options.min_workers,
            "maxWorkers": options.max_workers,
            "batchSize": options.batch_size,
            "maxBatchDelay": options.max_batch_delay_ms,
            "loadedAtStartup": found.at_start,
            "workers": _list_workers(found, await self._registrations.observe(found)),
        }


class _MethodRefused(RegistrationRefused):
    """The path has no such method."""


def _read_parameters(request: ManageModels) -> Parameters:
    """Those of the query, and those of a JSON body, which win. Raises BadOption."""
    if len(request.query) > MAX_QUERY:
        raise BadOption(f"the query has {len(request.query)} characters, the limit is {MAX_QUERY}")
    try:
        values: dict[str, Any] = dict(parse_qsl(request.query, keep_blank_values=True, max_num_fields=MAX_FIELDS))
        given = msgspec.json.decode(request.body, type=dict[str, Any]) if request.body.strip() else {}
    except FAULTS as error:
        raise BadOption(f"the parameters cannot be read: {explain_fault(error)}") from error
    except ValueError as error:  # of `parse_qsl`
        raise BadOption(f"the query has more than {MAX_FIELDS} fields") from error
    return Parameters(values | given)


def _explain(error: RegistrationRefused) -> Failure:
    """As Multi Model Server says it. Where its words hide the cause, that is added."""
    match error:
        case _MethodRefused():
            return Failure(405, "MethodNotAllowedException", NO_SUCH_METHOD)
        case ModelUnknown(name=name):
            return Failure(404, NO_MODEL, f"Model not found: {name}")
        case AlreadyRegistered(name=name):
            return Failure(409, "ConflictStatusException", f"Model {name} is already registered.")
        case UrlOutsideStore(url=url) if url.lower().startswith(_DOWNLOADED):
            return Failure(400, "DownloadModelException", f"Failed to download model from: {url}: {error}")
        case NotInStore(url=url) if ".." in url:
            return Failure(404, NO_MODEL, str(error))
        case NotInStore(url=url):
            return Failure(404, NO_MODEL, f"Model not found in model store: {url}")
        case NotLoaded(situation=situation) | ArchiveUnreadable(situation=situation):
            status, kind = ERRORS.get(Situation(situation or Situation.INTERNAL), (500, INTERNAL))
            return Failure(status, kind, f"Failed to start workers: {error}")
        case TableFull():
            return Failure(507, INTERNAL, str(error))
        case _:
            return Failure(400, BAD_REQUEST, str(error))


def _list_workers(found: Registration, observed: Sequence[tuple[int, ModelState]]) -> list[dict[str, Any]]:
    """The workers that a version was given. One that was evicted is started by the next request: it is READY.

    A code archive that is loaded has as many as it has processes, but no more than were asked for.
    """
    here = [(index, each) for index, state in observed if state.state in _STATES for each in list_processes(state)]
    states = here or [(0, ModelState(found.key))]
    workers = min(found.options.min_workers, len(states)) if found.has_code and here else found.options.min_workers
    since = datetime.fromtimestamp(found.loaded_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    rows = []
    for i in range(workers):
        index, state = states[i % len(states)]
        status = _STATES.get(str(state.state), "READY")
        size = state.bytes if isinstance(state.bytes, int) else 0
        rows.append(
            {
                "id": f"{index}-{i}",
                "startTime": since,
                "status": "LOADING" if found.is_loading else status,
                "gpu": False,
                "memoryUsage": size,
            }
        )
    return rows
