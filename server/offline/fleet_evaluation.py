"""Backtests a fleet on one CSV file: fetches archives, reads columns and scores every market, on threads.

A market that fails is reported, and the others continue. A store that cannot be reached ends the run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from traceback import extract_tb
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from handlers.base import Float32
from handlers.codecs.scenarios import CorrelationModel
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series, SeriesInvalid, read_csv, read_header
from model_store.archives.archive import read_offsets
from model_store.errors import LoadError, StoreDenied, StoreUnavailable
from model_store.names import ModelName
from server.bands.market import name_market
from server.offline.evaluation import (
    FanChart,
    MarketScore,
    compare_with_column,
    compute_scores,
    make_fan_chart,
    score_forecasts,
)
from server.offline.measures import IN_UNIT
from server.offline.online_bands import score_replay
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
    forecast_products,
    forecast_windows,
)
from server.offline.scenario_scores import measure_outside
from server.settings import Settings
from server.worker.archive_store import open_store

Progress = Callable[[int, int], None]  #: takes how many are newly done, and how many there are in all

Scored: TypeAlias = tuple[MarketScore, FanChart]

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

    def one(market: tuple[str, ArchiveVersion]) -> list[Scored]:
        target, model = market
        if model.products:
            _check_products(model, answers, against, refit_days)
            found = forecast_each_product(model, read_products(csv, time, model, rules), target, rolling)
        else:
            found = [forecast_market(model, columns[target], target, answers, rolling, refit_days)]
        scored = [score_market(each, correlation, online=online, refit_days=refit_days) for each in found]
        report_progress(1, len(names))
        if against:
            (score, fan), column = scored[0], columns[target][against.replace("{target}", target)]
            scored = [(replace(score, against=compare_with_column(found[0].found, column)), fan)]
        return scored

    with ThreadPoolExecutor(settings.loader_threads) as pool:
        models, failed = fetch_archives(pool, names, settings, of_any=True)
        alone = {target: model for target, model in models.items() if not model.products}
        more = {target: [against.replace("{target}", target)] for target in alone} if against else {}
        columns, lacking = read_columns(csv, time, alone, rules, more) if alone else ({}, {})
        markets = {target: (target, model) for target, model in models.items() if target not in lacking}
        done, wrong = collect_results(pool, one, markets)
    results = [scored for of_archive in done.values() for scored in of_archive]
    return Backtest(
        csv=csv.name,
        store=settings.store,
        asked=answers.said,
        markets=[each for each, _ in results],
        fans=[drawn for _, drawn in results],
        failed={**failed, **lacking, **wrong},
    )


@dataclass(frozen=True, slots=True)
class MarketForecasts:
    """The forecasts of one market, and what they were before the archive's calibration `offsets`; None if it has none.

    `label` is its name in the results. Of a product of several `found.model` is its name in a correlation.
    """

    label: str
    model: ArchiveVersion
    found: WindowForecasts
    plain: WindowForecasts
    offsets: Float32 | None


def forecast_market(
    model: ArchiveVersion,
    columns: Mapping[str, Series],
    target: str,
    answers: Answers,
    rolling: Rolling,
    refit_days: int = 0,
) -> MarketForecasts:
    """Forecast the windows of an archive of one product. Raises LoadError, Unfit, SeriesInvalid."""
    forecast = model.forecast
    series = add_known_series(columns, target, forecast)
    origins = rolling.origins(series, [forecast])
    if refit_days:
        found = forecast_refitted(model, series, origins, refit_days)
        return MarketForecasts(target, model, found, found, None)
    found = forecast_windows(answers, model, series, origins)
    plain, offsets = found, read_offsets(model.archive)
    if offsets is not None:
        plain = forecast_windows(InProcess(), model.without_calibration(), series, origins)
    return MarketForecasts(target, model, found, plain, offsets)


def forecast_each_product(
    model: ArchiveVersion, products: Sequence[Series], target: str, rolling: Rolling
) -> list[MarketForecasts]:
    """Forecast the windows of all products of an archive together. Raises LoadError, Unfit, SeriesInvalid."""
    origins = rolling.origins(products[0], [model.forecast_of_any])
    found = plain = forecast_products(model, products, origins)
    offsets = read_offsets(model.archive)
    if offsets is not None:
        plain = forecast_products(model.without_calibration(), products, origins)
    return [
        MarketForecasts(
            name_market(target, name),
            model,
            replace(found[i], model=ModelName(name_market(model.name, name))),
            plain[i],
            None if offsets is None else offsets[i],
        )
        for i, name in enumerate(model.products)
    ]


def score_market(
    of: MarketForecasts, correlation: CorrelationModel | None, *, online: bool = False, refit_days: int = 0
) -> Scored:
    """Score the forecasts of one market. Raises Unfit where nothing is observed, LoadError."""
    found, forecast = of.found, of.model.forecast_of_any
    if not (~np.isnan(found.actuals)).any():
        series, windows = found.series, len(found.origins)
        span = f"{series.stamp(int(found.origins[0]))} to {series.stamp(int(found.steps[-1, -1]))}"
        raise Unfit(f"{of.label}: no price is observed in the {windows} windows from {span}")
    before = None if of.offsets is None else compute_scores(of.plain).coverage
    outside = None if correlation is None else measure_outside(found, forecast, correlation)
    score = score_forecasts(found, forecast.unit, list_notes(found, of.model, refit_days), before, None, outside)
    replayed = score_replay(of.model, found, of.plain, of.offsets, correlation) if online else None
    return replace(score, target=of.label, online=replayed, time_zone=forecast.time_zone), make_fan_chart(found)


def _check_products(model: ArchiveVersion, answers: Answers, against: str, refit_days: int) -> None:
    """Check that an archive of several products is asked for no more than it can be. Raises Unfit."""
    for asked, flag in ((not isinstance(answers, InProcess), "--url"), (against, "--against"), (refit_days, "--refit")):
        if asked:
            raise Unfit(f"{model.name} has {len(model.products)} products; leave out {flag}, which takes one")


def list_notes(found: WindowForecasts, model: ArchiveVersion, refit_days: int = 0) -> tuple[str, ...]:
    """List what a reader of the scores should know of their windows."""
    unused = explain_unused_rows(found.series, model.forecast_of_any, int(found.steps[-1, -1]))
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


def read_products(csv: Path, time: str, model: ArchiveVersion, rules: FileRules = PLAIN) -> list[Series]:
    """Read the columns of an archive's products, each with its covariates. Raises SeriesInvalid, OSError."""
    forecast = model.forecast_of_any
    return read_csv(csv, time, list(forecast.products), list(forecast.dynamic_feat), rules.for_archive(forecast))
