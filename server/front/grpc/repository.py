"""What the Open Inference Protocol over gRPC says of the fleet's models, and the loads that a client may ask for.

Runs in the gRPC front, which asks the supervisor. `server.front.dialects.open_inference_repository` is the same over
HTTP; who may load and unload is the same as well.
"""

from collections.abc import Collection, Sequence
from typing import Any

import structlog
from google.protobuf.json_format import ParseDict

from model_store.names import ModelName
from server import contract
from server.errors import Refused, Situation
from server.front.dialects.open_inference import STATUS
from server.front.dialects.open_inference_models import MOST_LISTED, make_index, make_statistics
from server.front.grpc.calls import OK, Call, Method
from server.front.grpc.messages import POOL, find_message
from server.front.grpc.models import ask_model, parse_name, suggest_near
from server.ipc.operations import KnownModel, ListKnownModels, LoadForClient, UnloadForClient

FAILED = STATUS[Situation.INTERNAL]
_PARAMETERS = {LoadForClient: frozenset[str](), UnloadForClient: frozenset({"unload_dependents"})}
_Stats, _Index, _Loaded, _Unloaded = (
    find_message(f"inference.{name}Response")
    for name in ("ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
)

log = structlog.get_logger()


def list_repository_methods(service: str) -> Sequence[Method]:
    """The methods of `service` that are about models as such."""
    answers = (
        ("ModelStatistics", _count),
        ("RepositoryIndex", _list),
        ("RepositoryModelLoad", _load),
        ("RepositoryModelUnload", _unload),
    )
    return [Method(f"/{service}/{name}", find_message(f"inference.{name}Request"), answer) for name, answer in answers]


async def _count(request: Any, call: Call) -> Any:
    """The statistics of a model, or where none is named of all that workers know."""
    if request.name:
        model = parse_name(request.name, request.version, call)
        known = await call.plane.list_known(ListKnownModels(model, "", 1), call.limit())
        found = [each for each in known if each.model == model and each.state != "unavailable"]
        if not found:  # it is loaded for the question
            await ask_model(model, b"", contract.OPEN_INFERENCE_DESCRIBE, call.limit(), call)
            found = [KnownModel(model, "ready")]
    else:
        found = await call.plane.list_known(ListKnownModels("", "", MOST_LISTED), call.limit())
    return ParseDict(make_statistics(found), _Stats(), ignore_unknown_fields=True, descriptor_pool=POOL)


async def _list(request: Any, call: Call) -> Any:
    _require_own(request)
    known: Sequence[KnownModel] = await call.plane.list_known(ListKnownModels("", "", MOST_LISTED), call.limit())
    return _Index(models=make_index(known, only_ready=request.ready))


async def _load(request: Any, call: Call) -> Any:
    await _control(LoadForClient, request, call)
    return _Loaded()


async def _unload(request: Any, call: Call) -> Any:
    await _control(UnloadForClient, request, call)
    return _Unloaded()


async def _control(kind: type[LoadForClient | UnloadForClient], request: Any, call: Call) -> None:
    """Load or unload a model, which is logged as on the management listener, whatever becomes of it."""
    model: ModelName | str = request.model_name[:1000]
    status, verb = FAILED, "load" if kind is LoadForClient else "unload"
    try:
        _require_own(request)
        model = parse_name(request.model_name, "", call)
        _require_known(request.parameters.keys() - _PARAMETERS[kind], verb)
        with suggest_near(model, call):
            await call.plane.control(kind(model), call.limit())
        status = OK
    except Refused as why:
        status = STATUS[why.situation]
        raise
    finally:
        log.info("management_call", token=call.client or "-", verb=verb, model=model, status=status, peer=call.peer)


def _require_known(unknown: Collection[str], verb: str) -> None:
    if unknown:
        what = f"{min(unknown)[:80]!r} is no parameter of {verb}"
        message = f"{what}: an archive brings its configuration and its files"
        raise Refused(Situation.BAD_REQUEST, message, field="parameters")


def _require_own(request: Any) -> None:
    if request.repository_name:
        message = "there is one repository, the store: leave repository_name empty"
        raise Refused(Situation.BAD_REQUEST, message, field="repository_name")
