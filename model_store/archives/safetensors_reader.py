"""Reads the header of safetensors, and finds each tensor's bytes without copying them. Pure; runs in loader threads.

Source: the format's description in the project safetensors: u64 header's size, little-endian; a JSON object of tensors
by name, and `__metadata__`, which is ignored; the tensors' bytes, without gaps. Its own library holds the interpreter's
lock while it parses and while it copies all tensors: some 0.5 ms for a megabyte.
"""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from model_store.archives.container import quote_name
from model_store.archives.step_budget import StepBudget
from model_store.errors import ArchiveInvalid

MAX_TENSORS = 10_000  #: of a file
MAX_HEADER_BYTES = 2 << 20
_METADATA, _START = "__metadata__", 8
_Size = Annotated[int, Meta(ge=0, le=2**62)]


class TensorRecord(Struct, frozen=True):
    """One tensor of the header. Offsets count from the header's end."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_RECORD = msgspec.json.Decoder(TensorRecord)


def split_safetensors(raw: bytes) -> Iterator[tuple[str, TensorRecord, memoryview]]:
    """Each tensor with its record and its bytes, in the order of the bytes.

    Raises:
        ArchiveInvalid: not safetensors, or bytes that belong to none or to two of the tensors.
        ArchiveTooLarge: too many tensors.
    """
    view = memoryview(raw)
    size = int.from_bytes(view[:_START], "little")
    if size > MAX_HEADER_BYTES:
        raise ArchiveInvalid(f"it is not safetensors, or its header of {size} bytes is too large")
    if len(view) < _START + size:
        raise ArchiveInvalid(f"it is not sound safetensors: it has {len(view)} bytes, its header alone {_START + size}")
    data, end = view[_START + size :], 0
    for name, record in _parse_header(bytes(view[_START : _START + size])):
        start, stop = record.data_offsets
        if start != end or stop < start:
            where = f"{quote_name(name)} has bytes {start} to {stop}, but the one before ends at {end}"
            raise ArchiveInvalid(f"it is not sound safetensors: {where}")
        end = stop
        yield name, record, data[start:stop]
    if end != len(data):
        raise ArchiveInvalid(f"it is not sound safetensors: its tensors have {end} bytes of {len(data)}")


def _parse_header(header: bytes) -> list[tuple[str, TensorRecord]]:
    """The tensors by name, in the order of their bytes."""
    # Each tensor has an object of its own, so that there are no more of them than braces.
    StepBudget(MAX_TENSORS, "tensors").spend(header.count(b"{") - 1)
    StepBudget(6 * MAX_TENSORS, "fields of tensors and metadata").spend(header.count(b":"))
    try:
        records = {name: _RECORD.decode(raw) for name, raw in _HEADER.decode(header).items() if name != _METADATA}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"it is not sound safetensors: {error}") from error
    return sorted(records.items(), key=lambda item: item[1].data_offsets)
