"""The parameters of a management call: of its query or its JSON body, as both archived servers take them."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from model_store.archives.json_faults import FAULTS, explain_fault
from server.model_server_api.bodies import JSON
from server.settings import Settings
from server.supervisor.registrations.refusals import BadOption, shorten_name
from server.supervisor.registrations.service import RegisterRequest
from server.supervisor.registrations.table import ServingOptions
from server.supervisor.request_bodies import read_body

MAX_BODY = 64 * 1024
MAX_BATCH, MAX_BATCH_DELAY_MS = 4096, 60_000  #: as archives may have them
MAX_NUMBER = 2**31 - 1
RUNTIMES = ("", "python", "python2", "python3")


class Parameters:
    """The parameters of a call, from its query or its JSON body."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __repr__(self) -> str:
        """For example `<Parameters model_name, url>`."""
        return f"<Parameters {', '.join(sorted(self._values))}>"

    def get(self, name: str) -> str | None:
        """A text. Raises BadOption where JSON has something else."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise BadOption(f"Parameter {name} must be a text, not {json.dumps(value)[:80]}")
        return value

    @property
    def says_batching(self) -> bool:
        """Whether the client says how an archive is batched."""
        return not self._values.keys().isdisjoint(("batch_size", "max_batch_delay"))

    def parse_number(self, name: str, default: int, least: int, most: int = MAX_NUMBER) -> int:
        """A whole number. Raises BadOption."""
        value = self._values.get(name)
        if value is None:
            return default
        text = str(value)
        if isinstance(value, bool) or not text.isdigit() or not least <= int(text[:20]) <= most:
            raise BadOption(f"Parameter {name} must be a whole number from {least} to {most}, not {text[:80]!r}")
        return int(text)

    def parse_flag(self, name: str) -> bool:
        """Whether it is true. As TorchServe, which takes anything else for false."""
        return str(self._values.get(name, "")).lower() == "true"


async def read_parameters(request: Request) -> Parameters:
    """The query's, and those of a JSON body, which win. Raises BadOption, ControlError."""
    values: dict[str, Any] = dict(request.query_params)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == JSON:
        body = await read_body(request, MAX_BODY)
        try:
            given = msgspec.json.decode(body, type=dict[str, Any]) if body else {}
        except FAULTS as error:
            raise BadOption(f"the body is no JSON object: {explain_fault(error)}") from error
        values |= given
    return Parameters(values)


def parse_registration(given: Parameters, settings: Settings, workers: int = 0) -> RegisterRequest:
    """What a client of TorchServe's asks to register; `workers` where it says no number. Raises BadOption."""
    url = given.get("url")
    if url is None:
        raise BadOption("Parameter url is required.")
    runtime = given.get("runtime") or ""
    if runtime not in RUNTIMES:
        raise BadOption(f"Invalid RuntimeType value: {shorten_name(runtime)}")
    workers = given.parse_number("initial_workers", workers, 0)
    timeout_s = max(1, int(settings.code_timeout_s))  # nobody gets more
    options = ServingOptions(
        workers,
        workers,
        given.parse_number("batch_size", 1, 1, MAX_BATCH),
        given.parse_number("max_batch_delay", 100, 0, MAX_BATCH_DELAY_MS),
        float(min(timeout_s, given.parse_number("response_timeout", timeout_s, 1))),
        float(min(timeout_s, given.parse_number("startup_timeout", timeout_s, 1))),
        says_batching=given.says_batching,
    )
    name, version = given.get("model_name") or "", given.get("model_version") or ""
    return RegisterRequest(url, name, version, given.get("handler") or "", runtime, options)


def parse_leniently(text: str | None) -> int | None:
    """A number; None for anything else, which TorchServe takes for one that is not given."""
    return int(text) if text is not None and text.isdigit() and len(text) < len(str(MAX_NUMBER)) else None
