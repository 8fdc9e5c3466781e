"""How one request to a model is written in each protocol that a server speaks: path, headers and body. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from server.contract import (
    FORECASTS_PATH,
    HEADER_TARGET_MODEL,
    INVOCATIONS_PATH,
    OPEN_INFERENCE_MODELS_PATH,
    PREDICTIONS_PATH,
)

FORECAST_INPUT = "request"  #: the input of the Open Inference Protocol that takes a forecast's JSON


class Protocol(StrEnum):
    """The protocols, as `fleetcast invoke --protocol` names them."""

    SAGEMAKER = "sagemaker"
    TORCHSERVE = "torchserve"
    V2 = "v2"
    FORECASTS = "forecasts"


@dataclass(frozen=True, slots=True)
class ProtocolRequest:
    """A request that is POSTed. `headers` are those of the protocol, beside the content type."""

    path: str
    body: bytes
    headers: Mapping[str, str]


def write_request(protocol: Protocol, model: str, body: bytes, version: str = "") -> ProtocolRequest:
    """A request to one model. `version`: of the model, where the protocol's path can name one.

    The body goes as it is; that of DeepAR (`instances`) becomes a call for forecasts. Raises ValueError for a version
    that the protocol has no place for, and for a body that is no call for forecasts.
    """
    if version and protocol not in (Protocol.TORCHSERVE, Protocol.V2):
        raise ValueError(f"the protocol {protocol} has no place for a version: it is for torchserve and v2")
    if protocol is Protocol.TORCHSERVE:
        place = f"/{quote(version, safe='')}" if version else ""
        return ProtocolRequest(f"{PREDICTIONS_PATH}/{quote(model)}{place}", body, {})
    if protocol is Protocol.V2:
        place = f"/versions/{quote(version, safe='')}" if version else ""
        return ProtocolRequest(f"{OPEN_INFERENCE_MODELS_PATH}/{quote(model)}{place}/infer", body, {})
    if protocol is Protocol.FORECASTS:
        return ProtocolRequest(FORECASTS_PATH, _call_for_forecasts(model, body), {})
    return ProtocolRequest(INVOCATIONS_PATH, body, {HEADER_TARGET_MODEL: model})


def wrap_forecast(body: bytes) -> bytes:
    """A forecast's JSON (`instances`) as a request of the Open Inference Protocol; any other body as it is."""
    try:
        whole: Any = json.loads(body)
    except ValueError:  # binary tensors, or what the server may say a word about
        return body
    if not isinstance(whole, dict) or "instances" not in whole or "inputs" in whole:
        return body
    element = {"name": FORECAST_INPUT, "shape": [1], "datatype": "BYTES", "data": [body.decode()]}
    return json.dumps({"inputs": [element]}).encode()


def _call_for_forecasts(model: str, body: bytes) -> bytes:
    """Each instance as a request to the model; a body that has `requests` already names its models itself."""
    try:
        whole: Any = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if isinstance(whole, dict) and "requests" in whole:
        return body
    instances = whole.get("instances") if isinstance(whole, dict) else None
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        raise ValueError('a call for forecasts takes {"instances": [...]}, or {"requests": [...]} with their models')
    requests = [{"target_model": model, **each} for each in instances]
    others = {key: value for key, value in whole.items() if key != "instances"}
    return json.dumps({"requests": requests, **others}).encode()
