"""Hostile and damaged containers: every trick refused by its own message, in bounded memory, never by a crash."""

import gzip
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.archives.archive import Limits, open_archive, read_tensors
from model_store.errors import ArchiveInvalid, ArchiveTooLarge, LoadError
from tests.archives import make_forecaster, make_raw_tar_gz, make_tar_gz, make_zip

SMALL = Limits(
    max_archive_bytes=1 << 20, max_entries=8, max_unpacked_bytes=1 << 20, max_ratio=20, ratio_floor_bytes=1 << 16
)
MODEL = {"model.onnx": b"numbers"}


# --- hostile paths and types, in both containers

BAD_PATHS = [
    ("/etc/passwd", "absolute"),
    ("C:/windows", "absolute"),
    ("../up", "segment '..'"),
    ("a/../../up", "segment '..'"),
    ("a//b", "segment ''"),
    ("a/./b", "segment '.'"),
    ("a\\..\\b", "backslash"),
    ("a\nb", "control"),
    ("é" * 501, "501 characters"),
]


@pytest.mark.parametrize(("path", "said"), BAD_PATHS)
@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
def test_paths_that_lead_elsewhere_are_refused(
    build: Callable[[dict[str, bytes]], bytes], path: str, said: str
) -> None:
    """Although nothing is written to disk: code archives will be, and such an archive was made by nobody's friend."""
    with pytest.raises(ArchiveInvalid) as caught:
        open_archive(build({**MODEL, path: b"x"}), "m")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_folder_that_leads_elsewhere_is_refused() -> None:
    """The path rules hold for folder entries too."""
    with pytest.raises(ArchiveInvalid, match=r"segment '\.\.'"):
        open_archive(make_zip({**MODEL, "../up/": b""}), "m")


def test_a_nul_in_a_name_is_refused() -> None:
    """C programs would see another name."""
    with pytest.raises(ArchiveInvalid, match="NUL"):
        open_archive(make_zip({**MODEL, "a_b": b""}).replace(b"a_b", b"a\0b"), "m")


def test_a_nul_in_a_pax_name_is_refused() -> None:
    """A plain tar header ends its name at a NUL, a pax header does not."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"path": "a\0b"}
    with pytest.raises(ArchiveInvalid, match="NUL"):
        open_archive(make_raw_tar_gz([(info, b"")]), "m")


@pytest.mark.parametrize(
    "archive",
    [
        make_zip({**MODEL, "caf_": b""}).replace(b"caf_", b"caf\xe9"),
        make_raw_tar_gz([(tarfile.TarInfo("caf\udce9"), b"")], style=tarfile.GNU_FORMAT),
    ],
)
def test_names_must_be_utf8(archive: bytes) -> None:
    """A Latin-1 name would be another name on another machine."""
    with pytest.raises(ArchiveInvalid, match="not UTF-8"):
        open_archive(archive, "m")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "archive",
    [
        make_zip([("model.onnx", b"1"), ("./model.onnx", b"2")]),
        make_raw_tar_gz([(tarfile.TarInfo("model.onnx"), b""), (tarfile.TarInfo("model.onnx"), b"")]),
    ],
)
def test_a_name_twice_is_refused(archive: bytes) -> None:
    """One reader would take the first, another the last."""
    with pytest.raises(ArchiveInvalid, match=r"two members named 'model\.onnx'"):
        open_archive(archive, "m")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "of the unknown type b'Z'"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, said: str) -> None:
    """Only files and folders are archives' business."""
    info = tarfile.TarInfo("trap")
    info.type = kind
    info.linkname = "/etc/passwd"
    with pytest.raises(ArchiveInvalid, match=rf"b'trap' is {said}"):
        open_archive(make_raw_tar_gz([(info, b"")]), "m")


@pytest.mark.parametrize(
    ("mode", "said"), [(stat.S_IFLNK | 0o777, "a symbolic link"), (stat.S_IFIFO, "a special file")]
)
def test_links_and_devices_in_a_zip_are_refused(mode: int, said: str) -> None:
    """A zip hides the type in the external attributes."""
    info = zipfile.ZipInfo("trap")
    info.external_attr = mode << 16
    with pytest.raises(ArchiveInvalid, match=f"b'trap' is {said}"):
        open_archive(make_zip([(info, b"/etc/passwd")]), "m")


