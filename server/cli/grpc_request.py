"""One request by gRPC, for `fleetcast invoke --protocol grpc`: the Open Inference Protocol's JSON, and an answer's.

It needs grpcio, the extra `fleetcast[grpc]`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from server.front.grpc.messages import find_message
from server.sdk.errors import FleetcastError, Unreachable
from server.sdk.protocols import FORECAST_INPUT

METHOD = "/inference.GRPCInferenceService/ModelInfer"
REQUEST, RESPONSE = "inference.ModelInferRequest", "inference.ModelInferResponse"
TIMEOUT_S = 55.0
MESSAGE_BYTES = 64 * 2**20

#: Datatype -> the field of a message that has its numbers; numpy's type of them in an answer's bytes.
CONTENTS: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", ""),
}


def send_by_grpc(url: str, model: str, body: bytes, version: str, token: str | None) -> tuple[bytes, dict[str, str]]:
    """The answer as JSON, and what comes behind it by name.

    Raises FleetcastError with what the server said, ValueError for a body that is no request.
    """
    request = write_message(model, body, version)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with _open_channel(url) as channel:
        call = channel.unary_unary(
            METHOD,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=find_message(RESPONSE).FromString,
        )
        try:
            answer, done = call.with_call(request, timeout=TIMEOUT_S, metadata=metadata)
            return read_message(answer), {key: str(value) for key, value in done.trailing_metadata()}
        except grpc.RpcError as error:
            status = error.code()
            if status is grpc.StatusCode.UNAVAILABLE:
                raise Unreachable(
                    f"{url}: {error.details()} (does `fleetcast serve --grpc-port` run there?)"
                ) from error
            raise FleetcastError(str(error.details()), error_type=status.name) from error


def write_message(model: str, body: bytes, version: str) -> Any:
    """The message of a body: of `inputs`, else of a forecast's JSON. Raises ValueError that names the place."""
    try:
        whole: Any = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not (isinstance(whole, dict) and "inputs" in whole):
        text = body.decode()
        whole = {"inputs": [{"name": FORECAST_INPUT, "shape": [1], "datatype": "BYTES", "data": [text]}]}
    message = find_message(REQUEST)(model_name=model, model_version=version, id=str(whole.get("id", "")))
    for i, given in enumerate(whole["inputs"]):
        try:
            tensor = message.inputs.add(name=given["name"], datatype=given["datatype"], shape=given["shape"])
            field, _ = CONTENTS[given["datatype"]]
            values = [each.encode() if field == "bytes_contents" else each for each in _iterate_leaves(given["data"])]
            getattr(tensor.contents, field).extend(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"inputs[{i}] is no tensor with name, shape, datatype and data ({why})") from None
    return message


def read_message(message: Any) -> bytes:
    """The answer as the Open Inference Protocol's JSON."""
    import numpy as np  # noqa: PLC0415 -- a tenth of a second that other protocols save

    outputs = []
    for tensor, raw in zip(message.outputs, message.raw_output_contents, strict=True):
        kind = CONTENTS[tensor.datatype][1]
        data = np.frombuffer(raw, kind).tolist() if kind else [text.decode(errors="replace") for text in _split(raw)]
        outputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": data})
    head = {"model_name": message.model_name, "model_version": message.model_version}
    return json.dumps({**head, **({"id": message.id} if message.id else {}), "outputs": outputs}).encode()


def _open_channel(url: str) -> Any:
    """Raises ValueError for an address that is none."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.netloc:
        raise ValueError(f"{url!r} is not the address of a gRPC listener; give one such as http://127.0.0.1:8001")
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]
    if parts.scheme not in ("https", "grpcs"):
        return grpc.insecure_channel(parts.netloc, options)
    trusted = os.environ.get("SSL_CERT_FILE")
    roots = Path(trusted).read_bytes() if trusted else None
    return grpc.secure_channel(parts.netloc, grpc.ssl_channel_credentials(roots), options)


def _iterate_leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _iterate_leaves(each)
    else:
        yield value


def _split(raw: bytes) -> Iterator[bytes]:
    """The elements of BYTES, each behind its length of four bytes."""
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        yield raw[at + 4 : end]
        at = end
