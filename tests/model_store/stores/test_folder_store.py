"""Folders as stores: swapped links, volumes of Kubernetes, names of any characters, and nothing outside the folder."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from model_store.errors import ArchiveInvalid, LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import ModelName
from model_store.stores import folder_store
from model_store.stores.object_store import Source, open_source
from tests.model_store.stores.test_s3_store import CHARACTERS

A, B = ModelName("a.mar"), ModelName("au/b.mar")


def swap(link: Path, target: str) -> None:
    """Let the link lead elsewhere, atomically, as git-sync and Kubernetes do."""
    new = link.with_name("new-link")
    new.symlink_to(target)
    new.replace(link)


def fill(folder: Path, content: bytes) -> None:
    """A folder with two archives."""
    (folder / "au").mkdir(parents=True)
    for name in (A, B):
        (folder / name).write_bytes(content)


def read(source: Source, name: ModelName) -> bytes:
    """The archive's bytes."""
    fetched = source.get(name)
    assert fetched is not None
    return fetched.data


def test_a_swapped_folder_is_followed(tmp_path: Path) -> None:
    """The store is a link: what it leads to now is read, listed and written, also once the old folder is gone."""
    fill(tmp_path / "rev1", b"one")
    (tmp_path / "current").symlink_to("rev1")
    source = open_source(str(tmp_path / "current"))
    first = source.get(A)
    assert first is not None
    fill(tmp_path / "rev2", b"two")
    swap(tmp_path / "current", "rev2")
    shutil.rmtree(tmp_path / "rev1")
    assert read(source, A) == b"two"
    assert source.get(A, unless=first.version) is not None
    assert [listed.name for listed in source.list()] == [A, B]
    source.put(ModelName("new.mar"), b"new")
    assert (tmp_path / "rev2" / "new.mar").read_bytes() == b"new"
    assert source.url == (tmp_path / "current").as_uri()


def test_a_volume_of_kubernetes_is_followed(tmp_path: Path) -> None:
    """Files and folders are links into `..data`, a link that is swapped; neither it nor its targets are listed."""
    for content in ("one", "two"):
        fill(tmp_path / f"..2026_{content}", content.encode())
    (tmp_path / "..data").symlink_to("..2026_one")
    (tmp_path / A).symlink_to("..data/a.mar")
    (tmp_path / "au").symlink_to("..data/au")
    source = open_source(str(tmp_path))
    for content in ("one", "two"):
        swap(tmp_path / "..data", f"..2026_{content}")
        assert [read(source, name) for name in (A, B)] == [content.encode()] * 2
        assert [listed.name for listed in source.list()] == [A, B]
        assert [listed.name for listed in source.list("au/")] == [B]
        shutil.rmtree(tmp_path / f"..2026_{content}")
    with pytest.raises(ModelNotFound):
        source.get(A)


def test_a_swap_in_the_middle_of_a_read_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is swapped and removed after its link was resolved: the read finds the new one."""
    fill(tmp_path / "rev1", b"one")
    fill(tmp_path / "rev2", b"two")
    (tmp_path / "current").symlink_to("rev1")
    opened = folder_store.open_beneath

    def swap_first(*where: object) -> int:
        monkeypatch.setattr(folder_store, "open_beneath", opened)
        swap(tmp_path / "current", "rev2")
        shutil.rmtree(tmp_path / "rev1")
        return opened(*where)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_store, "open_beneath", swap_first)
    assert read(open_source(str(tmp_path / "current")), A) == b"two"


def test_reads_hold_while_the_link_is_swapped_all_the_time(tmp_path: Path) -> None:
    """Thousands of swaps between two folders: every read gives the one or the other, and none is refused."""
    fill(tmp_path / "rev0", b"one")
    fill(tmp_path / "rev1", b"two")
    (tmp_path / "current").symlink_to("rev0")
    done = threading.Event()

    def swap_on() -> None:
        for i in range(3_000):
            swap(tmp_path / "current", f"rev{i % 2}")
        done.set()

    thread = threading.Thread(target=swap_on)
    thread.start()
    source, found = open_source(str(tmp_path / "current")), set()
    while not done.is_set():
        found.add(read(source, B))
    thread.join()
    assert found == {b"one", b"two"}


def test_a_store_that_is_gone_is_no_missing_model(tmp_path: Path) -> None:
    """An unmounted folder is the store's failure, so that disk copies are served and kept; it may come back."""
    fill(tmp_path / "rev1", b"one")
    (tmp_path / "current").symlink_to("rev1")
    source = open_source(str(tmp_path / "current"))
    (tmp_path / "rev1").rename(tmp_path / "away")
    asks: tuple[Callable[[], object], ...] = (
        lambda: source.get(A),
        lambda: list(source.list()),
        lambda: source.put(A, b"x"),
    )
    for ask in asks:
        with pytest.raises(StoreUnavailable, match="current does not exist: No such file"):
            ask()
    (tmp_path / "away").rename(tmp_path / "rev1")
    assert read(source, A) == b"one"


