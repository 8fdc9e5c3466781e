"""Between messages and the body that a worker reads: a JSON document with the tensors' bytes behind it. Pure; no numpy.

That is the binary tensor extension of the Open Inference Protocol over HTTP, so one codec (`handlers.codecs
.open_inference`) serves both transports. The numbers are not looked at here: bytes go on as they came, and elements in
typed fields become the bytes that they stand for.
"""

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from server.errors import Refused, Situation
from server.front.grpc.messages import find_message

MOST_TENSORS = 256  #: of one message, as the codec has it
_SIZE = "binary_data_size"
_OWN = ("binary_data_output", "binary_data", _SIZE)  #: parameters that say what this module decides
_FOR_TRANSPORT = "triton_"  #: prefix of parameters by which a client speaks of the transport
_MEDIA_JSON = ";json="

_Response = find_message("inference.ModelInferResponse")


class InferBody(NamedTuple):
    """What a worker is sent: the document's length, then the document and the tensors' bytes."""

    json_bytes: int
    body: bytes


class _Output(Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}


class _Answer(Struct):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str = ""
    parameters: dict[str, Any] = {}


_decode_answer = msgspec.json.Decoder(_Answer).decode


def write_body(request: Any) -> InferBody:
    """The body of a ModelInferRequest. Raises Refused that names the place."""
    if len(request.inputs) > MOST_TENSORS or len(request.outputs) > MOST_TENSORS:
        raise _refuse("inputs", f"a message has {MOST_TENSORS} tensors at most")
    parts = list(_list_parts(request))
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {**read_parameters(tensor.parameters), _SIZE: len(part)},
        }
        for tensor, part in zip(request.inputs, parts, strict=True)
    ]
    document: dict[str, Any] = {
        "id": request.id,
        "parameters": {**read_parameters(request.parameters), "binary_data_output": True},
        "inputs": inputs,
    }
    if request.outputs:
        document["outputs"] = [
            {"name": output.name, "parameters": read_parameters(output.parameters)} for output in request.outputs
        ]
    text = msgspec.json.encode(document)
    return InferBody(len(text), b"".join((text, *parts)))


def read_answer(body: bytes, content_type: str) -> Any:
    """The ModelInferResponse of a worker's answer, whose tensors are all binary."""
    _, _, size = content_type.partition(_MEDIA_JSON)
    json_bytes = int(size) if size else len(body)
    view = memoryview(body)
    answer = _decode_answer(view[:json_bytes])
    reply = _Response(model_name=answer.model_name, model_version=answer.model_version, id=answer.id)
    _set_parameters(reply.parameters, answer.parameters)
    at = json_bytes
    for output in answer.outputs:
        end = at + output.parameters.get(_SIZE, 0)
        tensor = reply.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        _set_parameters(tensor.parameters, output.parameters)
        reply.raw_output_contents.append(bytes(view[at:end]))
        at = end
    return reply


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a map of parameters, without those that are the transport's."""
    found = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None and name not in _OWN and not name.startswith(_FOR_TRANSPORT):
            found[name] = getattr(parameter, choice)
    return found


def _set_parameters(into: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _OWN:
            continue
        if isinstance(value, bool):
            into[name].bool_param = value
        elif isinstance(value, int):
            into[name].int64_param = value
        elif isinstance(value, float):
            into[name].double_param = value
        else:
            into[name].string_param = str(value)


def _list_parts(request: Any) -> Iterator[bytes]:
    """Yield the bytes of each input. Raises Refused."""
    raw, inputs = request.raw_input_contents, request.inputs
    if not raw:
        yield from (_pack_contents(tensor, f"inputs[{i}]") for i, tensor in enumerate(inputs))
        return
    if len(raw) != len(inputs):
        message = f"{len(raw)} parts for {len(inputs)} inputs: send one for each, or contents in every input"
        raise _refuse("raw_input_contents", message)
    for i, (tensor, part) in enumerate(zip(inputs, raw, strict=True)):
        if tensor.contents.ListFields():  # MLServer's client sends empty ones beside the parts
            raise _refuse(f"inputs[{i}].contents", "there are raw_input_contents too: send one of the two")
        yield part


def _pack_contents(tensor: Any, field: str) -> bytes:
    """The bytes of the elements in the field of the tensor's datatype. Raises Refused."""
    known = _CONTENTS.get(tensor.datatype)
    if known is None:
        message = f"elements of {tensor.datatype[:20]!r} have no field of contents: send raw_input_contents"
        raise _refuse(f"{field}.datatype", message)
    name, pack = known
    others = [each.name for each, _ in tensor.contents.ListFields() if each.name != name]
    if others:
        raise _refuse(f"{field}.contents.{others[0]}", f"elements of {tensor.datatype} are sent in {name}")
    try:
        return pack(getattr(tensor.contents, name))
    except OverflowError as error:
        raise _refuse(f"{field}.contents.{name}", f"an element is no {tensor.datatype}: {error}") from None


def _pack_as(code: str) -> Callable[[Iterable[Any]], bytes]:
    """Packs elements as `array` does for this type code, little-endian."""

    def pack(elements: Iterable[Any]) -> bytes:
        packed = array(code, elements)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()

    return pack


def _pack_texts(elements: Iterable[bytes]) -> bytes:
    """BYTES: each element behind its length in four bytes."""
    return b"".join(part for each in elements for part in (len(each).to_bytes(4, "little"), each))


_CONTENTS: Mapping[str, tuple[str, Callable[[Iterable[Any]], bytes]]] = {
    "BOOL": ("bool_contents", bytes),
    "INT8": ("int_contents", _pack_as("b")),
    "INT16": ("int_contents", _pack_as("h")),
    "INT32": ("int_contents", _pack_as("i")),
    "INT64": ("int64_contents", _pack_as("q")),
    "UINT8": ("uint_contents", _pack_as("B")),
    "UINT16": ("uint_contents", _pack_as("H")),
    "UINT32": ("uint_contents", _pack_as("I")),
    "UINT64": ("uint64_contents", _pack_as("Q")),
    "FP32": ("fp32_contents", _pack_as("f")),
    "FP64": ("fp64_contents", _pack_as("d")),
    "BYTES": ("bytes_contents", _pack_texts),
}


def _refuse(field: str, message: str) -> Refused:
    return Refused(Situation.BAD_REQUEST, message, field=field)
