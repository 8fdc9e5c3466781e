"""Archives packed on a desktop: what macOS and Windows add is ignored wherever an archive is read."""

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from model_store.archives.archive import open_archive
from model_store.archives.container import Limits
from model_store.errors import ArchiveInvalid, ArchiveTooLarge
from model_store.stores.object_store import open_source
from tests.archives import make_forecaster, make_tar_gz, make_zip, read_members

Build = Callable[[Mapping[str, bytes]], bytes]
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
SOUND = read_members(make_forecaster())
ONNX = {"model.onnx": b"onnx"}


def in_folder(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The members below one top folder."""
    return {f"m/{name}": content for name, content in members.items()}


LAYOUTS: dict[str, dict[str, bytes]] = {
    "tar of files": {**{f"._{name.replace('/', '_')}": APPLE for name in SOUND}, **SOUND},
    "tar of a folder": {"._m": APPLE, "m/._fleetcast.json": APPLE, **in_folder(SOUND)},
    "Finder, a folder": {**in_folder(SOUND), "m/.DS_Store": APPLE, "__MACOSX/m/._fleetcast.json": APPLE},
    "Finder, files": {**SOUND, "__MACOSX/._fleetcast.json": APPLE, "__MACOSX/MAR-INF/._MANIFEST.json": APPLE},
    "DS_Store beside a folder": {".DS_Store": APPLE, **in_folder(SOUND)},
    "Explorer": {**in_folder(SOUND), "desktop.ini": b"[.ShellClassInfo]", "m/Thumbs.db": b"\xd0\xcf\x11\xe0"},
}


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_desktops_add_is_ignored(build: Build, layout: str) -> None:
    """Whatever was added and wherever: the archive is opened, its weights are read, and it lists its own members."""
    archive = open_archive(build(LAYOUTS[layout]), "NSW1.mar")
    assert archive.members == tuple(sorted(SOUND))
    assert archive.spec is not None
    assert archive.weights() == SOUND[archive.spec.weights.file]
    assert archive.golden() is not None


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
def test_an_archive_without_records_is_known_among_them(build: Build) -> None:
    """A bare `model.onnx` is found in its top folder, and a resource fork of a handler makes no code archive."""
    mac = {"._m": APPLE, "m/._model.onnx": APPLE, "m/code/._inference.py": APPLE, "m/model.onnx": b"onnx"}
    assert open_archive(build(mac), "x").read("model.onnx") == b"onnx"


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
def test_what_is_ignored_is_bounded_and_checked_all_the_same(build: Build) -> None:
    """Ignored members hide neither bytes, entries nor paths that lead elsewhere; alone they are no archive."""
    with pytest.raises(ArchiveInvalid, match=r"segment '\.\.'"):
        open_archive(build({**ONNX, "__MACOSX/../../._x": APPLE}), "x")
    with pytest.raises(ArchiveTooLarge, match="entries"):
        open_archive(build({**ONNX, "._a": APPLE, "._b": APPLE}), "x", Limits(max_entries=2))
    with pytest.raises(ArchiveTooLarge, match="unpacks to more"):
        open_archive(build({**ONNX, "._a": bytes(50_000)}), "x", Limits(max_unpacked_bytes=40_000))
    with pytest.raises(ArchiveInvalid, match="no members"):
        open_archive(build({"._a": APPLE}), "x")


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
def test_other_unknown_members_are_kept(build: Build) -> None:
    """A README or a hidden file of the user's is a member like any."""
    members = {**SOUND, "README.md": b"", ".config": b"", "notes/a._b": b""}
    assert open_archive(build(members), "x").members == tuple(sorted(members))


def test_what_desktops_leave_in_a_store_is_not_listed(tmp_path: Path) -> None:
    """A folder that was copied from a Mac has one archive, not three."""
    (tmp_path / "au").mkdir()
    for name in ("a.mar", "._a.mar", ".DS_Store", "au/.DS_Store", "au/._b.mar", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    assert [listed.name for listed in open_source(str(tmp_path)).list()] == ["a.mar"]


class Pipe(io.BytesIO):
    """What cannot be sought in, so that `zipfile` writes a member's sizes behind it, as Finder does (bit 3)."""

    def tell(self) -> int:
        """As a pipe."""
        raise io.UnsupportedOperation


def test_a_zip_like_finders_own_is_read() -> None:
    """Sizes behind each deflated member, and folders as entries of their own."""
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("m/"), b"")
        for name, content in {**in_folder(SOUND), "m/.DS_Store": APPLE, "__MACOSX/m/._golden.json": APPLE}.items():
            archive.writestr(name, content)
    assert open_archive(pipe.getvalue(), "x").weights() == SOUND["weights.safetensors"]
