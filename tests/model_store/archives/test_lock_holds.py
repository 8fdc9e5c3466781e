"""What holds the interpreter's lock in a load is bounded by the input of each call: the step thread needs that lock.

A call into C gives the lock to no other thread until it returns, unless it releases it. So no such call gets more bytes
or values at once than it needs some milliseconds for, however large the archive is. How long it takes is not asserted.
"""

import gzip
import io
import json
import tarfile
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from model_store.archives import container, tar_reader
from model_store.archives.archive import open_archive, read_tensors
from model_store.archives.container import COPIED_BYTES, FED_BYTES, INFLATED_BYTES, Limits, inflate
from model_store.archives.manifest import MAX_VALUES, parse_golden, parse_mar_manifest, parse_spec
from model_store.archives.safetensors_reader import MAX_TENSORS, split_safetensors
from model_store.archives.tar_reader import read_tar_gz
from model_store.errors import ArchiveInvalid, ArchiveTooLarge
from tests.archives import make_zip

MIB = 1024 * 1024
WIDE = Limits(max_ratio=10_000)
NOISE = np.random.default_rng(1).bytes(3 * MIB)


class Recording:
    """An inflater that notes what it was given and what it gave."""

    def __init__(self, wbits: int) -> None:
        self._inner, self.fed, self.given = zlib.decompressobj(wbits), [0], [0]

    def decompress(self, data: Any, most: int) -> bytes:
        """As the inner one."""
        found = self._inner.decompress(data, most)
        self.fed.append(len(data))
        self.given.append(len(found))
        return found

    def __getattr__(self, name: str) -> Any:
        """`eof` and what is left over."""
        return getattr(self._inner, name)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"x", NOISE, bytes(9 * MIB), NOISE + bytes(5 * MIB)], ids=range(5))
@pytest.mark.parametrize("behind", [b"", b"behind"])
def test_inflation_goes_piece_by_piece(content: bytes, behind: bytes) -> None:
    """Whatever a stream unpacks to, zlib gets and gives a piece at a time; what lies behind it is not read."""
    packed = zlib.compress(content, 1)
    inflater: Any = Recording(zlib.MAX_WBITS)
    raw, read = inflate(inflater, packed + behind, len(content) + 1)
    assert (raw, read, inflater.eof) == (content, len(packed), True)
    assert max(inflater.fed) <= FED_BYTES
    assert max(inflater.given) <= INFLATED_BYTES


def test_inflation_ends_at_the_most_and_at_a_torn_end() -> None:
    """No byte beyond what was asked for, and no endless wait for bytes that do not come."""
    packed = zlib.compress(bytes(5 * MIB))
    assert len(inflate(zlib.decompressobj(), packed, 2 * MIB + 1)[0]) == 2 * MIB + 1
    torn = zlib.decompressobj()
    assert len(inflate(torn, packed[:-10], 6 * MIB)[0]) <= 5 * MIB
    assert not torn.eof


def tar_gz(members: dict[str, bytes], padding: int = 0) -> bytes:
    """A gzipped tar with zeros behind its end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue() + bytes(padding), 1)


def test_archives_unpack_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar and a deflated member are unpacked by it, and come out whole."""
    calls = []

    def record_holds(inflater: Any, packed: Any, most: int) -> Any:
        calls.append(most)
        return inflate(inflater, packed, most)

    monkeypatch.setattr(container, "inflate", record_holds)
    monkeypatch.setattr(tar_reader, "inflate", record_holds)
    members = {"a": NOISE, "b": bytes(2 * MIB)}
    found = read_tar_gz(tar_gz(members, padding=MIB), WIDE)
    assert {name: found.read(name) for name in members} == members
    zipped = open_archive(make_zip({"model.onnx": bytes(2 * MIB)}, deflate=True), "m", WIDE)
    assert zipped.read("model.onnx") == bytes(2 * MIB)
    assert len(calls) == 2


def test_a_large_member_is_not_copied() -> None:
    """A stored one is a view of the archive; a small one is bytes of its own, which let the archive go."""
    small, large = bytes(COPIED_BYTES), bytes(COPIED_BYTES + 1)
    data = make_zip({"model.onnx": large, "s": small})
    archive = open_archive(data, "m")
    view: Any = archive.read("model.onnx")
    assert isinstance(view, memoryview)
    assert view.obj is data
    assert view == large
    assert isinstance(archive.read("s"), bytes)


@pytest.mark.parametrize("value", ["1", "[]", "{}", '{"a":1}'])
@pytest.mark.parametrize("parse", [parse_spec, parse_mar_manifest, lambda raw: parse_golden(raw, "g")])
def test_records_are_counted_before_they_are_parsed(value: str, parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the values are dressed, a record with too many is refused before the parser is called."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the parser was called")

    monkeypatch.setattr(msgspec.json, "decode", fail)
    with pytest.raises(ArchiveTooLarge, match=f"more than the {MAX_VALUES} values"):
        parse(('{"a":[' + f"{value}," * MAX_VALUES + "1]}").encode())


# --- safetensors ----------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@given(SHAPES, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_tensors_are_those_that_the_library_reads(shapes: list[tuple[int, ...]], metadata: dict[str, str]) -> None:
    """Names, shapes and numbers, whatever the order of the bytes."""
    tensors = {f"t{i}": np.asarray(np.ones(shape, np.float32) * i) for i, shape in enumerate(shapes)}
    raw = safetensors.numpy.save(tensors, metadata)
    found = {name: (record.dtype, record.shape, bytes(data)) for name, record, data in split_safetensors(raw)}
    library = deserialize(raw)  # type: ignore[no-untyped-call]
    assert found == {name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in library}


@given(st.data())
def test_nothing_is_read_that_the_library_refuses(data: st.DataObject) -> None:
    """Changed bytes of a header, or an end cut off: the archive is refused wherever the library refuses it."""
    raw = bytearray(safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'0123456789{}[]":,aF \x00\xff'))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    spec = {"kind": "forecaster", "architecture": "a", "weights": {"file": "w"}}
    archive = open_archive(make_zip({"fleetcast.json": json.dumps(spec).encode(), "w": cut}), "m")
    try:
        ours = read_tensors(archive)
    except ArchiveInvalid:
        return
    try:
        library = dict(deserialize(cut))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what was read: {error}") from None
    assert {name: bytes(view["data"]) for name, view in library.items()} == {k: v.tobytes() for k, v in ours.items()}


def test_metadata_is_counted_before_it_is_parsed() -> None:
    """Each pair became two objects, and 230,000 of them held the interpreter for half a second."""
    pairs = ",".join(f'"{i}":""' for i in range(6 * MAX_TENSORS))
    header = f'{{"__metadata__":{{{pairs}}}}}'.encode()
    with pytest.raises(ArchiveTooLarge, match="fields of tensors and metadata"):
        list(split_safetensors(len(header).to_bytes(8, "little") + header))
