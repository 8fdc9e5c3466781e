"""Loads and calls a script as SageMaker's inference toolkits do: `code/inference.py`. In a child.

`model_fn(model_dir)` loads the model; then either `transform_fn(model, body, content_type, accept)` answers a request,
or `input_fn(body, content_type)`, `predict_fn(input, model)` and `output_fn(prediction, accept)` do. Each may take one
argument more, the context. What a script leaves out is done as the toolkits do it for arrays: JSON, CSV and npy bodies
become an array, a torch module is called with a tensor and anything else by its `predict`, and the answer is JSON, CSV
or npy as the client accepts. A script's exception is 500, as it is there.
"""

import importlib
import inspect
import io
import json
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from server.code_messages import (
    MAX_STATUS,
    MIN_STATUS,
    CodeAnswer,
    CodeRequest,
    HandlerLoaded,
    make_answer,
    make_failure,
)
from server.worker.sandbox.inside.handler_context import FIRST_GPU, HandlerContext
from server.worker.sandbox.inside.handler_problem import HandlerProblem
from server.worker.sandbox.inside.partial_answers import SendPart
from server.worker.sandbox.inside.request_parts import JSON, read_fields
from server.worker.sandbox.inside.torchserve_handler import BYTES, write_body
from server.worker.sandbox.messages import ForkChild

CSV, NPY, ANY = "text/csv", "application/x-npy", "*/*"
FAILED = 500
TEXTS = (JSON, CSV, "text/plain")  #: types whose bodies scripts get as str


class Script:
    """A loaded script; see LoadedHandler."""

    loaded = HandlerLoaded()

    def __init__(self, module: ModuleType, context: HandlerContext, model: Any) -> None:
        self._context, self._model, self.metrics = context, model, context.metrics
        self._transform = getattr(module, "transform_fn", None)
        self._input = getattr(module, "input_fn", read_array)
        self._predict = getattr(module, "predict_fn", predict)
        self._output = getattr(module, "output_fn", write_array)

    def __repr__(self) -> str:
        """For example `<Script of <HandlerContext ...>>`."""
        return f"<Script of {self._context!r}>"

    def connect(self, send: SendPart) -> None:
        """See LoadedHandler. Scripts answer in one piece."""

    def answer(self, requests: Sequence[CodeRequest]) -> list[CodeAnswer]:
        """See LoadedHandler. Scripts know no batches: each request is answered by itself."""
        return [self._answer_one(request) for request in requests]

    def _answer_one(self, request: CodeRequest) -> CodeAnswer:
        self._context.begin([request.id], [partial(read_fields, request)])
        media = request.content_type.partition(";")[0].strip().lower() or JSON
        accept = request.accept if request.accept not in ("", ANY) else JSON
        try:
            body: Any = request.body.decode() if media in TEXTS else request.body
            if self._transform is not None:
                found = self._call(self._transform, self._model, body, media, accept)
            else:
                given = self._call(self._input, body, media)
                found = self._call(self._output, self._call(self._predict, given, self._model), accept)
            value, content_type = found if isinstance(found, tuple) and len(found) == 2 else (found, accept)  # noqa: PLR2004
            written, _ = write_body(value)
            status, phrase = self._context.get_response_status(0)
            return make_answer(status, written, content_type, self._context.get_response_headers(0), phrase)
        except Exception as error:
            traceback.print_exc()
            code = getattr(error, "status_code", FAILED)
            code = code if isinstance(code, int) and MIN_STATUS <= code <= MAX_STATUS else FAILED
            return make_failure(code, f"{type(error).__name__}: {error}")

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return call_with_context(function, arguments, self._context)


def load_script(asked: ForkChild, model_dir: Path) -> Script:
    """Import the script and load its model. Raises HandlerProblem, and whatever the script raises."""
    module = importlib.import_module(asked.entry.module)
    model_fn = getattr(module, "model_fn", None)
    if model_fn is None:
        raise HandlerProblem(f"{asked.entry.module}.py has no function `model_fn(model_dir)`")
    if hasattr(module, "transform_fn") and any(
        hasattr(module, f"{name}_fn") for name in ("input", "predict", "output")
    ):
        raise HandlerProblem(
            f"{asked.entry.module}.py has transform_fn beside input_fn, predict_fn or output_fn: keep one"
        )
    gpu_id = FIRST_GPU if asked.limits.gpu else None
    context = HandlerContext(asked.model, str(model_dir), {}, 1, {}, gpu_id)
    return Script(module, context, call_with_context(model_fn, (str(model_dir),), context))


def call_with_context(function: Callable[..., Any], arguments: Sequence[Any], context: HandlerContext) -> Any:
    """Call it with the context behind the arguments, if it takes so many."""
    takes = inspect.signature(function).parameters.values()
    places = sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in takes)
    return function(*arguments, context) if places > len(arguments) else function(*arguments)


def read_array(body: Any, content_type: str) -> Any:
    """JSON, CSV or npy as an array. Raises ValueError that names what is read."""
    import numpy as np  # noqa: PLC0415 -- the template has it by torch

    if content_type == JSON:
        return np.array(json.loads(body))
    if content_type == CSV:
        return np.genfromtxt(io.StringIO(body), delimiter=",")
    if content_type == NPY:
        return np.load(io.BytesIO(body), allow_pickle=False)
    raise ValueError(f"content type {content_type[:80]!r}: without input_fn only {JSON}, {CSV} and {NPY} are read")


def predict(given: Any, model: Any) -> Any:
    """What a torch module makes of a tensor, or the model's `predict` of the array."""
    import torch  # noqa: PLC0415 -- the template has it

    if not isinstance(model, torch.nn.Module):
        return model.predict(given)
    model.eval()
    with torch.inference_mode():
        return model(torch.as_tensor(given, dtype=torch.float32))


def write_array(prediction: Any, accept: str) -> tuple[bytes | str, str]:
    """The array as the first type of Accept that there is: JSON, CSV or npy. Raises ValueError."""
    import numpy as np  # noqa: PLC0415

    array = np.asarray(prediction.detach().cpu() if hasattr(prediction, "detach") else prediction)
    for each in accept.split(","):
        media = each.partition(";")[0].strip().lower()
        if media in (JSON, ANY):
            return json.dumps(array.tolist()), JSON
        if media == CSV:
            text = io.StringIO()
            np.savetxt(text, np.atleast_2d(array), delimiter=",", fmt="%s")
            return text.getvalue(), CSV
        if media in (NPY, BYTES):
            saved = io.BytesIO()
            np.save(saved, array, allow_pickle=False)
            return saved.getvalue(), NPY
    raise ValueError(f"accept {accept[:80]!r}: without output_fn only {JSON}, {CSV} and {NPY} are written")
