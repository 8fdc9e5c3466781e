"""Backtests a fleet on one CSV file: fetches archives, reads columns and scores every market, on threads.

A market that fails is reported, and the others continue. A store that cannot be reached ends the run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from traceback import extract_tb
from types import MappingProxyType
from typing import TypeVar

import msgspec
import numpy as np

from handlers.codecs.scenarios import CorrelationModel
from handlers.evaluation.scores import Steps
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series, SeriesInvalid, read_csv, read_header
from model_store.errors import LoadError, StoreDenied, StoreUnavailable
from model_store.names import ModelName
from server.offline.evaluation import FanChart, MarketScore, compute_scores, make_fan_chart, score_forecasts
from server.offline.measures import IN_UNIT
from server.offline.online_bands import score_online, score_replay
from server.offline.refits import forecast_refitted
from server.offline.rolling_windows import (
    Answers,
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    add_known_series,
    explain_calibrated_windows,
    explain_seen_windows,
    explain_unused_rows,
    fetch_version,
    forecast_windows,
)
from server.offline.scenario_scores import measure_outside
from server.settings import Settings
from server.worker.archive_store import open_store

Progress = Callable[[int, int], None]  #: takes how many are newly done, and how many there are in all

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Backtest:
    """A fleet's result: the scored markets, their charts in the same order, and why the others could not be scored."""

    csv: str
    store: str
    asked: str  #: the source of the forecasts, in words
    markets: Sequence[MarketScore]
    fans: Sequence[FanChart]
    failed: Mapping[str, str]

    def __repr__(self) -> str:
        return f"<Backtest {self.csv}: {len(self.markets)} markets, {len(self.failed)} failed>"

    def mean(self, measure: str) -> float | None:
        """Return the mean of a measure over the markets that have it; None of prices in different units."""
        if measure in IN_UNIT and len({each.unit for each in self.markets}) > 1:
            return None
        found = [value for each in self.markets if (value := getattr(each.scores, measure)) == value]  # not NaN
        return sum(found) / len(found) if found else None

    def notes(self) -> dict[str, list[str]]:
        """Return what a reader of the scores should know, and of which markets."""
        found: dict[str, list[str]] = {}
        for each in self.markets:
            for note in each.notes:
                found.setdefault(note, []).append(each.target)
        return found

    def json(self, measures: Iterable[str]) -> bytes:
        """Encode the results as JSON, without charts and with null for undefined scores."""
        whole = {
            "csv": self.csv,
            "store": self.store,
            "asked": self.asked,
            "mean": {measure: self.mean(measure) for measure in measures},
            "markets": [asdict(each) for each in self.markets],
            "failed": self.failed,
        }
        return msgspec.json.format(msgspec.json.encode(whole), indent=1)


def match_columns(csv: Path, time: str, settings: Settings, template: str) -> dict[str, ModelName]:
    """Match the columns that have an archive in the store. Raises ValueError if there are none, LoadError."""
    source, _ = open_store(settings)
    there = {each.name for each in source.list(template.partition("{target}")[0])}
    found = {column: template.replace("{target}", column) for column in read_header(csv) if column != time}
    names = {column: ModelName(name) for column, name in found.items() if name in there}
    if not names:
        raise ValueError(f"{settings.store} has no archive {template} of any column of {csv.name}: {', '.join(found)}")
    return names


def backtest_fleet(
    csv: Path,
    time: str,
    names: Mapping[str, ModelName],
    settings: Settings,
    answers: Answers,
    rolling: Rolling,
    report_progress: Progress,
    rules: FileRules = PLAIN,
    against: str = "",
    correlation: CorrelationModel | None = None,
    *,
    online: bool = False,
    refit_days: int = 0,
) -> Backtest:
    """Forecast and score the windows of all markets, several at a time.

    `against` is a column, in whose name {target} may stand, that is scored beside them, and so are the joint scenarios
    of a `correlation`. `online`: replay them with adaptive bands as well. `refit_days`: the recipe of each archive is
    fitted anew so often, and forecasts in its place; 0: the archives do. Raises LoadError, SeriesInvalid, OSError, and
    ValueError without such a column.
    """

    def one(market: tuple[str, ArchiveVersion]) -> tuple[MarketScore, FanChart]:
        target, model = market
        forecast = model.forecast
        series = add_known_series(columns[target], target, forecast)
        origins = rolling.origins(series, [forecast])
        if refit_days:
            found = forecast_refitted(model, series, origins, refit_days)
        else:
            found = forecast_windows(answers, model, series, origins)
        if not (~np.isnan(found.actuals)).any():
            span = f"{series.stamp(int(origins[0]))} to {series.stamp(int(found.steps[-1, -1]))}"
            raise Unfit(f"{target}: no price is observed in the {len(origins)} windows from {span}")
        report_progress(1, len(names))
        before = None if refit_days else measure_uncalibrated(model, series, origins)
        outside = None if correlation is None else measure_outside(found, forecast, correlation)
        other = columns[target][against.replace("{target}", target)] if against else None
        notes = list_notes(found, model, refit_days)
        score = score_forecasts(found, forecast.unit, notes, before, other, outside)
        replayed = None
        if online and refit_days:
            replayed = score_replay(model, found, found, None, correlation)
        elif online:
            replayed = score_online(model, found, correlation)
        return replace(score, online=replayed, time_zone=forecast.time_zone), make_fan_chart(found)

    with ThreadPoolExecutor(settings.loader_threads) as pool:
        models, failed = fetch_archives(pool, names, settings)
        more = {target: [against.replace("{target}", target)] for target in models} if against else {}
        columns, lacking = read_columns(csv, time, models, rules, more)
        markets = {target: (target, model) for target, model in models.items() if target not in lacking}
        done, wrong = collect_results(pool, one, markets)
    results = list(done.values())
    return Backtest(
        csv=csv.name,
        store=settings.store,
        asked=answers.said,
        markets=[each for each, _ in results],
        fans=[drawn for _, drawn in results],
        failed={**failed, **lacking, **wrong},
    )