# --- names of tars


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a" * 155, "b" * 100), ("f" * 99, "b" * 100), ("f/" * 50 + "f" * 55, "b"), ("f", "b" * 100)],
    ids=["both fields are full", "the name is full", "the prefix is full", "a short prefix"],
)
def test_a_long_name_of_ustar_is_put_together(folder: str, name: str) -> None:
    """POSIX cuts a path at a slash: up to 155 bytes in the prefix, without a NUL when it is full, up to 100 in the
    name.
    """
    path = f"{folder}/{name}"
    archive = open_archive(make_tar_gz({path: b"x", **MODEL}, style=tarfile.USTAR_FORMAT), "m")
    assert sorted(archive.members) == sorted([path, *MODEL])
    assert archive.read(path) == b"x"


@pytest.mark.parametrize(
    ("magic", "path"),
    [
        (b"ustar\x0000", "p" * 155 + "/a"),
        (b"ustar  \0", "a"),  # GNU has times and sparse maps there
        (bytes(8), "a"),  # the tar of Unix version 7
    ],
)
def test_only_posix_tars_have_a_prefix(magic: bytes, path: str) -> None:
    """The magic decides whether the field at byte 345 is a part of the name."""
    raw = bytearray(gzip.decompress(make_tar_gz({"a": b"x", **MODEL}, style=tarfile.USTAR_FORMAT)))
    raw[257:265], raw[345:512] = magic, b"p" * 155 + b"x" * 12  # the last twelve bytes mean nothing
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 256 + sum(raw[156:512]))
    assert set(open_archive(gzip.compress(bytes(raw)), "m").members) == {path, "model.onnx"}


# --- sizes that lie, containers that are damaged


def patch_zip(archive: bytes, signature: bytes, offset: int, fmt: str, value: int) -> bytes:
    """The zip with one field of its first record of that signature replaced."""
    raw = bytearray(archive)
    struct.pack_into(fmt, raw, archive.index(signature) + offset, value)
    return bytes(raw)


