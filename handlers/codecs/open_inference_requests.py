"""Requests of the Open Inference Protocol (V2), read into arrays: tensors as JSON data or as binary parts. No torch.

A request is a JSON document that names its inputs; the numbers of an input are in its `data`, flat or nested, or they
follow the document as little-endian bytes, in the order of the inputs (the binary tensor extension).

A listener passes such a request on as it is, under a media type of ours that says where the document ends; a client's
name for the model, which an answer repeats, takes the place of the `Accept` header.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from handlers.base import Shape
from handlers.codecs.classification import MOST_CLASSES
from handlers.codecs.datatypes import BYTES, MOST_STRINGS, Array, Datatype, read_bytes, read_data
from handlers.codecs.open_inference import INFER, AskedOutput, Call, Signature
from handlers.errors import RequestError, UnsupportedMedia
from model_store.archives.json_faults import FAULTS, explain_fault

MOST_TENSORS, MOST_AXES, LONGEST_AXIS = 256, 16, 2**31 - 1
MOST_ROWS = 1024  #: of one request
MOST_DIGITS = 12  #: of a length
MOST_ID = 1024  #: characters of a request's id, which the answer repeats
MOST_WHOLE = 2**64  #: `timeout` and `priority` are below it
UNNAMED, CONTENT_TYPE = "input-1", "content_type"  #: how MLServer's codecs of whole requests name the only input

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
    output: Raw = Raw(b"")  # what is misspelt; other unknown keys are let through, as Triton does
    parameter: Raw = Raw(b"")


_decode = msgspec.json.Decoder(_Document).decode


class InferDocument:
    """A request's JSON, checked for itself, and what follows it. None where there is no JSON: raw binary."""

    def __init__(self, body: bytes, content_type: str) -> None:
        """Raises RequestError."""
        size = _parse_json_bytes(content_type, len(body))
        if not body:
            raise RequestError("the body is empty: send a JSON document with inputs")
        self.behind = memoryview(body)[size:]
        self._document = _parse_document(memoryview(body)[:size]) if size else None

    def __repr__(self) -> str:
        return f"<InferDocument {', '.join(self.names)}, {len(self.behind)} bytes behind>"

    @property
    def names(self) -> list[str]:
        """Of the inputs; none where the body is one input's numbers."""
        return [] if self._document is None else [each.name for each in self._document.inputs]

    def is_text_for(self, name: str) -> bool:
        """Whether the only input is this one, or a text that MLServer's codec of whole requests has named itself."""
        if self._document is None or len(self._document.inputs) != 1:
            return False
        (given,) = self._document.inputs
        return given.name == name or (given.datatype == BYTES and _is_unnamed(self._document))

    def read(self, signature: Signature) -> Call:
        """The call for a model. Raises RequestError that names the input and the place in it."""
        document = self._document
        if document is None:
            return _read_raw(self.behind, signature)
        for misspelt, meant in ((document.output, "output"), (document.parameter, "parameter")):
            if misspelt:
                raise RequestError(f"there is no such key; did you mean {meant}s?", field=meant)
        _check_whole(document.parameters, "timeout")
        _check_whole(document.parameters, "priority")
        if _is_unnamed(document) and len(signature.inputs) == 1 and UNNAMED not in signature.inputs:
            (document.inputs[0].name,) = signature.inputs
        outputs = list(_choose_outputs(document, signature))
        rows = _check_inputs(document, signature)
        feeds, behind = dict[str, Array](), self.behind
        for i, given in enumerate(document.inputs):
            datatype, place = signature.get_datatype(given.name), f"inputs[{i}]"
            size = _find_binary_size(given, datatype, place)
            if size is None:
                array = read_data(bytes(given.data), datatype, given.shape, f"{place}.data")
            else:
                if size > len(behind):
                    message = f"the input {given.name} has {size} bytes behind the JSON, but {len(behind)} are left"
                    raise RequestError(message, field=place)
                array, behind = read_bytes(behind[:size], datatype, given.shape, given.name), behind[size:]
            feeds[given.name] = array[None] if rows is None else array
        if behind:
            raise RequestError(
                f"{len(behind)} bytes of the body are no input's: binary_data_size says how many one has"
            )
        n = 1 if rows is None else rows
        if n > 1 and any(asked.classes * n > MOST_STRINGS for asked in outputs):
            raise RequestError(f"{n} rows of so many classes are more than {MOST_STRINGS} in all", field="outputs")
        return Call(feeds, n, rows is not None, document.id, outputs, signature)


