"""Calibrated archives cover what they promise; those that are not keep their bytes, and false offsets load nowhere."""

import dataclasses
from datetime import timedelta
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from handlers.forecasters import build_family
from handlers.kinds import ArchiveParts, pack_model
from handlers.model import open_model
from handlers.training.time_series import Series
from model_store.archives.archive import DEFAULT_LIMITS, open_archive, read_offsets
from model_store.archives.manifest import GoldenSample, Kind, Tails
from model_store.archives.packing import save_tensors
from model_store.errors import ArchiveInvalid, GoldenMismatch
from model_store.names import ModelName
from server.offline.calibration import FILE, calibrate_archive, pack_calibrated
from server.offline.evaluation import compute_scores
from server.offline.fleet_evaluation import measure_uncalibrated
from server.offline.rolling_windows import ArchiveVersion, InProcess, Rolling, Unfit, forecast_windows, open_unpublished
from tests.archives import make_zip, read_members
from tests.server.markets import HISTORY, START, make_forecast, open_market

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
    assert measure_uncalibrated(calibrated, series, origins) == before.coverage
    assert measure_uncalibrated(plain, series, origins) is None


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


def test_only_forecasts_by_quantiles_are_calibrated() -> None:
    """An archive of several products or of paths says that it cannot be."""
    spec = open_packed(calibrate_narrow()[1]).archive.spec
    assert spec is not None
    assert spec.forecast is not None
    several = msgspec.structs.replace(spec.forecast, products=("a", "b"))
    for forecast in (several, msgspec.structs.replace(spec.forecast, paths=10), None):
        with pytest.raises(ValueError, match="forecasts of one product by quantiles"):
            msgspec.structs.replace(spec, forecast=forecast)
    with pytest.raises(ValueError, match="not to kind onnx"):
        msgspec.structs.replace(spec, kind=Kind.ONNX, architecture="", config={})
    model = open_market()
    paths = msgspec.structs.replace(model.forecast, paths=10)
    assert model.archive.spec is not None
    drawing = dataclasses.replace(model.archive, spec=msgspec.structs.replace(model.archive.spec, forecast=paths))
    with pytest.raises(Unfit, match="draws sample paths"):
        calibrate_archive(dataclasses.replace(model, archive=drawing), {"M00": make_series(40)}, "M00")


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
