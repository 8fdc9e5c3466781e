"""The two messages of the Open Inference Protocol over gRPC that a load needs, as bytes of Protocol Buffers. Pure.

They are written by hand, because a driver sends bytes that were made before the load, and so needs no protobuf. Source:
`ModelInferRequest` and `ModelInferResponse` of the public grpc_service.proto; numbers are the fields' there.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

SIZE = "binary_data_size"
#: numpy's types of the protocol's. BYTES and BF16, which numpy does not have, are apart.
DTYPES: Mapping[str, str] = {
    "BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
    **{f"{kind}{bits}": f"<{letter}{bits // 8}" for kind, letter in (("INT", "i"), ("UINT", "u"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip
_LENGTH, _VARINT, _FIXED64, _FIXED32 = 2, 0, 1, 5  # wire types


def encode_infer(model: str, version: str, body: bytes, json_bytes: int) -> bytes:
    """The request of a body of the protocol over HTTP: a document of so many bytes, and binary tensors behind it.

    Raises ValueError for a body that is none, or of tensors that cannot be sent.
    """
    try:
        document, at = orjson.loads(body[:json_bytes]), json_bytes
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body of a request by gRPC is no JSON: {error}") from error
    try:
        return _encode_document(model, version, document["inputs"], memoryview(body)[at:])
    except (KeyError, TypeError, AttributeError) as error:
        what = "the body of a request by gRPC is a document of the Open Inference Protocol, whose `inputs` have name"
        raise ValueError(f"{what}, shape, datatype and data, not {body[:80]!r}: {error!r}") from error


def read_infer(message: bytes) -> bytes:
    """The answer as the same document over HTTP, with the numbers as JSON. Raises ValueError for one that is none."""
    outputs: list[dict[str, Any]] = []
    raw: list[bytes] = []
    try:
        for number, value in _iterate_fields(message):
            if number == 5:  # noqa: PLR2004 -- outputs
                outputs.append(_read_head(value))
            elif number == 6:  # noqa: PLR2004 -- raw_output_contents
                raw.append(bytes(value))
        for output, content in zip(outputs, raw, strict=True):
            output["data"] = _decode_data(output["datatype"], content)
    except (IndexError, KeyError, struct.error) as error:
        raise ValueError(f"no ModelInferResponse with raw_output_contents: {error!r}") from error
    return orjson.dumps({"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def _read_head(message: memoryview) -> dict[str, Any]:
    """Name, datatype and shape of an output."""
    fields = {key: bytes(content) for key, content in _iterate_fields(message)}
    shape, at, packed = list[int](), 0, fields.get(3, b"")
    while at < len(packed):
        length, at = _decode_varint(packed, at)
        shape.append(length)
    return {"name": fields.get(1, b"").decode(), "datatype": fields.get(2, b"").decode(), "shape": shape}


def _encode_document(model: str, version: str, inputs: Sequence[Mapping[str, Any]], binary: memoryview) -> bytes:
    at = 0
    parts = [_encode_field(1, model.encode()), _encode_field(2, version.encode())]
    raw: list[bytes] = []
    for tensor in inputs:
        size = tensor.get("parameters", {}).get(SIZE)
        raw.append(_encode_data(tensor) if size is None else bytes(binary[at : at + size]))
        at += size or 0
        shape = b"".join(_encode_varint(int(n)) for n in tensor["shape"])
        fields = ((1, tensor["name"].encode()), (2, tensor["datatype"].encode()), (3, shape))
        parts.append(_encode_field(5, b"".join(_encode_field(*each) for each in fields)))
    return b"".join([*parts, *(_encode_field(7, each) for each in raw)])


def _encode_data(tensor: Mapping[str, Any]) -> bytes:
    datatype, data = tensor["datatype"], tensor.get("data", [])
    if datatype == "BYTES":
        return pack_texts(np.array(data, object).ravel().tolist())
    if datatype == "BF16":
        return narrow_to_bf16(np.array(data, np.float32))
    if datatype not in DTYPES:
        known = ", ".join([*DTYPES, "BF16", "BYTES"])
        raise ValueError(f"{tensor['name']} is {datatype}, which the load tester cannot write: {known}")
    return np.array(data, DTYPES[datatype]).tobytes()


def pack_texts(texts: Sequence[str]) -> bytes:
    """The elements of BYTES, each behind its length."""
    encoded = [each.encode() for each in texts]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def narrow_to_bf16(numbers: npt.NDArray[np.float32]) -> bytes:
    """The nearest BF16 of finite float32, ties to even: the upper halves of their bits."""
    bits = numbers.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def _decode_data(datatype: str, content: bytes) -> Any:
    if datatype == "BF16":
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
    if datatype != "BYTES":
        found = np.frombuffer(content, DTYPES[datatype])
        return found.astype(np.float32) if datatype == "FP16" else found
    texts, at = [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        texts.append(content[at + 4 : at + 4 + size].decode(errors="replace"))
        at += 4 + size
    return texts


def _encode_varint(value: int) -> bytes:
    found, value = bytearray(), value & 0xFFFF_FFFF_FFFF_FFFF
    while value > 0x7F:  # noqa: PLR2004 -- seven bits a byte
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _encode_field(number: int, content: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH) + _encode_varint(len(content)) + content


def _iterate_fields(message: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields with a length, others are skipped. Raises ValueError, IndexError for what is no message."""
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _decode_varint(view, at)
        kind = key & 7
        if kind == _LENGTH:
            size, at = _decode_varint(view, at)
            if size > len(view) - at:
                raise ValueError("a field is longer than its message")
            yield key >> 3, view[at : at + size]
            at += size
        elif kind == _VARINT:
            _, at = _decode_varint(view, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")


def _decode_varint(view: Sequence[int], at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte <= 0x7F:  # noqa: PLR2004
            return value, at
