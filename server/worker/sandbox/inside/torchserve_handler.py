"""Loads and calls a handler as TorchServe and Multi Model Server do. In a child.

A module has a function (the manifest's, or `handle`), which is first called with no data, or one class with
`initialize(context)` and `handle(data, context)`. Both get a list of requests, each a dict of its parts, and give a
list of as many answers. A failure of the handler fails its batch: with 503 "Prediction failed", with what a
PredictionException says, or with 507 where memory has run out.
"""

import importlib
import inspect
import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from server.code_messages import (
    MAX_STATUS,
    MIN_STATUS,
    OK,
    CodeAnswer,
    CodeRequest,
    HandlerLoaded,
    make_answer,
    make_failure,
)
from server.worker.sandbox.inside import torchserve_package
from server.worker.sandbox.inside.handler_context import FIRST_GPU, HandlerContext, MakeHeaders
from server.worker.sandbox.inside.handler_metrics import HandlerMetrics
from server.worker.sandbox.inside.handler_problem import HandlerProblem
from server.worker.sandbox.inside.json_answers import write_json
from server.worker.sandbox.inside.partial_answers import SendPart
from server.worker.sandbox.inside.request_envelope import Envelope, find_envelope
from server.worker.sandbox.inside.request_parts import JSON, BadParts, read_headers, read_parts
from server.worker.sandbox.messages import Entry, ForkChild

MANIFEST = Path("MAR-INF", "MANIFEST.json")
TEXT, BYTES = "text/plain; charset=utf-8", "application/octet-stream"
BUFFERS = (bytes, bytearray)
ASKED = ("explain", "describe")  #: properties of a request that say what a handler is asked for
BAD_REQUEST, UNAVAILABLE, NO_MEMORY = 400, 503, 507

Handle = Callable[[Any, HandlerContext], Any]