ENTRY, END = b"PK\1\2", b"PK\5\6"
ZIP = make_zip({"model.onnx": b"a" * 1000}, deflate=True)
STORED = make_zip({"model.onnx": b"a" * 1000})


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (b"", "neither a zip"),
        (b"<?xml version='1.0'?><Error/>", "neither a zip (.mar) nor a gzip (.tar.gz)"),
        (ZIP[:-30], "truncated: its end record is missing"),
        (ZIP + b"more", "does not fit its size"),
        (b"PK" + ZIP, "does not fit its size"),
        (patch_zip(ZIP, ENTRY, 8, "<H", 1), "is encrypted"),
        (patch_zip(ZIP, ENTRY, 10, "<H", 14), "compression method 14"),
        (patch_zip(ZIP, ENTRY, 42, "<L", 5), "no local header"),
        (patch_zip(ZIP, ENTRY, 42, "<L", 10**6), "beyond the end"),
        (patch_zip(ZIP, ENTRY, 42, "<L", len(ZIP) - 29), "beyond the end"),  # a byte too few for a local header
        (patch_zip(ZIP, ENTRY, 42, "<L", len(ZIP) - 30), "no local header"),
        (patch_zip(STORED, ENTRY, 20, "<L", 10), "its sizes differ"),
        (patch_zip(ZIP, ENTRY, 20, "<L", 10**6), "reaches into the zip's directory"),
        (patch_zip(ZIP, ENTRY, 28, "<H", 60000), "directory is damaged"),
        (patch_zip(patch_zip(ZIP, END, 8, "<H", 2), END, 10, "<H", 2), "ends before its 2 entries"),
        (patch_zip(patch_zip(ZIP, END, 8, "<H", 0), END, 10, "<H", 0), "more than the 0 entries"),
        (patch_zip(ZIP, END, 4, "<H", 1), "several disks"),
        (patch_zip(ZIP, END, 10, "<H", 0xFFFF), "zip64"),
        (make_zip({}), "no members"),
        (make_zip({"folder/": b""}), "no members"),
        (gzip.compress(b""), "does not hold a tar"),
        (gzip.compress(make_tar_gz(MODEL)), "does not hold a tar"),
        (gzip.compress(b"x" * 512), "does not hold a tar"),
        (make_tar_gz(MODEL)[:-20], "gzip is truncated"),
        (make_tar_gz(MODEL)[:40] + b"\xff\xff" + make_tar_gz(MODEL)[42:], "gzip is damaged"),
        (make_tar_gz(MODEL) + make_tar_gz(MODEL), "bytes follow the gzip"),
        (gzip.compress(gzip.decompress(make_tar_gz(MODEL))[:1024]), "tar is truncated"),
        (gzip.compress(gzip.decompress(make_tar_gz({"m": b"x" * 999}))[:1024]), "declares 999 bytes"),
        (gzip.compress(gzip.decompress(make_tar_gz(MODEL))[:1024] + b"x" * 512), "wrong checksum"),
        (gzip.compress(gzip.decompress(make_tar_gz(MODEL)) + b"x"), "bytes follow its end mark"),
    ],
)
def test_damaged_containers_are_refused(archive: bytes, said: str) -> None:
    """Each kind of damage has its own message, when the archive is opened."""
    with pytest.raises(ArchiveInvalid) as caught:
        open_archive(archive, "m")
    assert str(caught.value).startswith("m: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (patch_zip(ZIP, ENTRY, 24, "<L", 10), "inflates to more than the 10 bytes"),
        (patch_zip(ZIP, ENTRY, 24, "<L", 2000), "ends early: its header declares 2000"),
        (patch_zip(STORED, ENTRY, 16, "<L", 7), "CRC-32 differs"),
        (ZIP[:40] + b"\xff\xff" + ZIP[42:], "is damaged: Error -3"),
    ],
)
def test_members_that_lie_are_refused_when_read(archive: bytes, said: str) -> None:
    """A zip member is inflated only when it is read, and never beyond what its header declared."""
    opened = open_archive(archive, "m")
    with pytest.raises(ArchiveInvalid) as caught:
        opened.read("model.onnx")
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["size", "GNU.sparse.realsize"])
def test_pax_headers_that_change_sizes_are_refused(key: str) -> None:
    """A size said twice would let two readers see two archives."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {key: "10"}
    with pytest.raises(ArchiveInvalid, match="huge and sparse"):
        open_archive(make_raw_tar_gz([(info, b"")]), "m")


def test_a_tar_size_that_is_not_octal_is_refused() -> None:
    """The binary notation can be negative, which sends other readers backwards."""
    raw = bytearray(gzip.decompress(make_tar_gz(MODEL)))
    raw[124:136] = b"\xff" * 12
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:512]))
    with pytest.raises(ArchiveInvalid, match="not octal"):
        open_archive(gzip.compress(bytes(raw)), "m")


def test_overlapping_members_are_refused() -> None:
    """The trick of the densest zip bombs: many entries share one stretch of bytes."""
    inner = make_zip({"two.onnx": b"y"})
    outer = make_zip({"one.onnx": inner, "two.onnx": b"y"})
    raw = bytearray(outer)
    struct.pack_into("<L", raw, outer.rindex(ENTRY) + 42, outer.index(inner))
    with pytest.raises(ArchiveInvalid, match=rf"overlap at byte {outer.index(inner)}"):
        open_archive(bytes(raw), "m")


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
def test_too_many_entries_are_refused(build: Callable[[dict[str, bytes]], bytes]) -> None:
    """They are counted before a record is made for each."""
    with pytest.raises(ArchiveTooLarge, match=r"more than the 8 entries"):
        open_archive(build({f"{i}": b"" for i in range(9)}), "m", SMALL)


@pytest.mark.parametrize("build", [lambda members: make_zip(members, deflate=True), make_tar_gz])
def test_bombs_are_refused(build: Callable[[dict[str, bytes]], bytes]) -> None:
    """A kilobyte that unpacks to a megabyte breaks the ratio; more still breaks the sum."""
    with pytest.raises(ArchiveTooLarge, match="times as much: a zip bomb"):
        open_archive(build({"model.onnx": bytes(1 << 19)}), "m", SMALL)
    with pytest.raises(ArchiveTooLarge, match=r"unpacks to more than the 1048576 bytes|times as much"):
        open_archive(build({"model.onnx": bytes(1 << 22)}), "m", SMALL)


def test_a_small_file_of_zeros_is_no_bomb() -> None:
    """Below the floor the ratio does not count: padding compresses well."""
    zeros = bytes(60_000)
    opened = open_archive(make_zip({"model.onnx": zeros}, deflate=True), "m", SMALL)
    assert opened.read("model.onnx") == zeros


def test_the_sum_of_members_is_bounded() -> None:
    """Honest sizes that are too much together."""
    members = {f"{i}": np.random.default_rng(i).bytes(1 << 17) for i in range(8)}
    with pytest.raises(ArchiveTooLarge, match="unpacks to more than the 1000000 bytes"):
        open_archive(make_zip(members), "m", Limits(max_unpacked_bytes=1_000_000))


def test_an_archive_beyond_the_limit_is_not_looked_into() -> None:
    """The file itself has a limit."""
    with pytest.raises(ArchiveTooLarge, match="1000 allowed"):
        open_archive(make_zip({"model.onnx": bytes(2000)}), "m", Limits(max_archive_bytes=1000))


@pytest.mark.parametrize("build", [lambda members: make_zip(members, deflate=True), make_tar_gz])
def test_a_bomb_costs_no_memory(build: Callable[[dict[str, bytes]], bytes]) -> None:
    """16 MiB of zeros, with headers that lie in the zip, are refused within a few MiB."""
    bomb = build({"model.onnx": bytes(16 << 20)})
    if bomb.startswith(b"PK"):
        bomb = patch_zip(bomb, ENTRY, 24, "<L", 1000)
    tracemalloc.start()
    with pytest.raises(ArchiveInvalid, match=r"inflates to more|zip bomb|unpacks to more"):
        open_archive(bomb, "m", SMALL).read("model.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# --- anything at all


def read_everything(data: bytes) -> None:
    """Opens and reads all there is; only errors of loading may come out."""
    try:
        archive = open_archive(data, "m", SMALL)
        for member in archive.members:
            archive.read(member)
        archive.golden()
        read_tensors(archive)
    except LoadError as error:
        said = str(error)
        assert said.startswith(("m: ", "m is "))


@given(st.binary(max_size=2000), st.sampled_from([b"", b"PK\3\4", b"\x1f\x8b\x08\0"]))
def test_arbitrary_bytes_raise_only_load_errors(data: bytes, magic: bytes) -> None:
    """Whatever the store hands out, a load fails as a load."""
    read_everything(magic + data)


SOUND = [
    make_forecaster(),
    make_zip({"model.onnx": b"abc" * 50, "code/a.py": b""}, deflate=True),
    gzip.decompress(make_tar_gz({"é" * 60: b"x" * 700, **MODEL}, top="top/")),
    gzip.decompress(make_tar_gz({"a" * 120: b"x", **MODEL}, style=tarfile.GNU_FORMAT)),
]


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data())
def test_mutated_archives_raise_only_load_errors(data: st.DataObject) -> None:
    """Flipped, cut and repeated pieces of sound archives; tars are mutated inside their gzip."""
    raw = bytearray(data.draw(st.sampled_from(SOUND)))
    tar = not raw.startswith(b"PK")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        width = data.draw(st.integers(0, 24))
        raw[at : at + width] = data.draw(st.binary(max_size=24) | st.just(bytes(raw[:width])))
    if tar:
        for at in range(0, len(raw) - 511, 512):  # repair the checksums, or nothing behind them is ever reached
            if any(raw[at + 148 : at + 156]) and raw[at + 257 : at + 262] == b"ustar":
                raw[at + 148 : at + 156] = b"%06o\0 " % (sum(raw[at : at + 148]) + 256 + sum(raw[at + 156 : at + 512]))
    read_everything(gzip.compress(bytes(raw), 1) if tar else bytes(raw))
