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
from tests.e2e.forecasters import HISTORY as PATHS_HISTORY
from tests.e2e.forecasters import pack_paths
from tests.server.markets import HISTORY, HORIZON, pack_market


def write_body(target: list[Any]) -> bytes:
    """A request for quantiles."""
    instances = [{"start": "2026-01-01 00:00:00", "target": target}]
    return json.dumps({"instances": instances, "configuration": {"output_types": ["quantiles"]}}).encode()


BODY = write_body([60.0] * HISTORY)
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

    def answer(self, body: bytes = BODY) -> tuple[Float32, list[AnsweredLevels]]:
        """The levels [D?, steps, levels] of its answer, and what it has kept."""
        call = self.codec.decode(body, "", "")
        encoded, _ = call.encode(self.body.run(call, self.row))
        quantiles = json.loads(encoded)["predictions"][0]["quantiles"]
        return np.moveaxis(np.array(list(quantiles.values()), np.float32), 0, -1), list(call.answered)


def tell(shape: BandShape, offsets: Float32 = OFFSETS) -> dict[str, list[BandOffsets]]:
    """What the supervisor says of the model."""
    return {"m.mar": [BandOffsets("m.mar", shape, offsets.tobytes())]}


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
    assert repr(bands) == "<AdaptiveBands of 0 models, 0 forecasts kept>"


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
    assert repr(bands) == "<AdaptiveBands of 0 models, 0 forecasts kept>"


BOTH = write_body([[60.0] * HISTORY, [80.0] * HISTORY])


def load_products(*products: str, version: str = "v1", name: str = "m.mar") -> Loaded:
    """An archive of several products."""
    return Loaded(version=version, name=name, products=products)


def find_shape_of(loaded: Loaded) -> BandShape:
    """The shape of its bands."""
    assert loaded.codec.adaptable is not None
    return find_shape(loaded.codec.adaptable)


def test_each_product_is_shifted_as_told_of_it_alone() -> None:
    """The second product's offsets shift its levels and leave the first's; one told later joins it, whichever version
    is loaded; what was answered is handed over as one forecast that names the products in the archive's order.
    """
    loaded, bands = load_products("energy", "reserve"), AdaptiveBands(now=lambda: 7.0)
    plain, _ = loaded.answer(BOTH)
    bands.equip(loaded.slot, loaded.codec)
    shape = find_shape_of(loaded)
    told = {f"m.mar#{product}": tell(shape)["m.mar"] for product in ("energy", "reserve")}
    bands.follow({"m.mar#reserve": told["m.mar#reserve"]}, whole=False)
    shifted, kept = loaded.answer(BOTH)
    hours = (HISTORY + np.arange(HORIZON)) % 24
    expected = np.sort(plain + OFFSETS[hours] * (plain[..., 2:] - plain[..., :1]), axis=-1)
    np.testing.assert_array_equal(shifted[0], plain[0])
    np.testing.assert_allclose(shifted[1], expected[1], rtol=1e-5)
    bands.keep(loaded.slot, "desk", kept)
    (forecast,) = bands.take([]).forecasts
    assert (forecast.model, forecast.products, forecast.steps) == ("m.mar", ("energy", "reserve"), HORIZON)
    for product, levels in zip(forecast.split(), shifted, strict=True):
        np.testing.assert_array_equal(np.frombuffer(product.quantiles, np.float32).reshape(HORIZON, 3), levels)
    held = load_products("reserve", "energy", name=at_version(ModelName("m.mar"), "v0"))  # in another order
    bands.equip(held.slot, held.codec)
    bands.follow({"m.mar#energy": told["m.mar#energy"]}, whole=False)
    np.testing.assert_allclose(loaded.answer(BOTH)[0], expected, rtol=1e-5)
    bands.follow({"m.mar#reserve": []}, whole=False)
    found = loaded.answer(BOTH)[0]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], plain[1])
    first, second = held.answer(BOTH)[0]
    assert (second != load_products("reserve", "energy").answer(BOTH)[0][1]).any()
    np.testing.assert_array_equal(first, load_products("reserve", "energy").answer(BOTH)[0][0])
    bands.follow({}, whole=True)
    np.testing.assert_array_equal(loaded.answer(BOTH)[0], plain)
    bands.forget(loaded.slot)
    bands.forget(held.slot)
    bands.follow(told, whole=True)
    np.testing.assert_array_equal(loaded.answer(BOTH)[0], plain)


