"""The Open Inference Protocol (V2) between bytes and arrays: tensors as JSON data or as binary parts. No torch.

A request is a JSON document that names its inputs; the numbers of an input are in its `data`, flat or nested, or they
follow the document as little-endian float32, in the order of the inputs (the binary tensor extension). Source: the
Open Inference Protocol and Triton's extensions to it, as Triton 2.51 and tritonclient 2.73 speak them.

A front passes such a request on as it is, under a media type of ours that says where the document ends; a client's name
for the model, which an answer repeats, takes the place of the `Accept` header.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from msgspec import Meta, Raw, Struct

from handlers.base import Float32, Shape
from handlers.codecs import tensors
from handlers.errors import RequestError, UnsupportedMedia

INFER = "application/vnd.fleetcast.infer"  #: with `;json=N`: the request's first N bytes are the document
DESCRIBE = "application/vnd.fleetcast.describe"  #: without a body: what the model takes and gives
INFER_BINARY = "application/octet-stream"  #: with `;json=N`, as INFER, of an answer with binary parts
FP32, BYTES_EACH = "FP32", 4
MODEL_VERSION = "1"  #: of every model; what is served is said by X-Fleetcast-Model-Version
MOST_TENSORS, MOST_AXES, LONGEST_AXIS = 256, 16, 2**31 - 1
MOST_ROWS = 1024  #: of one request
MOST_DIGITS = 12  #: of a length
MOST_ID = 1024  #: characters of a request's id, which the answer repeats

Length = Annotated[int, Meta(ge=0, le=LONGEST_AXIS)]


class _Input(Struct):
    name: str
    shape: Annotated[list[Length], Meta(max_length=MOST_AXES)]
    datatype: str
    data: Raw = Raw(b"")
    parameters: dict[str, Any] = {}


class _Output(Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Document(Struct):
    inputs: Annotated[list[_Input], Meta(max_length=MOST_TENSORS)]
    id: Annotated[str, Meta(max_length=MOST_ID)] = ""
    outputs: Annotated[list[_Output], Meta(max_length=MOST_TENSORS)] | None = None
    parameters: dict[str, Any] = {}


_decode = msgspec.json.Decoder(_Document).decode


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives, without the axis of rows; -1 stands for any length.

    `outputs` are in the order in which they are answered where a request does not choose.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Call:
    """A request: feeds [n, *shape] by input, and how to answer.

    `has_rows`: whether the request's tensors have the axis of rows, as the answer's then have. `outputs`: the names of
    the answer's tensors, each with whether it is to be binary.
    """

    feeds: Mapping[str, Float32]
    n: int
    has_rows: bool
    id: str
    outputs: Sequence[tuple[str, bool]]


def describe_tensors(signature: Signature, **parameters: object) -> bytes:
    """The metadata of a model's tensors: each may be sent, and is answered, with an axis of rows before its own.

    `parameters`: what else a client must know.
    """
    sides = {"inputs": signature.inputs, "outputs": signature.outputs}
    listed = {
        side: [{"name": name, "datatype": FP32, "shape": [-1, *shape]} for name, shape in shapes.items()]
        for side, shapes in sides.items()
    }
    return orjson.dumps({**listed, "parameters": parameters})


def read_request(body: bytes, content_type: str, signature: Signature) -> Call:
    """Read a request for a model. Raises RequestError that names the input and the place in it."""
    size = _json_bytes(content_type, len(body))
    if size == 0:
        return _read_raw(body, signature)
    try:
        document = _decode(memoryview(body)[:size])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"not an inference request: {error}") from error
    outputs = list(_choose_outputs(document, signature))
    rows = _check_inputs(document, signature)
    feeds, behind = dict[str, Float32](), memoryview(body)[size:]
    for i, given in enumerate(document.inputs):
        binary = _binary_size(given, f"inputs[{i}]")
        if binary is None:
            array = _read_data(given, f"inputs[{i}]")
        else:
            array, behind = _read_binary(behind[:binary], given, binary), behind[binary:]
        feeds[given.name] = array[None] if rows is None else array
    if behind:
        raise RequestError(f"{len(behind)} bytes of the body are no input's: binary_data_size says how many one has")
    return Call(feeds, 1 if rows is None else rows, rows is not None, document.id, outputs)


def write_answer(call: Call, model: str, outputs: Mapping[str, Float32]) -> tuple[bytes, str]:
    """Write the answer of outputs [n, *shape], C-contiguous: JSON, and behind it what was asked as binary."""
    shown, parts = [], list[bytes]()
    for name, binary in call.outputs:
        array = outputs[name] if call.has_rows else outputs[name][0]
        head: dict[str, Any] = {"name": name, "datatype": FP32, "shape": array.shape}
        if binary:
            parts.append(array.astype("<f4", copy=False).tobytes())
            head["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            head["data"] = tensors.encode_in_blocks(array.reshape(-1))
        shown.append(head)
    document: dict[str, Any] = {"id": call.id} if call.id else {}
    document |= {"model_name": model, "model_version": MODEL_VERSION, "outputs": shown}
    text = tensors.write_json(document)
    if not parts:
        return text, "application/json"
    return b"".join((text, *parts)), f"{INFER_BINARY};json={len(text)}"


def _json_bytes(content_type: str, most: int) -> int:
    """The length of the document. Any client can send the media type as its own, so it may be wrong."""
    name, _, size = content_type.partition(";json=")
    if name != INFER or not (size.isascii() and size.isdigit() and len(size) <= MOST_DIGITS and int(size) <= most):
        message = f"content type {content_type[:80]!r} is not {INFER};json=N with at most the body's {most} bytes"
        raise UnsupportedMedia(f"{message}; clients of the Open Inference Protocol ask /v2/models/MODEL/infer")
    return int(size)


def _read_raw(body: bytes, signature: Signature) -> Call:
    """A body without a document is the numbers of the only input, in as many rows as it has."""
    if len(signature.inputs) != 1:
        names = ", ".join(signature.inputs)
        raise RequestError(f"a body without JSON is one input's numbers, but the model takes {names}: send JSON too")
    ((name, shape),) = signature.inputs.items()
    each = prod(shape) * BYTES_EACH
    if -1 in shape or not body or len(body) % each:
        raise RequestError(f"{len(body)} bytes are not rows of {list(shape)} float32 numbers", field=name)
    dims = (len(body) // each, *shape)
    _require_few(dims[0])
    array = _require_finite(np.frombuffer(body, "<f4").astype(np.float32, copy=False).reshape(dims), name)
    return Call({name: array}, len(array), True, "", [(name, True) for name in signature.outputs])


def _check_inputs(document: _Document, signature: Signature) -> int | None:
    """The rows of a request whose inputs are the model's, each of its shape; None: they have no axis of rows."""
    found = dict[str, int | None]()
    for i, given in enumerate(document.inputs):
        shape = signature.inputs.get(given.name)
        if shape is None or given.name in found:
            known = ", ".join(signature.inputs)
            what = "is sent twice" if shape is not None else f"is none of the model's, which takes {known}"
            raise RequestError(f"the input {given.name[:80]!r} {what}", field=f"inputs[{i}].name")
        found[given.name] = _count_rows(given, shape, f"inputs[{i}]")
    missing = [name for name in signature.inputs if name not in found]
    if missing:
        raise RequestError(f"the inputs {', '.join(missing)} are missing", field="inputs")
    first, *others = found
    different = next((name for name in others if found[name] != found[first]), None)
    if different is not None:
        raise RequestError(f"the inputs {first} and {different} differ in their rows", field="inputs")
    _require_few(found[first])
    return found[first]