class Handler:
    """A loaded handler; see LoadedHandler."""

    def __init__(
        self, handle: Handle, context: HandlerContext, loaded: HandlerLoaded, envelope: Envelope | None = None
    ) -> None:
        self._handle = envelope.wrap(handle) if envelope else handle
        self._parts = context.cl_socket
        self._alone = envelope is not None and envelope.is_for_one
        self._context, self.loaded, self.metrics = context, loaded, context.metrics

    def __repr__(self) -> str:
        """For example `<Handler of <HandlerContext ...>>`."""
        return f"<Handler of {self._context!r}>"

    def connect(self, send: SendPart) -> None:
        """See LoadedHandler."""
        self._parts.connect(send)

    def answer(self, requests: Sequence[CodeRequest]) -> list[CodeAnswer]:
        """See LoadedHandler. A request whose form cannot be read fails by itself, and no other of its batch."""
        if len(requests) > 1:
            return self._answer_many(requests)
        (request,) = requests
        try:
            parts, types = read_parts(request)
        except BadParts as error:
            return [make_failure(BAD_REQUEST, str(error))]
        self._context.begin_one(request.id, partial(read_headers, request, types))
        self._parts.begin((0,), requests)
        return self._parts.end(self._run([parts]))

    def _answer_many(self, requests: Sequence[CodeRequest]) -> list[CodeAnswer]:
        """The same of several requests, which may ask for different things."""
        answers: dict[int, CodeAnswer] = {}  # an alias that is called, `dict[...]()`, would be built for each batch
        calls: dict[object, list[tuple[int, dict[str, Any], MakeHeaders]]] = {}
        for i, request in enumerate(requests):
            try:
                parts, types = read_parts(request)
            except BadParts as error:
                answers[i] = make_failure(BAD_REQUEST, str(error))
            else:  # a handler looks at the first request of a call to see what is asked of it
                asked: object = i if self._alone else tuple(request.properties.get(name) for name in ASKED)
                calls.setdefault(asked, []).append((i, parts, partial(read_headers, request, types)))
        for call in calls.values():
            places, data, headers = zip(*call, strict=True)
            asked_here = [requests[i] for i in places]
            self._context.begin([each.id for each in asked_here], headers)
            self._parts.begin(places, asked_here)
            answers.update(zip(places, self._parts.end(self._run(list(data))), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _run(self, data: list[dict[str, Any]]) -> list[CodeAnswer]:
        """The answers to a call whose requests the context knows."""
        try:
            found = self._handle(data, self._context)
        except MemoryError:
            traceback.print_exc()
            return fail(len(data), NO_MEMORY, "Out of resources")
        except Exception as error:
            traceback.print_exc()
            return fail(len(data), *find_status(error))
        if not isinstance(found, list):
            return fail(len(data), UNAVAILABLE, "Invalid model predict output")
        if len(found) != len(data):
            return fail(len(data), UNAVAILABLE, "number of batch response mismatched")
        try:
            return [self._write(i, value) for i, value in enumerate(found)]
        except Exception:
            traceback.print_exc()
            return fail(len(data), UNAVAILABLE, "Unsupported model output data type.")

    def _write(self, idx: int, value: Any) -> CodeAnswer:
        body, usual = write_body(value)
        if self._context.request_processor[idx].has_said_nothing:
            return CodeAnswer(OK, body, body_type=usual)
        status, phrase = self._context.get_response_status(idx)
        headers = self._context.get_response_headers(idx)
        content_type = ""
        if headers:
            content_type = next((text for key, text in headers.items() if str(key).lower() == "content-type"), "")
        return make_answer(status, body, content_type or "", headers, phrase or "", usual)


def load_handler(asked: ForkChild, model_dir: Path) -> Handler:
    """Import and initialise the handler. Raises HandlerProblem, and whatever the archive's code raises."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    manifest = _read_manifest(model_dir)
    config = _read_config(manifest, model_dir)
    loaded = HandlerLoaded(
        int(config.get("batchSize", 1)), float(config.get("maxBatchDelay", 100 if "batchSize" in config else 0)) / 1e3
    )
    if asked.batch_size:
        loaded = HandlerLoaded(asked.batch_size, asked.max_batch_delay_s)
    name = str(manifest.get("model", {}).get("modelName") or asked.model)
    gpu_id = FIRST_GPU if asked.limits.gpu else None
    metrics = HandlerMetrics(is_mms=asked.entry.style == "mms")
    metrics.model_name = name
    if asked.metrics:
        metrics.declare(_read_yaml(asked.metrics, "the server's code_metrics file").get("model_metrics") or {})
    context = HandlerContext(name, str(model_dir), manifest, loaded.batch_size, config, gpu_id, metrics)
    torchserve_package.fit(model_dir, asked.threads, has_device=asked.limits.gpu)
    module = import_handler(asked.entry)
    envelope = find_envelope(asked, manifest, config)
    function = getattr(module, asked.entry.function or "handle", None)
    if function is not None:
        function(None, context)
        return Handler(function, context, loaded, envelope)
    handler = _find_class(module, asked.entry)()
    if not hasattr(handler, "handle"):
        raise HandlerProblem(f"the class {type(handler).__name__} of {module.__name__} has no method `handle`")
    if hasattr(handler, "initialize"):
        handler.initialize(context)
    return Handler(handler.handle, context, loaded, envelope)


def import_handler(entry: Entry) -> ModuleType:
    """The handler's module. Raises HandlerProblem where it is one of a package that is not installed."""
    name = f"ts.torch_handler.{entry.module}" if entry.from_package else entry.module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        packages = {"ts": "torchserve", "mms": "multi-model-server", "model_archiver": "multi-model-server"}
        if missing not in packages and not entry.from_package:
            raise
        raise HandlerProblem(
            f"{entry.module} imports {missing}, which is not installed beside the server: pip install "
            f"{packages.get(missing, missing)}"
        ) from error


def write_body(value: Any) -> tuple[bytes, str]:
    """A handler's answer as bytes, and its content type if the handler says none. Raises TypeError, ValueError."""
    if type(value) is dict or type(value) is list:
        return write_json(value), JSON
    if isinstance(value, BUFFERS):
        return bytes(value), BYTES
    if isinstance(value, str):
        return value.encode(), TEXT
    torch = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        saved = io.BytesIO()
        torch.save(value, saved)
        return saved.getvalue(), BYTES
    return write_json(value), JSON


def find_status(error: Exception) -> tuple[int, str]:
    """The status and the message of a failed batch: a PredictionException of the package says its own."""
    for package in ("ts", "mms"):
        util = sys.modules.get(f"{package}.utils.util") or sys.modules.get(f"{package}.service")
        kind = getattr(util, "PredictionException", None)
        if isinstance(kind, type) and isinstance(error, kind):
            code, message = getattr(error, "error_code", 500), getattr(error, "message", str(error))
            return (code if isinstance(code, int) and MIN_STATUS <= code <= MAX_STATUS else 500), str(message)
    return UNAVAILABLE, "Prediction failed"


def fail(count: int, status: int, message: str) -> list[CodeAnswer]:
    """The same failure for each request of a batch."""
    return [make_failure(status, message)] * count


def _find_class(module: ModuleType, entry: Entry) -> type:
    """The module's only class, or of several the only one with `handle`. Raises HandlerProblem.

    TorchServe refuses a module of several classes.
    """
    own = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
    handlers = own if len(own) == 1 else [each for each in own if hasattr(each, "handle")]
    if len(handlers) == 1:
        return handlers[0]
    named = ", ".join(each.__name__ for each in own) or "no class"
    raise HandlerProblem(
        f"{entry.module}.py has neither a function {entry.function or 'handle'!r} nor exactly one class with `handle`, "
        f"but {named}"
    )


def _read_manifest(model_dir: Path) -> Mapping[str, Any]:
    file = model_dir / MANIFEST
    found = json.loads(file.read_bytes()) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def _read_config(manifest: Mapping[str, Any], model_dir: Path) -> Mapping[str, Any]:
    """`model-config.yaml`, or what else the manifest names. Raises HandlerProblem where it cannot be read."""
    name = manifest.get("model", {}).get("configFile")
    if not name:
        return {}
    return _read_yaml((model_dir / str(name)).read_text(), str(name))


def _read_yaml(text: str, name: str) -> Mapping[str, Any]:
    """Raises HandlerProblem where it cannot be read."""
    try:
        import yaml  # noqa: PLC0415 -- no dependency of ours
    except ModuleNotFoundError as error:
        raise HandlerProblem(f"{name} is YAML: pip install pyyaml beside the server") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HandlerProblem(f"{name} is no YAML: {error}") from error
    return found if isinstance(found, dict) else {}
