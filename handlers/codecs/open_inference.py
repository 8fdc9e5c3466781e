"""The Open Inference Protocol (V2): what a model takes and gives, and the answers to its requests. No torch.

Source: the Open Inference Protocol and Triton's extensions to it, as Triton 2.51, tritonclient 2.73 and MLServer 1.7
speak them. `handlers.codecs.open_inference_requests` reads requests, `handlers.codecs.datatypes` reads and writes the
values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from handlers.base import Shape
from handlers.codecs import tensors
from handlers.codecs.classification import classify_rows
from handlers.codecs.datatypes import (
    BYTES,
    DATATYPES,
    FP32,
    Array,
    Datatype,
    write_bytes,
    write_data,
)

INFER = "application/vnd.fleetcast.infer"  #: with `;json=N`: the request's first N bytes are the document
DESCRIBE = "application/vnd.fleetcast.describe"  #: without a body: what the model takes and gives
INFER_BINARY = "application/octet-stream"  #: with `;json=N`, as INFER, of an answer with binary parts
MODEL_VERSION = "1"  #: of every model; what is served is said by X-Fleetcast-Model-Version


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives, without the axis of rows; -1 stands for any length.

    `outputs` are in the order in which they are answered. `types`: the datatypes by the name of a tensor, where they
    are not FP32. `has_rows`: whether tensors may have an axis of rows before their own.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    types: Mapping[str, str] = field(default_factory=dict)
    has_rows: bool = True

    def get_datatype(self, name: str) -> Datatype:
        """The datatype of an input or output."""
        return DATATYPES[self.types.get(name, FP32)]


@dataclass(frozen=True, slots=True)
class AskedOutput:
    """An output that a request asks for. `classes`: how many of its largest values; 0: the output itself."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A request: feeds [n, *shape] by input, and how to answer.

    `has_rows`: whether the request's tensors have the axis of rows, as the answer's then have.
    """

    feeds: Mapping[str, Array]
    n: int
    has_rows: bool
    id: str
    outputs: Sequence[AskedOutput]
    signature: Signature


def describe_tensors(signature: Signature, **parameters: object) -> bytes:
    """The metadata of a model's tensors: each may be sent, and is answered, with an axis of rows before its own.

    `parameters`: what else a client must know.
    """
    sides = {"inputs": signature.inputs, "outputs": signature.outputs}
    listed = {side: [list_tensor(signature, name, shape) for name, shape in sides[side].items()] for side in sides}
    return orjson.dumps({**listed, "parameters": parameters})


def list_tensor(signature: Signature, name: str, shape: Shape) -> dict[str, object]:
    """The metadata of one tensor."""
    dims = [-1, *shape] if signature.has_rows else list(shape)
    return {"name": name, "datatype": signature.get_datatype(name).name, "shape": dims}


def write_answer(call: Call, model: str, outputs: Mapping[str, Array]) -> tuple[bytes, str]:
    """Write the answer of outputs [n, *shape], C-contiguous: JSON, and behind it what was asked as binary."""
    shown, parts = [], list[bytes]()
    for asked in call.outputs:
        datatype = call.signature.get_datatype(asked.name)
        array = outputs[asked.name] if call.has_rows else outputs[asked.name][0]
        if asked.classes:
            array = classify_rows(array, datatype, asked.classes, has_rows=call.has_rows)
            datatype = DATATYPES[BYTES]
        head: dict[str, Any] = {"name": asked.name, "datatype": datatype.name, "shape": array.shape}
        if asked.binary:
            parts.append(write_bytes(array, datatype))
            head["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            head["data"] = write_data(array, datatype)
        shown.append(head)
    document: dict[str, Any] = {"id": call.id} if call.id else {}
    document |= {"model_name": model, "model_version": MODEL_VERSION, "outputs": shown}
    text = tensors.write_json(document)
    if not parts:
        return text, "application/json"
    return b"".join((text, *parts)), f"{INFER_BINARY};json={len(text)}"
