"""One adapter for each server protocol: the request for a model, and the check of a response. Pure.

Sources: Fleetcast and SageMaker, the runtime's InvokeEndpoint with its target-model header; TorchServe and Multi Model
Server, the inference API (`/predictions`), TorchServe's with versions; container, what SageMaker's platform sends to
the one port of a container (`/models/NAME/invoke`); MLServer and Triton, the Open Inference Protocol (V2), also over
gRPC; Ray Serve,
the header of its model multiplexing; forecasts, Fleetcast's call for many models (`/v1/forecasts`), whose body names
them.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import orjson

from loadtest.driver.drawn_tensors import DIGITS
from loadtest.driver.grpc_messages import encode_infer
from loadtest.driver.run_result import GRPC
from server.contract import (
    CONTAINER_MODELS_PATH,
    FORECASTS_PATH,
    HEADER_TARGET_MODEL,
    INVOCATIONS_PATH,
    JSON,
    OPEN_INFERENCE_MODELS_PATH,
    PING_PATH,
    PREDICTIONS_PATH,
)

HEADER_JSON_BYTES = "Inference-Header-Content-Length"  #: bytes of the document before binary tensors
NO_HEADERS: Mapping[str, str] = {}


class _Kind(NamedTuple):
    """What JSON holds of an output."""

    word: str
    types: tuple[type, ...]


_NUMBERS = _Kind("number", (int, float))
_TEXTS = _Kind("text", (str,))
_TYPES = {"BOOL": _Kind("boolean", (bool,)), "BYTES": _TEXTS}  #: by datatype
MOST_WORDS = 200  #: characters of an error's message that are kept


class BodyKind(StrEnum):
    """The kind of a request body."""

    DEEPAR = "deepar"  #: a forecast: the history as JSON of SageMaker DeepAR
    TENSOR = "tensor"  #: the network's input as nested numbers
    NPY = "npy"  #: the same as a .npy file
    BINARY = "binary"  #: the same as binary tensors of the Open Inference Protocol


@dataclass(frozen=True, slots=True)
class ClientDialect:
    """A protocol: its path and headers, which contain `{model}`, and the wrapping of a tensor body.

    `version`: what follows the path's model where a request names a version, with `{version}`; empty where none can.
    `ping`: the path that answers while the server lives. `statuses`: what failures mean in this protocol. `free_form`:
    an answer is what the code of a model makes of it, so that it need not hold predictions.
    """

    name: str
    path: str
    headers: Mapping[str, str]
    wraps_v2: bool = False
    many: bool = False  #: a request is a call for several models
    version: str = ""
    slashes: str = "/"  #: those in a model's name stay as they are; empty: they are quoted
    ping: str = PING_PATH
    statuses: Mapping[int, str] = field(default_factory=dict)
    free_form: bool = False
    is_grpc: bool = False  #: the path is a method's of gRPC

    def __repr__(self) -> str:
        return f"<ClientDialect {self.name}: POST {self.path}>"

    def tensor_body(self, x: npt.NDArray[np.float32]) -> bytes:
        """Write one input named x, without a batch axis, as JSON of this protocol, with DIGITS decimals."""
        digits = x.astype(np.float64).round(DIGITS)
        if not self.wraps_v2:
            return json.dumps({"x": digits.tolist()}).encode()
        one = {"name": "x", "shape": [1, *x.shape], "datatype": "FP32", "data": digits.ravel().tolist()}
        return json.dumps({"inputs": [one]}).encode()

    def request(
        self,
        host: str,
        model: str,
        body: bytes,
        content_type: str = JSON,
        headers: Mapping[str, str] = NO_HEADERS,
        version: str = "",
    ) -> bytes:
        """Make a complete HTTP/1.1 request, with `headers` besides those of the protocol; of gRPC a message.

        Raises ValueError for a version where the protocol has no place for one, and for a body that gRPC cannot send.
        """
        if version and not self.version:
            raise ValueError(f"the dialect {self.name} has no place for the version of a model")
        if self.is_grpc:
            return encode_infer(model, version, body, int(headers.get(HEADER_JSON_BYTES, len(body))))
        named = f"{{model}}{self.version if version else ''}"
        place = named.format(model=quote(model, safe=self.slashes), version=quote(version, safe=""))
        lines = [f"POST {self.path.replace('{model}', place)} HTTP/1.1", f"Host: {host}"]
        lines += [f"{key}: {value.format(model=model)}" for key, value in self.headers.items()]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode() + body


#: Of the protocols of model servers with code.
_HANDLER_STATUSES = {
    500: "the model's process died, or took too long",
    503: "its code raised, or all queues are full",
    507: "no memory",
}
DIALECTS: Mapping[str, ClientDialect] = {
    each.name: each
    for each in (
        ClientDialect("sagemaker", INVOCATIONS_PATH, {HEADER_TARGET_MODEL: "{model}"}),
        ClientDialect("forecasts", FORECASTS_PATH, {}, many=True),
        ClientDialect(
            "torchserve",
            f"{PREDICTIONS_PATH}/{{model}}",
            {},
            version="/{version}",
            statuses={404: "no such model or version", **_HANDLER_STATUSES},
            free_form=True,
        ),
        ClientDialect(
            "mms",
            f"{PREDICTIONS_PATH}/{{model}}",
            {},
            statuses={404: "no such model", **_HANDLER_STATUSES},
            free_form=True,
        ),
        ClientDialect(
            "container",
            f"{CONTAINER_MODELS_PATH}/{{model}}/invoke",
            {},
            slashes="",
            statuses={404: "the model is not loaded: it was unloaded meanwhile", **_HANDLER_STATUSES},
            free_form=True,
        ),
        ClientDialect(
            "v2",
            f"{OPEN_INFERENCE_MODELS_PATH}/{{model}}/infer",
            {},
            wraps_v2=True,
            version="/versions/{version}",
            ping="/v2/health/live",
            statuses={400: "the tensors are not the model's", 404: "no such model or version"},
        ),
        ClientDialect(
            "grpc",
            "/inference.GRPCInferenceService/ModelInfer",
            {},
            wraps_v2=True,
            ping="",
            statuses={GRPC + 3: "the tensors are not the model's", GRPC + 5: "no such model or version"},
            is_grpc=True,
        ),
        ClientDialect("ray", "/", {"serve_multiplexed_model_id": "{model}"}, ping=""),
    )
}


def encode_npy(x: npt.NDArray[np.float32]) -> bytes:
    """Encode one array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def find_call_fault(body: bytes, forecasts: int) -> str | None:
    """Return what is wrong with the answer to a call for many models: it has a prediction or an error for each."""
    try:
        answer = orjson.loads(body)
    except ValueError as error:
        return f"not JSON: {error}"
    found = answer.get("predictions") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != forecasts or not all(isinstance(each, dict) for each in found):
        return f"not {forecasts} predictions in {body[:80]!r}"
    made = [each for each in found if "error" not in each]
    if answer.get("failed") != forecasts - len(made):
        return f"{answer.get('failed')} said to have failed, but {forecasts - len(made)} errors"
    return next((why for each in made if (why := _find_number_fault(each, body))), None)


