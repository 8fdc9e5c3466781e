"""Calibrates archives: learns from past forecast errors how far each quantile level is off, and packs that. Torch.

Only windows that the network was not fitted to tell how wide its errors are: those in-sample are narrower.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np

from handlers.base import Float32
from handlers.codecs.calibration import count_rows
from handlers.codecs.features import DAY, Float64, parse_step_seconds
from handlers.evaluation.conformal import calibrate_rolling, estimate_offsets, shift_levels
from handlers.evaluation.scores import Scores, Steps
from handlers.model import open_model
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.tails import TooFewScores, choose_band, fit_tails
from handlers.training.time_series import Series
from model_store.archives.archive import Archive, open_archive
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    MAR_MANIFEST,
    Calibration,
    ForecastSpec,
    GoldenSample,
    Spec,
    Tails,
)
from model_store.archives.packing import pack_archive, save_tensors
from model_store.names import ModelName
from server.offline.evaluation import compute_scores
from server.offline.fleet_evaluation import Progress, collect_results, fetch_archives, read_columns, read_products
from server.offline.mixture_shares import learn_archive_shares, learns_shares, use_shares, write_shares
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    add_known_series,
    count_unseen,
    forecast_products,
    forecast_windows,
    list_hours_of_windows,
)
from server.settings import Settings
from server.worker.archive_store import open_store

FILE = "calibration.safetensors"
LEAST_DAYS, TRAILING_DAYS, DAYS = 28, 56, 91
ROUND_DAYS = 7  #: days between two calibrations of the rolling comparison


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The offsets of one archive, and the scores of windows before and after a rolling calibration.

    The scores are None where there are too few windows for a comparison on windows after those that were learnt from.
    `tails`: how far prices lie beyond the outer levels once these are shifted, for archives with the exponential rule.
    """

    offsets: Float32
    record: Calibration
    days: int
    before: Scores | None
    after: Scores | None
    tails: Tails | None = None
    shares: Float32 | None = None  #: the new weights [parts, levels] of a mixture that learns them
    note: str = ""  #: what limits it, in words


def calibrate_fleet(
    csv: Path,
    time: str,
    names: Mapping[str, ModelName],
    settings: Settings,
    days: int,
    report_progress: Progress,
    rules: FileRules = PLAIN,
) -> tuple[dict[str, Calibrated], dict[str, str]]:
    """Calibrate and publish every market; also returns why some could not be. Raises LoadError, SeriesInvalid.

    A target whose archive has several products names the archive, whose products are columns of the file. Its results
    are those of its products, as TARGET#PRODUCT.
    """
    source, limits = open_store(settings)

    def one(market: tuple[str, ArchiveVersion]) -> dict[str, Calibrated]:
        target, model = market
        if target in several:
            found = calibrate_products(model, read_products(csv, time, model, rules), days)
            labelled = {f"{target}#{product}": each for product, each in found.by_product.items()}
            packed = pack_calibrated(model.archive, found.whole)
        else:
            alone = calibrate_archive(model, columns[target], target, days)
            labelled, packed = {target: alone}, pack_calibrated(model.archive, alone)
        open_model(open_archive(packed, model.name, limits)).prove()
        source.put(model.name, packed)
        report_progress(1, len(names))
        return labelled

    with ThreadPoolExecutor(settings.loader_threads) as pool:
        models, failed = fetch_archives(pool, names, settings, of_any=True)
        several = {target for target, model in models.items() if model.products}
        alone = {target: model for target, model in models.items() if target not in several}
        columns, lacking = read_columns(csv, time, alone, rules) if alone else ({}, {})
        markets = {target: (target, model) for target, model in models.items() if target not in lacking}
        done, wrong = collect_results(pool, one, markets)
    return {name: each for labelled in done.values() for name, each in labelled.items()}, {**failed, **lacking, **wrong}


@dataclass(frozen=True, slots=True)
class CalibratedProducts:
    """The calibration of an archive of several products as a whole, and what it is for each of them."""

    whole: Calibrated
    by_product: Mapping[str, Calibrated]


def calibrate_products(model: ArchiveVersion, products: Sequence[Series], days: int = DAYS) -> CalibratedProducts:
    """Learn the offsets of each product from forecasts of the last days that the archive was not fitted to.

    Raises Unfit, LoadError.
    """
    forecast, plain = model.forecast_of_any, model.without_calibration()
    origins, note = _choose_origins(model, products[0], forecast, days)
    found = forecast_products(plain, products, origins)
    each = [replace(calibrate_windows(one), note=note) for one in found]
    offsets = np.stack([one.offsets for one in each])
    record = msgspec.structs.replace(each[0].record, sha256=sha256(save_tensors({"offsets": offsets})).hexdigest())
    shifted = [
        shift_levels(one.quantiles, one.levels, learnt.offsets, list_hours_of_windows(one))
        for one, learnt in zip(found, each, strict=True)
    ]
    tails = fit_tails(np.concatenate([one.actuals for one in found]), np.concatenate(shifted), found[0].levels)
    whole = Calibrated(offsets, record, each[0].days, None, None, tails)
    return CalibratedProducts(whole, dict(zip(forecast.products, each, strict=True)))


