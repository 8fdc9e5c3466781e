"""Folders as archives: what SageMaker unpacks is packed again when it is read, and nothing outside is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model_store.archives.archive import open_archive
from model_store.errors import ArchiveInvalid, ArchiveTooLarge, ModelNotFound, StoreUnavailable
from model_store.names import ModelName
from model_store.stores import unpacked_folders
from model_store.stores.object_store import InvalidStoreUrl, Source, open_unpacked_source
from tests.archives import make_forecaster

FILES = {"code/inference.py": b"def model_fn(d): ...\n", "weights.bin": b"\0" * 1000, "a/b/c.txt": b"deep"}
NAME, ONLY = ModelName("7f3a/model"), ModelName("model")


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files below the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read(source: Source, name: ModelName) -> tuple[dict[str, bytes], str]:
    """The members of the archive that the store gives, and its version."""
    fetched = source.get(name)
    assert fetched is not None
    archive = open_archive(fetched.data, name)
    return {member: archive.read(member) for member in archive.members}, fetched.version


def test_a_folder_is_the_archive_of_its_files(tmp_path: Path) -> None:
    """Its version is another one after each change, and it is not packed while that is the same."""
    fill(tmp_path / NAME, FILES)
    source = open_unpacked_source(str(tmp_path))
    found, version = read(source, NAME)
    assert found == FILES
    assert source.read_version(NAME) == version
    assert source.get(NAME, unless=version) is None
    assert read(source, NAME)[1] == version
    (tmp_path / NAME / "weights.bin").write_bytes(b"\1" * 1000)
    assert source.read_version(NAME) != version
    assert read(source, NAME)[0]["weights.bin"] == b"\1" * 1000


def test_a_file_is_the_archive_that_it_is(tmp_path: Path) -> None:
    """Also where it is the only one of its folder: what was unpacked may have been an archive in a tarball."""
    data = make_forecaster()
    fill(tmp_path, {"plain.mar": data, "inner/m.mar": data, "inner/.DS_Store": b"", "two/a.mar": data, "two/x": b"1"})
    source = open_unpacked_source(str(tmp_path))
    for name in ("plain.mar", "inner"):
        fetched = source.get(ModelName(name))
        assert fetched is not None
        assert (fetched.data, fetched.version) == (data, source.read_version(ModelName(name)))
    assert set(read(source, ModelName("two"))[0]) == {"a.mar", "x"}


def test_one_folder_alone_has_one_name(tmp_path: Path) -> None:
    """No other name leads to a file in it."""
    fill(tmp_path, FILES)
    source = open_unpacked_source(str(tmp_path), alone=ONLY)
    assert read(source, ONLY)[0] == FILES
    for other in ("weights.bin", "a", "model/a"):
        with pytest.raises(ModelNotFound, match="one model"):
            source.get(ModelName(other))


def test_what_is_no_archive_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Missing and empty folders, links, pipes, too many bytes and too many files."""
    source = open_unpacked_source(str(tmp_path), max_archive_bytes=5000)
    with pytest.raises(ModelNotFound):
        source.get(ModelName("nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="no file"):
        source.get(ModelName("empty"))
    fill(tmp_path, {"secret": b"secret"})
    fill(tmp_path / "linked", {"x": b"1"})
    (tmp_path / "linked/y").symlink_to(tmp_path / "secret")
    with pytest.raises(ArchiveInvalid, match="'y' is a link"):
        source.get(ModelName("linked"))
    fill(tmp_path / "piped", {"x": b"1"})
    os.mkfifo(tmp_path / "piped/p")
    with pytest.raises(ArchiveInvalid, match="'p' is a link or no file"):
        source.read_version(ModelName("piped"))
    fill(tmp_path / "large", {"x": bytes(3000), "y": bytes(3000)})
    with pytest.raises(ArchiveTooLarge, match="6000 bytes"):
        source.get(ModelName("large"))
    fill(tmp_path / "many", {f"{i:04}": b"" for i in range(4097)})
    with pytest.raises(ArchiveTooLarge, match="more than 4096 files"):
        source.get(ModelName("many"))


def test_nothing_outside_the_store_is_read(tmp_path: Path) -> None:
    """A folder that is a link to another place is not there."""
    fill(tmp_path / "outside", FILES)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/out").symlink_to(tmp_path / "outside")
    source = open_unpacked_source(str(tmp_path / "store"))
    with pytest.raises(Exception, match="leaves"):
        source.get(ModelName("out"))


def test_a_folder_that_changes_while_it_is_packed_is_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given is of one moment; a folder that never rests is refused."""
    fill(tmp_path / "m", {"a": b"0", "b": b"0"})
    pack, changes = unpacked_folders._pack, list[int]()

    def change_after(*where: Any) -> bytes:
        packed = pack(*where)
        if len(changes) < most:
            changes.append(1)
            fill(tmp_path / "m", {"b": b"1" * (len(changes) + 1)})
        return packed

    monkeypatch.setattr(unpacked_folders, "_pack", change_after)
    source, most = open_unpacked_source(str(tmp_path)), 2
    assert read(source, ModelName("m"))[0] == {"a": b"0", "b": b"111"}
    most = 1000
    with pytest.raises(StoreUnavailable, match="replaced each time"):
        source.get(ModelName("m"))


def test_the_store_may_be_made_later(tmp_path: Path) -> None:
    """SageMaker makes it with the first model; until then it is said to be missing."""
    source = open_unpacked_source(str(tmp_path / "models"))
    with pytest.raises(StoreUnavailable, match="does not exist"):
        source.get(NAME)
    fill(tmp_path / "models" / NAME, FILES)
    assert read(source, NAME)[0] == FILES


@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///models", ""])
def test_urls_are_no_folders(url: str) -> None:
    """Unpacked archives lie on this host."""
    with pytest.raises(InvalidStoreUrl, match="not a folder's path"):
        open_unpacked_source(url)