def find_fault(body: bytes, *, free_form: bool = False) -> str | None:
    """Return what is wrong with an answer. JSON and npy must contain numbers, all of them finite.

    One in a free form may be anything but empty; where it holds predictions or tensors, these are checked all the same.
    """
    if body.startswith(b"\x93NUMPY"):
        return _find_npy_fault(body)
    if free_form and not re.match(rb'\s*{.*"(predictions|outputs)"\s*:', body, re.DOTALL):
        return None if body else "empty"
    return _find_json_fault(body)


def find_words(body: bytes) -> str:
    """Return what an error's body says, in whatever protocol; empty for a body without words."""
    try:
        said = orjson.loads(body)
    except ValueError:
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        error = said.get("error", said)
        said = error.get("message", "") if isinstance(error, dict) else error
    words = " ".join(str(said).split())[:MOST_WORDS]
    return "".join(each if each.isprintable() else "?" for each in words)


def _find_npy_fault(body: bytes) -> str | None:
    try:
        array = np.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, EOFError) as error:
        return f"not npy: {error}"
    if not array.size or array.dtype.kind not in "fiu":
        return f"no numbers in an array of {array.dtype} {array.shape}"
    return None if np.isfinite(array).all() else "a number that is not finite"


def _find_json_fault(body: bytes) -> str | None:
    try:
        answer = orjson.loads(body)  # refuses NaN and Infinity
    except ValueError as error:
        return f"not JSON: {error}"
    if isinstance(answer, dict):
        outputs = [each for each in answer.get("outputs", ()) if isinstance(each, dict)]
        texts = [
            text for each in outputs if each.get("datatype") == "BYTES" for text in _iterate_leaves(each.get("data"))
        ]
        if texts and all(isinstance(text, str) and text.startswith("{") for text in texts):  # forecasts
            return next((why for text in texts if (why := _find_json_fault(str(text).encode()))), None)
        if "predictions" not in answer and outputs:
            return _find_tensor_fault(outputs, body)
        answer = answer.get("predictions", [])
    return _find_number_fault(answer, body)


def _find_tensor_fault(outputs: Sequence[Mapping[str, Any]], body: bytes) -> str | None:
    """Return what is wrong with outputs, of which those of BOOL hold booleans and all others numbers.

    One of BYTES holds as many texts as its shape says; texts alone might be anything.
    """
    kinds = [(_TYPES.get(str(each.get("datatype")), _NUMBERS), each) for each in outputs]
    leaves = [(value, kind) for kind, each in kinds for value in _iterate_leaves(each.get("data"))]
    texts = [each for kind, each in kinds if kind is _TEXTS]
    if not leaves or any(len(each.get("data", ())) != prod(each.get("shape", [0])) for each in texts):
        return f"no predictions in {body[:80]!r}"
    bad = [(value, kind) for value, kind in leaves if type(value) not in kind.types]
    return f"{bad[0][0]!r} where a {bad[0][1].word} should be" if bad else None


def _find_number_fault(answer: object, body: bytes) -> str | None:
    numbers = [value for value in _iterate_leaves(answer) if not isinstance(value, str)]
    if not numbers:
        return f"no predictions in {body[:80]!r}"
    bad = [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float)]
    return f"{bad[0]!r} where a number should be" if bad else None


def _iterate_leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _iterate_leaves(each)
    else:
        yield value
