"""Calibrated archives cover what they promise; those that are not keep their bytes, and false offsets load nowhere."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from handlers.codecs.calibration import BandCalibration
from handlers.forecasters import build_family
from handlers.kinds import ArchiveParts, pack_model
from handlers.model import open_model
from handlers.training.time_series import Series
from model_store.archives.archive import DEFAULT_LIMITS, open_archive, read_offsets
from model_store.archives.manifest import GoldenSample, Kind, Tails
from model_store.archives.packing import save_tensors
from model_store.errors import ArchiveInvalid, GoldenMismatch
from model_store.names import ModelName
from server.offline.calibration import FILE, calibrate_archive, calibrate_products, pack_calibrated
from server.offline.evaluation import compute_scores
from server.offline.fleet_evaluation import forecast_market, score_market
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    forecast_products,
    forecast_windows,
    open_unpublished,
)
from tests.archives import make_zip, read_members
from tests.server.markets import HISTORY, START, make_forecast

DAYS, LEARNT = 300, 150
CONFIG = {"features": 2, "context_length": HISTORY, "hidden": 8, "prediction_length": 6, "quantiles": 3}


def make_series(days: int = DAYS) -> Series:
    """Prices around 60 whose noise is six times as wide at noon as at midnight."""
    hours = np.arange(24 * days)
    noise = np.random.default_rng(3).standard_normal(len(hours))
    values = 60 + (3 + 15 * np.sin(hours % 24 / 24 * np.pi) ** 2) * noise
    values[::97] = np.nan
    return Series("M00", START, timedelta(hours=1), values, np.empty((0, len(hours))))


def pack_narrow(*, trained_until: str | UnsetType = UNSET, golden: bool = True, **changes: Any) -> bytes:
    """An archive that promises 80 % between 56 and 64, whatever it sees."""
    shapes = build_family("mlp", CONFIG).parameters
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    bias = max((name for name in shapes if name.endswith("bias")), key=lambda name: np.prod(shapes[name]))
    tensors[bias] = np.tile(np.array([-0.2, 0, 0.2], np.float32), 6)
    parts = ArchiveParts(
        tensors=tensors,
        architecture="mlp",
        config=CONFIG,
        forecast=make_forecast(**changes),
        trained_until=trained_until,
    )
    sample = None
    if golden:
        request = {"instances": [{"start": "2024-03-04 09:00:00", "target": [60.0] * HISTORY}]}
        alone = open_archive(pack_model(Kind.FORECASTER, parts, model_name="narrow"), "narrow.mar")
        answer = msgspec.json.decode(open_model(alone).answer(msgspec.json.encode(request)))
        sample = GoldenSample(request=request, response=answer)
    return pack_model(Kind.FORECASTER, parts, model_name="narrow", golden=sample)


def open_packed(packed: bytes) -> ArchiveVersion:
    """An archive in no store."""
    return open_unpublished(packed, ModelName("narrow.mar"), DEFAULT_LIMITS)


def calibrate_narrow(**changes: bool | float | str | None) -> tuple[ArchiveVersion, bytes]:
    """The narrow archive, and itself calibrated by the first part of the series."""
    model = open_packed(pack_narrow(**changes))  # type: ignore[arg-type]
    series = make_series(LEARNT)
    return model, pack_calibrated(model.archive, calibrate_archive(model, {"M00": series}, "M00"))


@pytest.mark.slow
def test_held_out_windows_are_covered_as_promised() -> None:
    """From 40 % to within two points of 80 % on the half of the series that no offset has seen; before is said too."""
    series, (plain, packed) = make_series(), calibrate_narrow()
    origins = Rolling(first=series.start + timedelta(days=LEARNT)).origins(series, [plain.forecast])
    calibrated = open_packed(packed)
    before, after = (
        compute_scores(forecast_windows(InProcess(), each, series, origins)) for each in (plain, calibrated)
    )
    assert before.coverage < 0.5
    assert after.coverage == pytest.approx(0.8, abs=0.02)
    assert after.pinball < before.pinball
    rolling = Rolling(first=series.start + timedelta(days=LEARNT))
    for model, uncalibrated in ((calibrated, before.coverage), (plain, None)):
        score, _ = score_market(forecast_market(model, {"M00": series}, "M00", InProcess(), rolling), None)
        assert score.uncalibrated == uncalibrated


def test_the_comparison_tells_both_scores_of_the_same_windows() -> None:
    """Calibrated week by week by the days before only: near the promise, from the same actuals."""
    model = open_packed(pack_narrow())
    found = calibrate_archive(model, {"M00": make_series()}, "M00", 200)
    assert found.days == 200
    assert found.before is not None
    assert found.after is not None
    assert found.before.observed == found.after.observed
    assert found.before.coverage < 0.5
    assert found.after.coverage == pytest.approx(0.8, abs=0.03)
    short = calibrate_archive(model, {"M00": make_series(40)}, "M00")
    assert (short.before, short.after) == (None, None)


@pytest.mark.slow
def test_a_calibrated_archive_proves_its_answers_and_keeps_the_rest() -> None:
    """The golden sample has calibrated answers; every other member keeps its bytes; equal input gives equal bytes."""
    plain, packed = calibrate_narrow()
    opened = open_packed(packed).archive
    assert open_model(opened).prove()
    old, new = read_members(pack_narrow()), read_members(packed)
    assert {name for name in new if new[name] != old.get(name)} == {FILE, "fleetcast.json", "golden.json"}
    assert plain.archive.golden() != opened.golden()
    assert calibrate_narrow()[1] == packed
    assert b"calibration" not in old["fleetcast.json"]
    again = pack_calibrated(opened, calibrate_archive(open_packed(packed), {"M00": make_series(LEARNT)}, "M00"))
    assert again == packed  # offsets are of the network, not of its calibrated answers
    bare = open_packed(calibrate_narrow(golden=False)[1]).archive
    assert bare.golden() is None
    mixed = make_zip({**new, "golden.json": old["golden.json"]})
    with pytest.raises(GoldenMismatch):
        open_model(open_archive(mixed, "m.mar")).prove()


def test_calibrated_prices_stay_within_floor_and_cap() -> None:
    """A floor that the network never reaches bounds the shifted levels."""
    _, packed = calibrate_narrow(floor=55.0)
    request = {"instances": [{"start": "2024-03-04 09:00:00", "target": [60.0] * HISTORY}]}
    answer = msgspec.json.decode(open_model(open_packed(packed).archive).answer(msgspec.json.encode(request)))
    assert min(answer["predictions"][0]["quantiles"]["0.1"]) == 55.0


def test_windows_of_the_fit_are_not_learnt_from() -> None:
    """Errors in-sample are too small: with fewer than 28 new days it is said what to do."""
    series = make_series()
    until = series.stamp(24 * 280)
    with pytest.raises(Unfit, match=r"not fitted to 79 windows .* needs 112; give newer rows, or use `retrain --c"):
        calibrate_archive(open_packed(pack_narrow(trained_until=until)), {"M00": series}, "M00")
    found = calibrate_archive(open_packed(pack_narrow(trained_until=series.stamp(24 * 260))), {"M00": series}, "M00")
    assert found.record.windows == 159


def test_false_offsets_are_refused_when_the_archive_is_opened() -> None:
    """Another digest, shape, number or name of a level, a missing member, and forecasts that have no calibration."""
    _, packed = calibrate_narrow()
    members = read_members(packed)

    def read(offsets: bytes, **record: object) -> None:
        spec = msgspec.json.decode(members["fleetcast.json"])
        spec["calibration"] |= {"sha256": sha256(offsets).hexdigest(), **record}
        changed = {**members, FILE: offsets, "fleetcast.json": msgspec.json.encode(spec)}
        read_offsets(open_archive(make_zip(changed), "m.mar"))

    sound = members[FILE]
    read(sound)
    with pytest.raises(ArchiveInvalid, match=r"has sha256 .* calibrate it again"):
        read(sound, sha256="0" * 64)
    for shape in ((23, 3), (24, 2), (24,)):
        with pytest.raises(ArchiveInvalid, match="but should have `offsets`"):
            read(save_tensors({"offsets": np.zeros(shape, np.float32)}))
    with pytest.raises(ArchiveInvalid, match="NaN or infinite"):
        read(save_tensors({"offsets": np.full((24, 3), np.inf, np.float32)}))
    with pytest.raises(ArchiveInvalid, match="must be two of the levels"):
        read(sound, low=0.2)
    with pytest.raises(ArchiveInvalid, match=r"calibration\.file"):
        read(sound, file="elsewhere.safetensors")


def test_only_forecasts_are_calibrated() -> None:
    """An archive without a forecast, or of another kind, says that it cannot be."""
    spec = open_packed(calibrate_narrow()[1]).archive.spec
    assert spec is not None
    with pytest.raises(ValueError, match="belongs to archives with a `forecast`"):
        msgspec.structs.replace(spec, forecast=None)
    with pytest.raises(ValueError, match="not to kind onnx"):
        msgspec.structs.replace(spec, kind=Kind.ONNX, architecture="", config={})


def pack_constant(bias: Sequence[float], **changes: Any) -> bytes:
    """An archive whose network answers these numbers at each of six steps, whatever it sees."""
    config = {**CONFIG, "quantiles": len(bias)}
    shapes = build_family("mlp", config).parameters
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    last = max((name for name in shapes if name.endswith("bias")), key=lambda name: np.prod(shapes[name]))
    tensors[last] = np.tile(np.array(bias, np.float32), 6)
    parts = ArchiveParts(tensors=tensors, architecture="mlp", config=config, forecast=make_forecast(**changes))
    return pack_model(Kind.FORECASTER, parts, model_name="narrow")


def ask_noon(model: ArchiveVersion, target: list[Any], *kinds: str) -> dict[str, Any]:
    """The prediction from 09:00 on, as a client gets it."""
    request = {"instances": [{"start": "2024-03-04 09:00:00", "target": target}]}
    request |= {"configuration": {"output_types": list(kinds), "num_samples": 20}}  # type: ignore[dict-item]
    answer = msgspec.json.decode(open_model(model.archive).answer(msgspec.json.encode(request)))
    found: dict[str, Any] = answer["predictions"][0]
    return found


@pytest.mark.slow
def test_each_product_has_offsets_of_its_own() -> None:
    """Of two products with one band, the calm one's comes nearer and the wild one's goes apart, by hour of the day."""
    wild = make_series()
    calm = dataclasses.replace(wild, name="calm", values=60 + (wild.values - 60) / 8)
    both = {"a": wild, "calm": calm}
    model = open_packed(pack_constant([-0.2, 0, 0.2] * 2, products=tuple(both)))
    found = calibrate_products(model, list(both.values()), 200)
    assert list(found.by_product) == ["a", "calm"]
    for each in found.by_product.values():
        assert each.after is not None
        assert each.after.coverage == pytest.approx(0.8, abs=0.03)
    packed = pack_calibrated(model.archive, found.whole)
    calibrated = open_packed(packed)
    offsets = read_offsets(calibrated.archive)
    assert offsets is not None
    assert offsets.shape == (2, 24, 3)
    target = [[60.0] * 24, [60.0] * 24]
    before, after = (ask_noon(each, target, "quantiles")["quantiles"] for each in (model, calibrated))
    widths = [np.subtract(answer["0.9"], answer["0.1"]) for answer in (before, after)]
    np.testing.assert_allclose(widths[0], 8, atol=1e-3)
    assert (widths[1][0] > 16).all()
    assert (widths[1][1] < 8).all()
    assert widths[1][0][3] > widths[1][0][0] + 3, "noon is wilder than nine"
    scored = forecast_products(
        calibrated, list(both.values()), Rolling(most=800).origins(wild, [calibrated.forecast_of_any])
    )
    assert [compute_scores(each).coverage for each in scored] == pytest.approx([0.8, 0.8], abs=0.02)
    again = calibrate_products(calibrated, list(both.values()), 200)
    np.testing.assert_array_equal(again.whole.offsets, found.whole.offsets)  # of the network, not of what is calibrated


def test_offsets_of_another_number_of_products_are_refused() -> None:
    """Those of one product do not fit an archive of two, nor the other way round."""
    members = read_members(calibrate_narrow()[1])
    spec = msgspec.json.decode(members["fleetcast.json"])
    wrong = save_tensors({"offsets": np.zeros((2, 24, 3), np.float32)})
    spec["calibration"] |= {"sha256": sha256(wrong).hexdigest()}
    with pytest.raises(ArchiveInvalid, match="but should have `offsets`"):
        read_offsets(
            open_archive(make_zip({**members, FILE: wrong, "fleetcast.json": msgspec.json.encode(spec)}), "m.mar")
        )


@pytest.mark.slow
def test_paths_are_shifted_by_rank_and_cross_as_before() -> None:
    """Twenty narrow paths come to cover what their quantiles promise; who was above whom at a step still is."""
    rng = np.random.default_rng(5)
    paths = rng.permutation(np.linspace(-0.25, 0.25, 20))
    model = open_packed(pack_constant(paths.tolist(), paths=20))
    series = make_series()
    found = calibrate_archive(model, {"M00": series}, "M00", 200)
    assert found.before is not None
    assert found.after is not None
    assert found.before.coverage < 0.5
    assert found.after.coverage == pytest.approx(0.8, abs=0.03)
    calibrated = open_packed(pack_calibrated(model.archive, found))
    origins = Rolling(most=800).origins(series, [calibrated.forecast])
    covered = compute_scores(forecast_windows(InProcess(), calibrated, series, origins)).coverage
    assert covered == pytest.approx(0.8, abs=0.02)
    before, after = (np.array(ask_noon(each, [60.0] * 24, "samples")["samples"]) for each in (model, calibrated))
    np.testing.assert_array_equal(np.argsort(before, 0), np.argsort(after, 0))
    assert (np.ptp(after, 0) > 1.5 * np.ptp(before, 0)).all()


def test_wild_paths_beyond_the_outer_levels_move_with_them() -> None:
    """The lowest path is shifted by the offset of the lowest level, in widths of the band; by hand."""
    forecast = make_forecast(paths=4, quantile_levels=(0.25, 0.5, 0.75))
    shift = BandCalibration(forecast, np.array([[-0.5, 0.0, 0.5]], np.float32), 0.25, 0.75)
    paths = np.array([[[4.0, 1.0, 2.0, 3.0]]])
    # Between the ranks 1/8, 3/8, 5/8 and 7/8 the band is 3.5 - 1.5 = 2; offsets there are -.5, -.25, .25 and .5.
    np.testing.assert_allclose(shift.shift_paths(paths, ["2024-03-04 09:00:00"]), [[[5.0, 0.0, 1.5, 3.5]]])


def test_a_calibration_learns_the_tails_of_its_own_levels() -> None:
    """The narrow archive's tails are those of the calibrated levels, and a tenth of the prices lies beyond each."""
    narrow = Tails(low=0.0, high=0.0, band=(0.1, 0.9))
    model = open_packed(pack_narrow(tail="exponential", tails=narrow))
    found = calibrate_archive(model, {"M00": make_series(LEARNT)}, "M00")
    tails = open_packed(pack_calibrated(model.archive, found)).forecast.tails
    assert tails
    assert np.array(tails.beyond) / (6 * found.record.windows) == pytest.approx([0.1, 0.1], abs=0.02)
    assert (tails.low, tails.high) == pytest.approx((0.2, 0.2), abs=0.1)
    flat = open_packed(pack_narrow())
    assert open_packed(pack_calibrated(flat.archive, found)).forecast.tails is UNSET