def test_offsets_of_a_product_shift_no_archive_of_the_same_name() -> None:
    """An archive may be called as another's product is; it is not shifted as that is."""
    loaded, bands = Loaded(name="m.mar#energy"), AdaptiveBands()
    plain, _ = loaded.answer()
    bands.equip(loaded.slot, loaded.codec)
    shape = find_shape_of(loaded)
    bands.follow({"m.mar#energy": tell(shape)["m.mar"]}, whole=False)
    np.testing.assert_array_equal(loaded.answer()[0], plain)
    bands.follow({"m.mar#energy": [BandOffsets("m.mar#energy", shape, OFFSETS.tobytes())]}, whole=False)
    assert (loaded.answer()[0] != plain).any()


def test_forecasts_of_products_are_bounded_by_all_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product may have as many bytes as an archive of one; what has no room is counted by product."""
    loaded, bands = load_products("energy", "reserve"), AdaptiveBands(now=lambda: 7.0)
    bands.equip(loaded.slot, loaded.codec)
    monkeypatch.setattr(adaptive_bands, "MOST_FORECAST_BYTES", 12)
    bands.keep(loaded.slot, "", [AnsweredLevels(0, bytes(24)), AnsweredLevels(1, bytes(48))])
    taken = bands.take([])
    assert ([each.start for each in taken.forecasts], taken.dropped) == ([0], 2)
    monkeypatch.setattr(adaptive_bands, "MOST_KEPT_BYTES", 2 * (24 + len("energy" + "reserve")) + 36)
    bands.keep(loaded.slot, "", [AnsweredLevels(start, bytes(24)) for start in range(3)])
    taken = bands.take([taken.receipt])
    assert (len(taken.forecasts), taken.dropped) == (2, 2)
    bands.keep(loaded.slot, "", [AnsweredLevels(3, bytes(24))])  # what is handed over again has less room beside it
    taken = bands.take([])
    assert ([each.start for each in taken.forecasts], taken.dropped) == ([1, 3], 4)


def test_paths_follow_prices_by_their_ranks() -> None:
    """An archive that draws paths keeps its default levels, which the offsets move; each path keeps its rank."""
    body = json.dumps(
        {
            "instances": [{"start": "2026-01-01 00:00:00", "target": [60.0] * PATHS_HISTORY}],
            "configuration": {"output_types": ["quantiles", "samples"], "num_samples": 16, "seed": 3},
        }
    ).encode()
    opened = open_model(open_archive(pack_paths(1), "m.mar"))
    assert isinstance(opened.built.body, RowModel)
    codec = opened.built.body.codec
    assert codec.adaptable is not None

    def answer() -> tuple[Float32, Float32, list[AnsweredLevels]]:
        call = codec.decode(body, "", "")
        encoded, _ = call.encode(opened.built.body.run(call, opened.built.row))
        (found,) = json.loads(encoded)["predictions"]
        levels = np.array(list(found["quantiles"].values()), np.float32).T
        return levels, np.array(found["samples"], np.float32), list(call.answered)

    slot, bands = Slot(ModelName("m.mar"), "v1", None, 0, 0, State.READY, 0.0), AdaptiveBands()
    plain, paths, _ = answer()
    bands.equip(slot, codec)
    up = np.full((24, 3), 0.5, np.float32)
    bands.follow(tell(find_shape(codec.adaptable), up), whole=False)
    levels, moved, kept = answer()
    np.testing.assert_allclose(levels, plain + 0.5 * (plain[:, 2:] - plain[:, :1]), rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(moved, axis=0), np.argsort(paths, axis=0))
    np.testing.assert_allclose(np.frombuffer(kept[0].quantiles, np.float32).reshape(levels.shape), levels, rtol=1e-6)
    bands.follow({"m.mar": []}, whole=False)
    np.testing.assert_array_equal(answer()[1], paths)