def read_request(body: bytes, content_type: str, signature: Signature) -> Call:
    """Read a request for a model. Raises RequestError that names the input and the place in it."""
    return InferDocument(body, content_type).read(signature)


def _parse_json_bytes(content_type: str, most: int) -> int:
    """The length of the document. Any client can send the media type as its own, so it may be wrong."""
    name, _, size = content_type.partition(";json=")
    if name != INFER or not (size.isascii() and size.isdigit() and len(size) <= MOST_DIGITS and int(size) <= most):
        message = f"content type {content_type[:80]!r} is not {INFER};json=N with at most the body's {most} bytes"
        raise UnsupportedMedia(f"{message}; clients of the Open Inference Protocol ask /v2/models/MODEL/infer")
    return int(size)


def _parse_document(text: memoryview) -> _Document:
    """Raises RequestError, in words of ours, that names the place."""
    try:
        return _decode(text)
    except FAULTS as error:
        fault = explain_fault(error)
        if not isinstance(error, msgspec.ValidationError):
            raise RequestError(f"not an inference request: {fault.message}") from error
        raise RequestError(fault.message, field=fault.place or None) from error


def _is_unnamed(document: _Document) -> bool:
    """Whether a codec of MLServer has made the request of one value, so that the input's name is not the client's."""
    return CONTENT_TYPE in document.parameters and [each.name for each in document.inputs] == [UNNAMED]


def _read_raw(body: memoryview, signature: Signature) -> Call:
    """A body without a document is the only input: as many rows as it has, or one row whose open length it has."""
    if len(signature.inputs) != 1:
        names = ", ".join(signature.inputs)
        raise RequestError(f"a body without JSON is one input's numbers, but the model takes {names}: send JSON too")
    ((name, shape),) = signature.inputs.items()
    datatype = signature.get_datatype(name)
    dims = _find_raw_dims(len(body), shape, datatype)
    if dims is None:
        raise RequestError(f"{len(body)} bytes are not rows of {list(shape)} {datatype.name}", field=name)
    _require_few(dims[0])
    if datatype.name == BYTES:  # the one element stands without its length
        body = memoryview(len(body).to_bytes(4, "little") + body)
    array = read_bytes(body, datatype, dims, name)
    outputs = [AskedOutput(each, binary=True) for each in signature.outputs]
    return Call({name: array}, len(array), True, "", outputs, signature)