def test_every_character_of_a_name_is_itself(tmp_path: Path) -> None:
    """Names with `#`, `?`, `%`, `+`, spaces and other alphabets are written, listed, read and revalidated."""
    source = open_source(str(tmp_path))
    for name in map(ModelName, CHARACTERS):
        version = source.put(name, name.encode())
        assert (tmp_path / name).read_bytes() == name.encode()
        assert read(source, name) == name.encode()
        assert source.get(name, unless=version) is None
    assert {listed.name for listed in source.list()} == set(CHARACTERS)
    assert all(listed.bytes == len(listed.name.encode()) for listed in source.list())


def test_a_link_put_in_the_way_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the open somebody replaces a folder by a link that leads out: what is there is not read."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "b.mar").write_bytes(b"secret")
    fill(tmp_path / "models", b"fine")
    opened = folder_store.open_beneath

    def replace_first(*where: object) -> int:
        shutil.rmtree(tmp_path / "models" / "au")
        (tmp_path / "models" / "au").symlink_to(tmp_path / "private")
        monkeypatch.setattr(folder_store, "open_beneath", opened)
        return opened(*where)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_store, "open_beneath", replace_first)
    with pytest.raises(StoreDenied, match=r"leaves .* by a symbolic link"):
        open_source(str(tmp_path / "models")).get(B)


def test_links_within_a_folder_are_listed_once(tmp_path: Path) -> None:
    """Links to folders of the store are followed; those round in a circle, upwards and out of it are not."""
    root = tmp_path / "models"
    fill(root, b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.mar").write_bytes(b"x")
    for name, target in {
        "nz": "au",
        "nz2": "au",
        "self": ".",
        "au/up": "..",
        "out": "../out",
        "c.mar": "c.mar",
    }.items():
        (root / name).symlink_to(target)
    source = open_source(str(root))
    assert [listed.name for listed in source.list()] == ["a.mar", "au/b.mar", "nz/b.mar"]
    assert list(source.list("out/")) == []
    assert [listed.name for listed in source.list("nz2/")] == ["nz2/b.mar"]


@pytest.mark.parametrize("change", ["rewrite", "same time", "replace"])
def test_every_change_is_a_new_version(tmp_path: Path, change: str) -> None:
    """Written in place with the same size, with its old time put back, or replaced: the version is another."""
    file = tmp_path / A
    file.write_bytes(b"one")
    source, found = open_source(str(tmp_path)), file.stat()
    before = source.get(A)
    assert before is not None
    assert source.get(A, unless=before.version) is None
    if change == "replace":
        source.put(A, b"two")
    else:
        file.write_bytes(b"two")
    if change == "same time":
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = source.get(A, unless=before.version)
    assert after is not None
    assert after.data == b"two"
    assert {listed.version for listed in source.list()} == {after.version}


def test_a_file_that_never_rests_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes during each read is refused after a few, not read for ever nor returned mixed."""
    (tmp_path / A).write_bytes(b"one")
    versions = iter(range(10**6))
    monkeypatch.setattr(folder_store, "_get_version", lambda _: str(next(versions)))
    with pytest.raises(StoreUnavailable, match="replaced each time"):
        open_source(str(tmp_path)).get(A)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message speaks of the server's user, not of credentials; the call is made to fail, for root may read all."""
    (tmp_path / A).write_bytes(b"one")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(folder_store, "open_beneath", refuse)
    with pytest.raises(StoreDenied, match="Permission denied; let the server's user read it"):
        open_source(str(tmp_path)).get(A)


def test_what_is_no_archive_is_refused_by_kind(tmp_path: Path) -> None:
    """A pipe does not block, and an empty file is an invalid archive."""
    os.mkfifo(tmp_path / "pipe.mar")
    (tmp_path / A).touch()
    refusals: dict[str, type[LoadError]] = {"pipe.mar": ModelNotFound, A: ArchiveInvalid}
    for name, situation in refusals.items():
        with pytest.raises(situation):
            open_source(str(tmp_path)).get(ModelName(name))
