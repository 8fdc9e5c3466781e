"""Requests for archives as clients of TorchServe and Multi Model Server name them. Runs in a front.

A name is registered, with a time-out and counts of its own, or it is an archive's key in the store, with or without the
suffix that those servers' archives have.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl

from model_store.name_table import NameTable
from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.errors import Refused, Situation
from server.front.exchange import HttpRequest
from server.front.handler_calls import CallDetails
from server.front.inference import InferRequest, InferResponse
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.registrations import Served

SUFFIX = ".mar"
MAX_NAME_BYTES = 2 * 1024 * 1024  #: of names and their keys that are remembered; clients can make them up
KEY_BYTES = 4096  #: of a key at most
MAX_QUERY, MAX_PARAMETERS = 16 * 1024, 100
WORKER_DIED = 500


class AskedArchive(NamedTuple):
    """The archive that answers, the handler's `url_path`, and, of a registered version, its time-out and counts."""

    model: ModelName
    url_path: str = ""
    timeout_s: float = float("inf")
    served: Served | None = None


async def ask_archive(
    asked: AskedArchive, call: CallDetails, request: HttpRequest, plane: InferencePlane
) -> InferResponse:
    """The answer of an archive. Raises Refused, ClientGone."""
    started, deadline = time.monotonic(), min(request.deadline, request.arrived + asked.timeout_s)
    try:
        response = await plane.infer(
            InferRequest(
                asked.model,
                request.body,
                request.content_type,
                request.accept,
                deadline,
                request.client_gone,
                request.arrived,
                request.id,
                request.client,
                call,
            )
        )
    except Refused as refused:
        if asked.served is not None:
            asked.served.count(time.monotonic() - started)
        if refused.situation is Situation.DEADLINE and deadline < request.deadline:
            message = f"Worker died: it gave no answer within {asked.timeout_s:g} s (response_timeout)"
            raise Refused(Situation.MODEL_FAILED, message, status=WORKER_DIED) from refused
        raise
    if asked.served is not None:
        asked.served.count(time.monotonic() - started, response.stats.queue_us)
    return response


class StoreNames:
    """Names that nobody has registered: of a key, or of a key without its suffix. Which it was is remembered."""

    def __init__(self) -> None:
        self._keys: NameTable[ModelName] = NameTable(MAX_NAME_BYTES, value_bytes=KEY_BYTES)

    def __repr__(self) -> str:
        """For example `<StoreNames <NameTable 300 names, ...>>`."""
        return f"<StoreNames {self._keys!r}>"

    def __len__(self) -> int:
        return len(self._keys)

    async def ask(
        self, name: str, call: CallDetails, request: HttpRequest, plane: InferencePlane, unknown: Refused
    ) -> InferResponse:
        """The answer of the archive. Raises `unknown` where the store has neither key, Refused, ClientGone."""
        known = self._keys.get(name)
        for each in (known,) if known else (name, name + SUFFIX):
            try:
                key = parse_model_name(each)
            except InvalidModelName as error:
                raise Refused(Situation.BAD_NAME, str(error)) from error
            try:
                response = await ask_archive(AskedArchive(key), call, request, plane)
            except Refused as refused:
                if refused.situation is not Situation.NOT_FOUND:
                    raise
            else:
                self._keys.put(name, key)
                return response
        if known:  # it was there: the next request looks for both again
            self._keys.pop(name)
        add_near_names(unknown, key, plane)
        raise unknown


def parse_parameters(query: bytes) -> Sequence[tuple[str, str]]:
    """The parameters of a query, in order. Raises Refused for too many."""
    if not query:
        return ()
    if len(query) > MAX_QUERY:
        raise Refused(Situation.BAD_REQUEST, f"the query has {len(query)} bytes, the limit is {MAX_QUERY}")
    try:
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        message = f"the query has more than {MAX_PARAMETERS} parameters, or none that can be read"
        raise Refused(Situation.BAD_REQUEST, message) from None
