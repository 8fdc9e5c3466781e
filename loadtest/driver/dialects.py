"""One adapter for each server protocol: the request for a model, and the check of a response. Pure.

Sources: Fleetcast and SageMaker, the runtime's InvokeEndpoint with its target-model header; TorchServe and Multi Model
Server, the inference API (`/predictions`); MLServer and Triton, the Open Inference Protocol (V2); Ray Serve, the header
of its model multiplexing; forecasts, Fleetcast's call for many models (`/v1/forecasts`), whose body names them.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import orjson

from server.contract import FORECASTS_PATH, HEADER_TARGET_MODEL, INVOCATIONS_PATH, JSON

NO_HEADERS: Mapping[str, str] = {}
DIGITS = 4  #: decimal digits of the numbers in a tensor body


class BodyKind(StrEnum):
    """The kind of a request body."""

    DEEPAR = "deepar"  #: a forecast: the history as JSON of SageMaker DeepAR
    TENSOR = "tensor"  #: the network's input as nested numbers
    NPY = "npy"  #: the same as a .npy file


@dataclass(frozen=True, slots=True)
class ClientDialect:
    """A protocol: its path and headers, which contain `{model}`, and the wrapping of a tensor body."""

    name: str
    path: str
    headers: Mapping[str, str]
    wraps_v2: bool = False
    many: bool = False  #: a request is a call for several models

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
        self, host: str, model: str, body: bytes, content_type: str = JSON, headers: Mapping[str, str] = NO_HEADERS
    ) -> bytes:
        """Make a complete HTTP/1.1 request, with `headers` besides those of the protocol."""
        lines = [f"POST {self.path.format(model=quote(model))} HTTP/1.1", f"Host: {host}"]
        lines += [f"{key}: {value.format(model=model)}" for key, value in self.headers.items()]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode() + body


DIALECTS: Mapping[str, ClientDialect] = {
    each.name: each
    for each in (
        ClientDialect("sagemaker", INVOCATIONS_PATH, {HEADER_TARGET_MODEL: "{model}"}),
        ClientDialect("forecasts", FORECASTS_PATH, {}, many=True),
        ClientDialect("torchserve", "/predictions/{model}", {}),
        ClientDialect("mms", "/predictions/{model}", {}),
        ClientDialect("v2", "/v2/models/{model}/infer", {}, wraps_v2=True),
        ClientDialect("ray", "/", {"serve_multiplexed_model_id": "{model}"}),
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


def find_fault(body: bytes) -> str | None:
    """Return what is wrong with an answer. JSON and npy must contain numbers, all of them finite."""
    return _find_npy_fault(body) if body.startswith(b"\x93NUMPY") else _find_json_fault(body)


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
        outputs = [each.get("data") for each in answer.get("outputs", ()) if isinstance(each, dict)]
        answer = answer.get("predictions", outputs)
    return _find_number_fault(answer, body)


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
