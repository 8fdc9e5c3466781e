"""A worker's adaptive bands: what clients get is shifted as told, and kept as they got it, within bounds."""

import json
from typing import Any

import numpy as np
import pytest

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels
from handlers.kinds import RowModel
from handlers.model import open_model
from model_store.archives.archive import Archive, open_archive
from model_store.cache.slots import Slot, State
from model_store.names import ModelName, at_version
from server.bands.adaptive_offsets import BandShape
from server.ipc.operations import BandOffsets, KeptLevels
from server.worker import adaptive_bands
from server.worker.adaptive_bands import AdaptiveBands, find_shape
from tests.server.markets import HISTORY, HORIZON, pack_market

BODY = json.dumps(
    {
        "instances": [{"start": "2026-01-01 00:00:00", "target": [60.0] * HISTORY}],
        "configuration": {"output_types": ["quantiles"]},
    }
).encode()
OFFSETS = np.linspace(-0.4, 0.4, 72, dtype=np.float32).reshape(24, 3)


class Loaded:
    """A model of `tests.server.markets`, loaded, and what it answers."""

    def __init__(self, seed: int = 0, version: str = "v1", name: str = "m.mar", **changes: Any) -> None:
        self.archive: Archive = open_archive(pack_market(seed, **changes), "m.mar")
        self.opened = open_model(self.archive)
        assert isinstance(self.opened.built.body, RowModel)
        self.body, self.row = self.opened.built.body, self.opened.built.row
        self.codec = self.body.codec
        self.slot = Slot(ModelName(name), version, None, 0, 0, State.READY, 0.0)

    def answer(self) -> tuple[Float32, list[AnsweredLevels]]:
        """The levels [steps, levels] of its answer, and what it has kept."""
        call = self.codec.decode(BODY, "", "")
        encoded, _ = call.encode(self.body.run(call, self.row))
        quantiles = json.loads(encoded)["predictions"][0]["quantiles"]
        return np.array(list(quantiles.values()), np.float32).T, list(call.answered)


def tell(shape: BandShape, offsets: Float32 = OFFSETS) -> dict[str, list[BandOffsets]]:
    """What the supervisor says of the model."""
    return {"m.mar": [BandOffsets(shape, offsets.tobytes())]}


def test_levels_are_shifted_as_told_until_told_otherwise() -> None:
    """By the hour's offsets in widths of the band, also a model that is loaded later. What is kept is what was got."""
    loaded, bands = Loaded(), AdaptiveBands()
    plain, kept = loaded.answer()
    assert kept == [], "nothing is kept of a model that no server watches"
    bands.equip(loaded.slot, loaded.codec)
    shape = find_shape(loaded.codec.adaptable)  # type: ignore[arg-type]
    bands.follow(tell(shape), whole=False)
    shifted, kept = loaded.answer()
    first = (HISTORY + np.arange(HORIZON)) % 24
    expected = np.sort(plain + OFFSETS[first] * (plain[:, 2:] - plain[:, :1]), axis=-1)
    np.testing.assert_allclose(shifted, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.frombuffer(kept[0].quantiles, np.float32).reshape(HORIZON, 3), shifted)
    later = Loaded(version="v2")
    bands.equip(later.slot, later.codec)
    np.testing.assert_allclose(later.answer()[0], shifted)
    bands.forget(loaded.slot)
    bands.follow({}, whole=True)
    np.testing.assert_allclose(later.answer()[0], plain)
    np.testing.assert_allclose(loaded.answer()[0], shifted)  # a retired slot is left alone


def test_a_version_that_an_alias_or_a_rollback_names_has_its_archives_offsets() -> None:
    """It is a model of its own in the worker, and one archive with the version that follows the store: both are shifted
    as told of the archive, and what either answers is the archive's forecast.
    """
    newest, held = Loaded(version="v2"), Loaded(name=at_version(ModelName("m.mar"), "v1"))
    plain, bands = held.answer()[0], AdaptiveBands(now=lambda: 7.0)
    shape = find_shape(newest.codec.adaptable)  # type: ignore[arg-type]
    bands.equip(newest.slot, newest.codec)
    bands.follow(tell(shape), whole=False)
    shifted = newest.answer()[0]
    assert (shifted != plain).any()
    bands.equip(held.slot, held.codec)  # loaded later
    np.testing.assert_array_equal(held.answer()[0], shifted)
    bands.follow({"m.mar": []}, whole=False)
    np.testing.assert_array_equal(held.answer()[0], plain)
    for loaded in (newest, held):
        bands.keep(loaded.slot, "", [AnsweredLevels(0, bytes(12))])
    assert [(each.model, each.version) for each in bands.take([]).forecasts] == [("m.mar", "v2"), ("m.mar", "v1")]
    bands.forget(newest.slot)
    bands.follow(tell(shape), whole=True)
    np.testing.assert_array_equal(held.answer()[0], shifted)
    bands.forget(held.slot)
    assert repr(bands) == "<AdaptiveBands of 0 archives, 0 forecasts kept>"