def calibrate_archive(
    model: ArchiveVersion, columns: Mapping[str, Series], target: str, days: int = DAYS
) -> Calibrated:
    """Learn the offsets of an archive from its forecasts of the last days that it was not fitted to.

    A mixture that learns its weights learns them from these days first, and the offsets are those of its new answer.

    Raises:
        Unfit: the archive cannot be calibrated on these prices, or has seen too many of them. LoadError.
    """
    forecast = model.forecast
    plain = model.without_calibration()
    series = add_known_series(columns, target, forecast)
    origins, note = _choose_origins(model, series, forecast, days)
    if not learns_shares(plain.archive):
        return replace(calibrate_windows(forecast_windows(InProcess(), plain, series, origins)), note=note)
    shares = learn_archive_shares(InProcess(), plain, series, origins)
    mixed = use_shares(plain, shares)
    found = calibrate_windows(forecast_windows(InProcess(), mixed, series, origins))
    return replace(found, shares=shares, note=note)


def _choose_origins(model: ArchiveVersion, series: Series, forecast: ForecastSpec, days: int) -> tuple[Steps, str]:
    """Choose the windows of the last days that the archive was not fitted to, and what limits them. Raises Unfit."""
    origins = Rolling(most=count_windows(days, forecast)).origins(series, [forecast])
    unseen = count_unseen(model, series, origins)
    note = ""
    if unseen is None:
        note = (
            f"{model.name} does not say until when it was trained; if it has seen these days, its bands stay too narrow"
        )
    else:
        origins = origins[len(origins) - unseen :]
    if len(origins) < (least := count_windows(LEAST_DAYS, forecast)):
        what = f"{model.name} was not fitted to {len(origins)} windows at the end of the file"
        raise Unfit(f"{what}, and a calibration needs {least}; give newer rows, or use `retrain --calibrate`")
    return origins, note


def count_windows(days: int, forecast: ForecastSpec) -> int:
    """Return how many forecasts without overlap cover so many days, at least one."""
    seconds = parse_step_seconds(forecast.frequency) * forecast.prediction_length
    return -(-days * DAY // seconds) if seconds >= DAY else days * max(1, round(DAY / seconds))


def calibrate_windows(found: WindowForecasts) -> Calibrated:
    """Learn the offsets of forecasts that the model was not fitted to. Raises Unfit where actuals are too few."""
    step_s = round(found.series.step.total_seconds())
    rows, hours = count_rows(step_s), list_hours_of_windows(found)
    actuals, levels = found.actuals, found.levels
    days = max(1, round(len(found.origins) * found.horizon * step_s / DAY))
    try:
        offsets = estimate_offsets(actuals, found.quantiles, levels, hours, rows)
        low, high = choose_band(levels)
        before, after = _compare_rolling(found, hours, rows, days)
    except TooFewScores as error:
        raise Unfit(f"{found.model}: {error}") from error
    record = Calibration(
        file=FILE,
        sha256=sha256(save_tensors({"offsets": offsets})).hexdigest(),
        low=float(levels[low]),
        high=float(levels[high]),
        windows=len(found.origins),
        until=found.series.stamp(int(found.steps[-1, -1])),
    )
    shifted = shift_levels(found.quantiles, levels, offsets, hours)
    return Calibrated(offsets, record, days, before, after, fit_tails(actuals, shifted, levels))


def pack_calibrated(archive: Archive, calibrated: Calibrated) -> bytes:
    """Pack an archive again with its offsets and a golden sample that has the calibrated answer. Raises ArchiveInvalid.

    Members and records that the calibration does not concern keep their bytes.
    """
    spec, golden = archive.spec, archive.golden()
    assert spec is not None, "it forecasts"
    dropped = {FLEETCAST_JSON, MAR_MANIFEST, FILE, spec.golden, spec.calibration.file if spec.calibration else None}
    members = {name: archive.read(name) for name in archive.members if name not in dropped}
    members[FILE] = save_tensors({"offsets": calibrated.offsets})
    forecast = spec.forecast
    if forecast is not None and forecast.tails and calibrated.tails is not None:
        forecast = msgspec.structs.replace(forecast, tails=calibrated.tails)
    bare = msgspec.structs.replace(spec, forecast=forecast, calibration=calibrated.record, golden=None)
    if calibrated.shares is not None:
        bare, members[spec.weights.file] = write_shares(archive, bare, calibrated.shares)
    packed = _pack(archive, bare, members, None)
    if golden is None:
        return packed
    answer = open_model(open_archive(packed, archive.name)).answer(msgspec.json.encode(golden.request))
    renewed = msgspec.structs.replace(golden, response=msgspec.json.decode(answer))
    return _pack(archive, bare, members, renewed)


def _pack(archive: Archive, spec: Spec, members: Mapping[str, bytes], golden: GoldenSample | None) -> bytes:
    name, version = "m", "1.0"
    if archive.mar is not None:
        name, version = archive.mar.model.model_name or name, archive.mar.model.model_version or version
    return pack_archive(spec, members, model_name=name, model_version=version, golden=golden)


def _compare_rolling(found: WindowForecasts, hours: Steps, rows: int, days: int) -> tuple[Scores | None, Scores | None]:
    """Score the windows after the first TRAILING_DAYS before and after calibration by the windows before them only."""
    a_day = len(found.origins) / days
    trailing, every = round(TRAILING_DAYS * a_day), max(1, round(ROUND_DAYS * a_day))
    if len(found.origins) < trailing + every:
        return None, None
    quantiles = calibrate_rolling(found.actuals, found.quantiles, found.levels, hours, rows, trailing, every)
    return _score(found, trailing, found.quantiles[trailing:]), _score(found, trailing, quantiles)


def _score(found: WindowForecasts, first: int, quantiles: Float64) -> Scores:
    return compute_scores(
        WindowForecasts(
            found.series,
            found.model,
            found.version,
            found.origins[first:],
            found.levels,
            np.ascontiguousarray(quantiles),
        )
    )
