"""Archives that are damaged on their way from the store: fetched again, a bounded number of times, and never served."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from structlog.testing import capture_logs

from handlers.base import Family
from handlers.kinds import RowModel, Target
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Archive, Limits
from model_store.errors import ArchiveInvalid
from model_store.names import ModelName
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import REPAIRS, ModelStore
from model_store.stores.object_store import open_source
from server.worker.model_loader import ModelLoader
from tests.archives import make_tar_gz, read_members, repack
from tests.e2e.models import pack_forecaster
from tests.model_store.stores.test_s3_store import lead_to
from tests.odd_s3 import BUCKET, OddS3, odd_s3
from tests.server.worker.loads import run_load

NAME = ModelName("au/NSW1.mar")
DATA = pack_forecaster(NAME, 1).data
PACKED = {"zip": DATA, "tar.gz": make_tar_gz(read_members(DATA))}
Tags = Literal["strong", "weak", "none"]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddS3]:
    """A store that can damage what it sends."""
    with odd_s3() as server:
        lead_to(server, monkeypatch)
        yield server


def make_loader(disk: Path | None = None, measure: Callable[[Family], object] = lambda _: None) -> ModelLoader:
    """A worker's loader of the odd store."""
    source = open_source(f"s3://{BUCKET}")
    tier = DiskTier(disk, source.url) if disk else None
    target = Target("cpu", 1, WorkLimits(100.0, 10**9), SessionLimits(1 << 30, 60.0, loops=False))
    return ModelLoader(ModelStore(source, tier, Limits()), target, measure)


@pytest.mark.slow
@pytest.mark.parametrize("tags", ["strong", "weak", "none"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("disk", [False, True])
def test_damaged_bytes_are_fetched_again(odd: OddS3, tmp_path: Path, tags: Tags, packed: str, *, disk: bool) -> None:
    """One wrong byte in as many downloads as are repaired: the model loads, with its true weights, and it is logged."""
    odd.objects[NAME], odd.habits.tags = PACKED[packed], tags
    sound = run_load(make_loader().load(NAME))
    odd.habits.damages = REPAIRS
    loader = make_loader(tmp_path if disk else None)
    with capture_logs() as logs:
        loaded = run_load(loader.load(NAME))
    assert [entry["event"] for entry in logs] == ["archive_damaged_in_transit"] * REPAIRS
    assert loaded.row is not None
    assert sound.row is not None
    np.testing.assert_array_equal(loaded.row, sound.row)
    if disk:
        assert run_load(loader.load(NAME)).tier == "disk"
    assert len(odd.requests) == 1 + REPAIRS + 1


@pytest.mark.slow
@pytest.mark.parametrize("packed", PACKED)
def test_a_line_that_damages_everything_is_given_up(odd: OddS3, packed: str) -> None:
    """Always another wrong byte: after a bounded number of downloads the archive is refused, and says what is wrong."""
    odd.objects[NAME] = PACKED[packed]
    odd.habits.damages = 10**6
    with pytest.raises(ArchiveInvalid, match=r"damaged|sha256"):
        run_load(make_loader().load(NAME))
    assert len(odd.requests) <= (REPAIRS + 1) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(("tags", "downloads"), [("strong", 1), ("weak", 1), ("none", 2)])
def test_a_broken_upload_is_not_fetched_in_vain(odd: OddS3, tags: Tags, downloads: int) -> None:
    """Where an ETag is the MD5 of the bytes they are the store's: one download. Elsewhere two alike end it."""
    odd.objects[NAME], odd.habits.tags = repack(DATA, weights_safetensors=b"nothing"), tags
    with pytest.raises(ArchiveInvalid):
        run_load(make_loader().load(NAME))
    assert len(odd.requests) == downloads


@pytest.mark.parametrize("damages", [0, 1])
def test_a_load_that_failed_leaves_no_archive_to_the_collector(odd: OddS3, damages: int) -> None:
    """Neither of a broken upload, nor of bytes that were damaged on their way and fetched again."""
    odd.objects[NAME], odd.habits.tags = repack(DATA, weights_safetensors=b"nothing"), "weak"
    loader, before = make_loader(), count_archives()
    gc.disable()
    try:
        odd.habits.damages = damages
        with pytest.raises(ArchiveInvalid) as caught:
            run_load(loader.load(NAME))
        del caught
        assert count_archives() <= before  # fewer where a thread of another test lets go of one
    finally:
        gc.enable()


def count_archives() -> int:
    """The archives that this process holds. Other objects are asked nothing: some of torch's warn at the first look."""
    return Counter(map(type, gc.get_objects()))[Archive]


@pytest.mark.slow
def test_a_rows_family_is_measured_where_it_is_loaded(odd: OddS3) -> None:
    """On the loader's thread, before the step thread hears of the model: it would hold up everybody's requests."""
    odd.objects[NAME] = DATA
    measured = list[Family]()
    loaded = run_load(make_loader(measure=measured.append).load(NAME))
    assert isinstance(loaded.body, RowModel)
    assert measured == [loaded.body.family]