def _require_few(rows: int | None) -> None:
    if rows is not None and rows > MOST_ROWS:
        raise RequestError(f"{rows} rows are more than {MOST_ROWS}: send them in several requests", field="inputs")


def _choose_outputs(document: _Document, signature: Signature) -> Iterator[tuple[str, bool]]:
    """Yield the names of the outputs that are asked, and whether each is to be binary."""
    default = _flag(document.parameters, "binary_data_output", default=False, field="parameters")
    if not document.outputs:
        yield from ((name, default) for name in signature.outputs)
        return
    seen = set[str]()
    for i, asked in enumerate(document.outputs):
        if asked.name not in signature.outputs or asked.name in seen:
            what = "asked twice" if asked.name in seen else f"none of the model's: {', '.join(signature.outputs)}"
            raise RequestError(f"the output {asked.name[:80]!r} is {what}", field=f"outputs[{i}].name")
        if asked.parameters.get("classification"):
            raise RequestError("classification is not served: ask the output itself", field=f"outputs[{i}].parameters")
        seen.add(asked.name)
        yield asked.name, _flag(asked.parameters, "binary_data", default=default, field=f"outputs[{i}].parameters")


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool, field: str) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", field=f"{field}.{name}")
    return value


def _count_rows(given: _Input, shape: Shape, field: str) -> int | None:
    """The rows of an input; None where its shape has no axis of rows."""
    if given.datatype != FP32:
        message = f"the input {given.name} takes {FP32}, not {given.datatype[:20]!r}: convert the numbers"
        raise RequestError(message, field=f"{field}.datatype")
    sent = tuple(given.shape)
    for rows, own in ((None, sent), (sent[0] if sent else 0, sent[1:])):
        if rows != 0 and _fits(own, shape):
            return rows
    shown = ["any" if want == -1 else want for want in shape]
    message = f"the input {given.name} has the shape {shown}, or [rows, ...] before it, not {list(sent)}"
    raise RequestError(message, field=f"{field}.shape")


