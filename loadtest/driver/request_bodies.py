"""Makes a request body for each archive of a store from the archive itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from loadtest.driver.call_encodings import Encoding, encode_call
from loadtest.driver.dialects import DIALECTS, HEADER_JSON_BYTES, BodyKind, ClientDialect, encode_npy
from loadtest.driver.drawn_tensors import FP32, DrawnTensor, draw_tensor
from model_store.archives.archive import Archive, open_archive
from model_store.archives.manifest import ForecastSpec
from model_store.errors import LoadError
from model_store.names import ModelName
from model_store.stores.object_store import Source
from server.contract import JSON, NPY

READERS = 16
DEEPAR_INPUT = "request"  #: the input of the Open Inference Protocol that takes a forecast's JSON
BINARY = "application/octet-stream"
START = datetime(2026, 1, 1)  # noqa: DTZ001 -- DeepAR's stamps have no zone


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A request body, its content type and more headers; `version`: of its model, where requests name it.

    `names`: of the covariates in a forecast's JSON, then of its categories, which a table needs.
    """

    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RequestBodies:
    """The models that can be requested, with their bodies, and why others cannot."""

    questions: Mapping[ModelName, RequestBody]
    left_out: Mapping[ModelName, str]


def read_request_bodies(
    source: Source,
    names: Sequence[ModelName],
    kind: BodyKind | None,
    seed: int,
    step: Callable[[], None],
    dialect: ClientDialect = DIALECTS["sagemaker"],
) -> RequestBodies:
    """Read every archive, several at a time, and make its request body; `step` is called after each."""
    questions: dict[ModelName, RequestBody] = {}
    left_out: dict[ModelName, str] = {}

    def find(name: ModelName) -> RequestBody | str:
        try:
            fetched = source.get(name)
            assert fetched is not None, "only a conditional GET is answered `not modified`"
            return make_request_body(open_archive(fetched.data, name), kind, seed, dialect)
        except (LoadError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        for name, found in zip(names, pool.map(find, names), strict=True):
            step()
            if isinstance(found, str):
                left_out[name] = found
            else:
                questions[name] = found
    return RequestBodies(questions, left_out)


def join_requests(asked: Mapping[ModelName, RequestBody], encoding: Encoding = Encoding.JSON) -> RequestBody:
    """Join request bodies into one call for many models (POST /v1/forecasts).

    Raises ValueError for a body that is not one series, if their configurations differ, and where a table cannot hold
    them.
    """
    requests, configurations, names = [], set(), set()
    for name, each in asked.items():
        whole = _parse_deepar(each)
        if whole is None:
            raise ValueError(
                f"{name} is not asked for one forecast, and a call for many is of forecasts: --body deepar"
            )
        configurations.add(json.dumps(whole.get("configuration", {}), sort_keys=True))
        names.add(tuple(each.names))
        requests.append({"target_model": name, **whole["instances"][0]})
    if len(configurations) > 1:
        raise ValueError("the models are asked with different configurations, and a call has one for all")
    if len(names) > 1 and encoding is not Encoding.JSON:
        raise ValueError("the models take different covariates, and a table has one set of columns: use JSON")
    body = encode_call(requests, json.loads(configurations.pop()), encoding, names.pop())
    return RequestBody(body, encoding.media)


def _parse_deepar(question: RequestBody) -> dict[str, Any] | None:
    """Parse a request of one instance; returns None for any other."""
    if question.content_type != JSON:
        return None
    whole = json.loads(question.body)
    instances = whole.get("instances") if isinstance(whole, dict) else None
    return whole if isinstance(instances, list) and len(instances) == 1 and isinstance(instances[0], dict) else None


def make_request_body(
    archive: Archive, kind: BodyKind | None, seed: int, dialect: ClientDialect = DIALECTS["sagemaker"]
) -> RequestBody:
    """Make a request body for the archive: by default its golden sample, else a forecast, else tensors.

    In the Open Inference Protocol: tensors as JSON, or as binary; or a forecast as one element of BYTES.

    Raises ValueError if the archive does not take such a body, LoadError if it is damaged or of an unserved kind.
    """
    if dialect.wraps_v2:
        return _make_v2_body(archive, kind, seed)
    if kind is BodyKind.BINARY:
        raise ValueError("binary tensors are of the Open Inference Protocol: --protocol v2")
    spec = archive.spec
    forecast = spec.forecast if spec else None
    golden = archive.golden() if kind is None else None
    if golden is not None:
        return RequestBody(json.dumps(golden.request).encode())
    if kind is BodyKind.DEEPAR or (kind is None and forecast is not None):
        if forecast is None:
            raise ValueError(f"{archive.name} carries no `forecast` and cannot be asked for one; ask for tensors")
        body = json.dumps({"instances": [make_deepar_instance(forecast, seed)]}).encode()
        return RequestBody(body, names=(*forecast.dynamic_feat, *forecast.cat))
    drawn = _draw_inputs(archive, seed)
    if kind is not BodyKind.NPY:
        return RequestBody(json.dumps({name: each.nest() for name, each in drawn.items()}).encode())
    if len(drawn) != 1:
        raise ValueError(f"{archive.name} has {len(drawn)} inputs, and npy carries one array; ask for tensors as JSON")
    (only,) = drawn.values()
    if only.datatype != FP32:
        raise ValueError(f"{archive.name} takes {only.datatype}, and npy carries {FP32}; ask for tensors as JSON")
    return RequestBody(encode_npy(only.values), NPY)


def _make_v2_body(archive: Archive, kind: BodyKind | None, seed: int) -> RequestBody:
    """Make a request of the Open Inference Protocol, of one row. Raises as `make_request_body` does."""
    if kind is BodyKind.NPY:
        raise ValueError("the Open Inference Protocol carries no npy: ask for tensors, as JSON or binary")
    if kind is BodyKind.DEEPAR:
        text = make_request_body(archive, kind, seed).body.decode()
        return RequestBody(
            json.dumps({"inputs": [{**_name_input(DEEPAR_INPUT, (1,), "BYTES"), "data": [text]}]}).encode()
        )
    drawn = _draw_inputs(archive, seed)
    inputs = [_name_input(name, (1, *each.values.shape), each.datatype) for name, each in drawn.items()]
    if kind is not BodyKind.BINARY:
        for named, each in zip(inputs, drawn.values(), strict=True):
            named["data"] = each.list_values()
        return RequestBody(json.dumps({"inputs": inputs}).encode())
    parts = [each.pack() for each in drawn.values()]
    for named, part in zip(inputs, parts, strict=True):
        named["parameters"] = {"binary_data_size": len(part)}
    head = json.dumps({"inputs": inputs}).encode()
    return RequestBody(b"".join([head, *parts]), BINARY, {HEADER_JSON_BYTES: str(len(head))})


def _name_input(name: str, shape: tuple[int, ...], datatype: str) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "datatype": datatype}