def measure_uncalibrated(model: ArchiveVersion, series: Series, origins: Steps) -> float | None:
    """Measure the coverage of the windows before the archive's calibration; None if it has none. Raises LoadError."""
    if model.calibration is None:
        return None
    return compute_scores(forecast_windows(InProcess(), model.without_calibration(), series, origins)).coverage


def list_notes(found: WindowForecasts, model: ArchiveVersion, refit_days: int = 0) -> tuple[str, ...]:
    """List what a reader of the scores should know of their windows."""
    unused = explain_unused_rows(found.series, model.forecast, int(found.steps[-1, -1]))
    if refit_days:
        said = "1 day" if refit_days == 1 else f"{refit_days} days"
        fits = f"the recipe of each archive was fitted anew every {said} to the rows before, without its calibration"
        return tuple(filter(None, [*found.series.notes, unused, fits]))
    seen = explain_seen_windows(model, found.series, found.origins)
    known = explain_calibrated_windows(model, found.series, found.origins)
    return tuple(filter(None, [*found.series.notes, unused, seen, known]))


def fetch_archives(
    pool: ThreadPoolExecutor, names: Mapping[str, ModelName], settings: Settings, *, of_any: bool = False
) -> tuple[dict[str, ArchiveVersion], dict[str, str]]:
    """Fetch the archives by target; also returns why some cannot be used. Raises StoreUnavailable, StoreDenied.

    `of_any`: those of several products can be used too.
    """
    source, limits = open_store(settings)

    def one(name: ModelName) -> ArchiveVersion:
        model = fetch_version(source, name, limits)
        _ = model.forecast_of_any if of_any else model.forecast  # raises if the archive is unfit
        return model

    return collect_results(pool, one, names)


def collect_results(
    pool: ThreadPoolExecutor, work: Callable[[T], R], of: Mapping[str, T]
) -> tuple[dict[str, R], dict[str, str]]:
    """Collect the results by key, and the errors of some. Raises StoreUnavailable and StoreDenied at once."""
    futures = {key: pool.submit(work, each) for key, each in of.items()}
    done: dict[str, R] = {}
    failed: dict[str, str] = {}
    for key, future in futures.items():
        try:
            done[key] = future.result()
        except (StoreUnavailable, StoreDenied):
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except Exception as error:
            failed[key] = explain_error(error)
    return done, failed


def explain_error(error: Exception) -> str:
    """Explain an error in one line. An error of an unknown class is a bug; it fails one market and names its place."""
    if isinstance(error, (LoadError, SeriesInvalid, Unfit)):
        return str(error)
    place = extract_tb(error.__traceback__)[-1]
    return f"failed unexpectedly: {error!r} ({Path(place.filename).name}, line {place.lineno})"


def read_columns(
    csv: Path,
    time: str,
    models: Mapping[str, ArchiveVersion],
    rules: FileRules = PLAIN,
    more: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[dict[str, dict[str, Series]], dict[str, str]]:
    """Read for each target its column and the covariates known ahead, on the clock and by the step of its archive.

    `more` columns are read for a target beside those. Also returns targets that lack a covariate. The file is read once
    for all archives of one clock and step. Raises SeriesInvalid, OSError: the file cannot be read, or has no column of
    a target; ValueError: it has none of `more`.
    """
    there = set(read_header(csv))
    for name in (name for names in more.values() for name in names if name not in there):
        raise ValueError(f"{csv.name} has no column {name!r}")
    lacking = {
        target: [name for name in each.forecast.dynamic_feat if name not in there] for target, each in models.items()
    }
    groups: dict[FileRules, list[str]] = {}
    for target, each in models.items():
        groups.setdefault(rules.for_archive(each.forecast), []).append(target)
    columns: dict[str, dict[str, Series]] = {}
    for read_by, targets in groups.items():
        known = [name for target in targets if not lacking[target] for name in models[target].forecast.dynamic_feat]
        known += [name for target in targets for name in more.get(target, ())]
        found = {each.name: each for each in read_csv(csv, time, list(dict.fromkeys([*targets, *known])), (), read_by)}
        columns |= dict.fromkeys(targets, found)
    said = "has no such column, which the archive wants as `dynamic_feat`"
    return columns, {target: f"{', '.join(names)}: {csv.name} {said}" for target, names in lacking.items() if names}