def _fits(own: Shape, shape: Shape) -> bool:
    pairs = zip(shape, own, strict=False)
    return len(own) == len(shape) and all(have and want in (-1, have) for want, have in pairs)


def _binary_size(given: _Input, field: str) -> int | None:
    """The bytes of an input behind the document; None where its numbers are in `data`."""
    size = given.parameters.get("binary_data_size")
    if size is None:
        if not given.data:
            message = f"the input {given.name} has no numbers: send data, or binary_data_size and the bytes behind"
            raise RequestError(message, field=f"{field}.data")
        return None
    needed = prod(given.shape) * BYTES_EACH
    if given.data or type(size) is not int or size != needed:
        what = "it has data too" if given.data else f"{given.shape} of {FP32} are {needed} bytes, not {size!r:.20}"
        raise RequestError(f"the input {given.name}: {what}", field=f"{field}.parameters.binary_data_size")
    return size


def _read_data(given: _Input, field: str) -> Float32:
    """The numbers of an input in `data`: one list of all, or lists as its shape has them."""
    raw = bytes(given.data)
    is_flat = not raw[1:].lstrip(b" \t\r\n").startswith(b"[")
    dims = (prod(given.shape),) if is_flat else tuple(given.shape)
    name = f"{field}.data"
    found = tensors.read_json(b"{%b:%b}" % (orjson.dumps(name), raw), {name: dims})
    assert found is not None, "the one name is not `instances`"
    return found[name].reshape(given.shape)


def _read_binary(part: memoryview, given: _Input, size: int) -> Float32:
    if len(part) != size:
        raise RequestError(f"the input {given.name} has {size} bytes behind the JSON, but {len(part)} are left")
    array = np.frombuffer(part, "<f4").astype(np.float32, copy=False).reshape(given.shape)
    return _require_finite(array, given.name)


def _require_finite(array: Float32, name: str) -> Float32:
    if not np.isfinite(array).all():
        place = "".join(f"[{i}]" for i in np.argwhere(~np.isfinite(array))[0])
        raise RequestError("the number is not finite", field=name + place)
    return array