def _find_raw_dims(size: int, shape: Shape, datatype: Datatype) -> Shape | None:
    """The shape, with the axis of rows, of so many bytes; None where they do not fit."""
    if datatype.name == BYTES:
        return (1, *(abs(length) for length in shape)) if all(abs(length) == 1 for length in shape) else None
    each = prod(abs(length) for length in shape) * datatype.size
    if shape.count(-1) > 1 or not each or size % each:
        return None
    if -1 not in shape:
        return size // each, *shape
    return 1, *(size // each if length == -1 else length for length in shape)


def _check_inputs(document: _Document, signature: Signature) -> int | None:
    """The rows of a request whose inputs are the model's, each of its shape; None: they have no axis of rows."""
    found = dict[str, int | None]()
    for i, given in enumerate(document.inputs):
        shape = signature.inputs.get(given.name)
        if shape is None or given.name in found:
            known = ", ".join(signature.inputs)
            what = "is sent twice" if shape is not None else f"is none of the model's, which takes {known}"
            raise RequestError(f"the input {given.name[:80]!r} {what}", field=f"inputs[{i}].name")
        found[given.name] = _count_rows(given, shape, signature, f"inputs[{i}]")
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


def _choose_outputs(document: _Document, signature: Signature) -> Iterator[AskedOutput]:
    """Yield the outputs that are asked, in the model's order. One that is asked twice is answered once."""
    default = _flag(document.parameters, "binary_data_output", default=False, field="parameters")
    if not document.outputs:
        yield from (AskedOutput(name, default) for name in signature.outputs)
        return
    found = dict[str, AskedOutput]()
    for i, asked in enumerate(document.outputs):
        if asked.name not in signature.outputs:
            message = f"the output {asked.name[:80]!r} is none of the model's: {', '.join(signature.outputs)}"
            raise RequestError(message, field=f"outputs[{i}].name")
        place = f"outputs[{i}].parameters"
        binary = _flag(asked.parameters, "binary_data", default=default, field=place)
        found[asked.name] = AskedOutput(asked.name, binary, _count_classes(asked, signature, place))
    yield from (found[name] for name in signature.outputs if name in found)


def _count_classes(asked: _Output, signature: Signature, field: str) -> int:
    """How many of its largest values an output is asked for; 0: itself. Raises RequestError."""
    count = asked.parameters.get("classification", 0)
    if type(count) is not int or not 0 <= count <= MOST_CLASSES:
        message = f"classification must be a whole number from 1 to {MOST_CLASSES}, not {count!r:.20}"
        raise RequestError(message, field=f"{field}.classification")
    if count and signature.get_datatype(asked.name).name == BYTES:
        raise RequestError(
            f"the output {asked.name} is {BYTES}, which have no largest", field=f"{field}.classification"
        )
    return count


def _check_whole(parameters: Mapping[str, Any], name: str) -> None:
    """Raises RequestError unless a parameter is a whole number where it is there at all."""
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < MOST_WHOLE:
        raise RequestError(f"{name} must be a whole number, 0 or more, not {value!r:.20}", field=f"parameters.{name}")


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool, field: str) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", field=f"{field}.{name}")
    return value


def _count_rows(given: _Input, shape: Shape, signature: Signature, field: str) -> int | None:
    """The rows of an input; None where its shape has no axis of rows."""
    wanted = signature.get_datatype(given.name).name
    if given.datatype != wanted:
        message = f"the input {given.name} takes {wanted}, not {given.datatype[:20]!r}: convert the values"
        raise RequestError(message, field=f"{field}.datatype")
    sent = tuple(given.shape)
    if _fits(sent, shape):
        return None
    if signature.has_rows and sent and sent[0] and _fits(sent[1:], shape):
        return sent[0]
    shown = ["any" if want == -1 else want for want in shape]
    more = ", or [rows, ...] before it" if signature.has_rows else ""
    message = f"the input {given.name} has the shape {shown}{more}, not {list(sent)}"
    raise RequestError(message, field=f"{field}.shape")


def _fits(own: Shape, shape: Shape) -> bool:
    pairs = zip(shape, own, strict=False)
    return len(own) == len(shape) and all(want in (-1, have) for want, have in pairs)


def _find_binary_size(given: _Input, datatype: Datatype, field: str) -> int | None:
    """The bytes of an input behind the document; None where its values are in `data`. Raises RequestError."""
    size = given.parameters.get("binary_data_size")
    if size is None:
        if not given.data:
            message = f"the input {given.name} has no values: send data, or binary_data_size and the bytes behind"
            raise RequestError(message, field=f"{field}.data")
        return None
    needed = prod(given.shape) * datatype.size
    if given.data or type(size) is not int or size < 0 or (datatype.size and size != needed):
        wants = f"{given.shape} of {datatype.name} are {needed} bytes" if datatype.size else "it must be a whole number"
        what = "it has data too" if given.data else f"{wants}, not {size!r:.20}"
        raise RequestError(f"the input {given.name}: {what}", field=f"{field}.parameters.binary_data_size")
    return size