def test_another_shape_is_not_shifted() -> None:
    """Offsets of another step, or of a size that does not fit, are not this archive's."""
    loaded, bands = Loaded(), AdaptiveBands()
    plain, _ = loaded.answer()
    bands.equip(loaded.slot, loaded.codec)
    shape = find_shape(loaded.codec.adaptable)  # type: ignore[arg-type]
    for told in (tell(BandShape(shape.levels, 60, shape.time_zone)), tell(shape, OFFSETS[:5])):
        bands.follow(told, whole=False)
        np.testing.assert_array_equal(loaded.answer()[0], plain)


def test_the_last_answer_of_a_start_is_kept_and_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast that was asked twice is handed over once; beyond the bound forecasts are dropped and counted."""
    loaded, bands = Loaded(), AdaptiveBands(now=lambda: 7.0)
    bands.equip(loaded.slot, loaded.codec)
    bands.keep(loaded.slot, "desk", [AnsweredLevels(0, b"a" * 12), AnsweredLevels(0, b"b" * 12)])
    first = bands.take([])
    (forecast,) = first.forecasts
    assert (forecast.quantiles, forecast.client, forecast.asked_at, forecast.version) == (b"b" * 12, "desk", 7, "v1")
    monkeypatch.setattr(adaptive_bands, "MOST_KEPT_BYTES", 100)
    bands.keep(loaded.slot, "", [AnsweredLevels(start, bytes(12)) for start in range(20)])
    taken = bands.take([first.receipt])
    assert (len(taken.forecasts), taken.dropped) == (8, 12)
    assert bands.take([taken.receipt]).dropped == 0
    bands.forget(loaded.slot)
    bands.keep(loaded.slot, "", [AnsweredLevels(0, bytes(12))])
    assert bands.take([]).forecasts == []


def test_what_was_handed_over_in_vain_is_handed_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor waits for no worker for long, and has nothing of an answer that comes too late. Newer forecasts
    have the room first, and replace those of the same start.
    """

    def list_starts(taken: KeptLevels) -> list[tuple[int, bytes]]:
        return [(each.start, each.quantiles[:1]) for each in taken.forecasts]

    loaded, bands = Loaded(), AdaptiveBands(now=lambda: 7.0)
    bands.equip(loaded.slot, loaded.codec)
    bands.keep(loaded.slot, "", [AnsweredLevels(start, b"a" * 12) for start in (0, 1, 2)])
    expected = [(0, b"a"), (1, b"a"), (2, b"a")]
    assert list_starts(bands.take([])) == expected
    assert list_starts(bands.take(["another's"])) == expected
    bands.keep(loaded.slot, "", [AnsweredLevels(start, b"b" * 12) for start in (1, 3)])
    taken = bands.take([])
    assert (list_starts(taken), taken.dropped) == ([(0, b"a"), (2, b"a"), (1, b"b"), (3, b"b")], 0)
    bands.keep(loaded.slot, "", [AnsweredLevels(4, b"c" * 12)])
    monkeypatch.setattr(adaptive_bands, "MOST_KEPT_BYTES", 40)
    taken = bands.take([])
    assert (list_starts(taken), taken.dropped) == ([(1, b"b"), (3, b"b"), (4, b"c")], 2)
    taken = bands.take([])
    assert (list_starts(taken), taken.dropped) == ([(1, b"b"), (3, b"b"), (4, b"c")], 2), "of the same forecasts"
    monkeypatch.setattr(adaptive_bands, "MOST_KEPT", 2)
    taken = bands.take([])
    assert (list_starts(taken), taken.dropped) == ([(3, b"b"), (4, b"c")], 3)
    assert bands.take([taken.receipt]).forecasts == []
    assert bands.take([]).forecasts == []


def test_archives_without_bands_are_left_alone() -> None:
    """One level has no band: nothing of such an archive is kept or shifted."""
    loaded, bands = Loaded(quantile_levels=(0.5,)), AdaptiveBands()
    bands.equip(loaded.slot, loaded.codec)
    assert loaded.answer()[1] == []
    assert repr(bands) == "<AdaptiveBands of 0 archives, 0 forecasts kept>"