def make_deepar_instance(forecast: ForecastSpec, seed: int) -> dict[str, object]:
    """Make a series of each product, as long as the archive needs: daily wave and noise around its scaler's center."""
    rng = np.random.default_rng(seed)
    steps = forecast.history_length
    wave = np.sin(np.arange(steps) * 2 * np.pi / 24)
    target = [
        (scaler.center + scaler.scale * (wave + rng.normal(0, 0.3, steps))).round(2).tolist()
        for scaler in forecast.product_scalers
    ]
    history = target if len(target) > 1 else target[0]
    found: dict[str, object] = {"start": str(START - timedelta(hours=steps)), "target": history}
    if forecast.dynamic_feat:
        shape = (len(forecast.dynamic_feat), steps + forecast.prediction_length)
        found["dynamic_feat"] = rng.normal(0, 1, shape).round(3).tolist()
    if forecast.cat:
        found["cat"] = [0] * len(forecast.cat)
    return found


def _draw_inputs(archive: Archive, seed: int) -> Mapping[str, DrawnTensor]:
    """Draw each input of one request row, with 1 for dimensions that the model leaves open."""
    from handlers.kinds import tensor_inputs  # noqa: PLC0415 -- torch, which a load of forecasts does not need

    taken = tensor_inputs(archive).items()
    return {name: draw_tensor(each.datatype, tuple(abs(n) for n in each.shape), seed) for name, each in taken}
