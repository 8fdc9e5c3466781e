"""Rolling windows of series, and their forecasts by archives in this process or through a running server.

The request of a window ends before its origin, except for covariates that are known ahead. Both ways use the same
request, so that both give the same numbers. `backtest`, `pack --gate`, `correlate` and `retrain` use them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import msgspec
import numpy as np

from handlers.codecs.calibration import HOUR
from handlers.codecs.features import DAY, Float64, parse_step_seconds
from handlers.errors import RequestError, RunFailed
from handlers.evaluation.scores import Steps
from handlers.model import open_model
from handlers.training.input_recipe import list_origins
from handlers.training.time_series import Series
from model_store.archives.archive import Archive, Limits, open_archive
from model_store.archives.manifest import Calibration, ForecastSpec
from model_store.names import ModelName
from model_store.stores.object_store import Source
from server.contract import HEADER_MODEL_VERSION
from server.sdk.client import Client
from server.sdk.errors import FleetcastError
from server.sdk.signing import find_access_key, find_token

ROWS = 64  #: most windows in one request
PRICE_SCORES = {"configuration": {"output_types": ["quantiles"]}}

Instances = Sequence[dict[str, object]]
Asked = Callable[[Instances], Float64]  #: instances [n] -> quantiles [n, horizon, levels]
Told = Callable[[int], None]  #: takes the number of newly answered windows


class Unfit(ValueError):
    """The archive cannot be backtested on this series; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ArchiveVersion:
    """One version of an archive, opened."""

    name: ModelName
    version: str  #: version in the store; empty if the archive is in no store yet
    archive: Archive

    def __repr__(self) -> str:
        return f"<ArchiveVersion {self.name} {self.version or 'not stored'}>"

    @property
    def trained_until(self) -> datetime | None:
        """The last step that the archive was fitted to, on its wall clock; None if it does not say."""
        until = self.archive.spec.trained_until if self.archive.spec else msgspec.UNSET
        return datetime.fromisoformat(until) if until else None

    @property
    def calibration(self) -> Calibration | None:
        """The record of its calibration; None if it has none."""
        return (self.archive.spec.calibration or None) if self.archive.spec else None

    def without_calibration(self) -> "ArchiveVersion":
        """The archive as it was before its calibration, and without the golden sample, whose answer is calibrated."""
        if self.archive.spec is None or self.calibration is None:
            return self
        spec = msgspec.structs.replace(self.archive.spec, calibration=msgspec.UNSET, golden=None)
        return replace(self, archive=replace(self.archive, spec=spec))

    @property
    def products(self) -> tuple[str, ...]:
        """The products of an archive of several; none of one. Raises Unfit as `forecast_of_any`."""
        products = self.forecast_of_any.products
        return products if len(products) > 1 else ()

    @property
    def forecast(self) -> ForecastSpec:
        """What the archive forecasts. Raises Unfit if a column of prices cannot be a request for it."""
        forecast = self.forecast_of_any
        if len(forecast.products) > 1:
            raise Unfit(f"{self.name} has {len(forecast.products)} products; this takes archives of one")
        return forecast

    @property
    def forecast_of_any(self) -> ForecastSpec:
        """What the archive forecasts, of one product or several. Raises Unfit if columns cannot be a request for it."""
        forecast = self.archive.spec.forecast if self.archive.spec else None
        if forecast is None:
            raise Unfit(f"{self.name} answers tensors, not forecasts; a backtest needs an archive with a `forecast`")
        if forecast.cat:
            raise Unfit(f"{self.name} wants `cat` ({', '.join(forecast.cat)}), which the file has no place for")
        return forecast


def count_unseen(model: ArchiveVersion, series: Series, origins: Steps) -> int | None:
    """Count the windows that begin after all that the archive was fitted to; None if it does not say what that was."""
    until = model.trained_until
    return None if until is None else int((origins > series.first_at(until)).sum())


def explain_seen_windows(model: ArchiveVersion, series: Series, origins: Steps) -> str:
    """Say how many windows the archive was fitted to, where its scores are too good; empty if it was to none."""
    unseen = count_unseen(model, series, origins)
    if unseen is None or unseen == len(origins):
        return ""
    until = model.archive.spec.trained_until if model.archive.spec else ""
    what = f"{len(origins) - unseen} of {len(origins)} windows are in-sample"
    return f"{what}: the archive was trained until {until}, and its scores there are too good"


def explain_calibrated_windows(model: ArchiveVersion, series: Series, origins: Steps) -> str:
    """Say how many windows the archive's calibration has learnt from; empty if it is none of them."""
    if model.calibration is None:
        return ""
    until = model.calibration.until
    seen = int((origins <= series.first_at(datetime.fromisoformat(until))).sum())
    if not seen:
        return ""
    what = f"{seen} of {len(origins)} windows begin before {until}, until when the archive was calibrated"
    return f"{what}; its coverage there says little of later ones"


def fetch_version(source: Source, name: ModelName, limits: Limits) -> ArchiveVersion:
    """Fetch the version in the store. Raises LoadError."""
    fetched = source.get(name)
    assert fetched is not None, "only a conditional GET is answered `not modified`"
    return ArchiveVersion(name, fetched.version, open_archive(fetched.data, name, limits))


def open_unpublished(data: bytes, name: ModelName, limits: Limits) -> ArchiveVersion:
    """Open an archive that is in no store yet. Raises ArchiveInvalid."""
    return ArchiveVersion(name, "", open_archive(data, name, limits))


class Answers(Protocol):
    """A source of answers to the requests of a backtest."""

    @property
    def said(self) -> str:
        """What it is, in words."""

    def of(self, model: ArchiveVersion) -> tuple[Asked, Callable[[], str]]:
        """Return a function that answers for this model, and one for its version. Raises LoadError, Unfit."""


class InProcess:
    """Answers by the models of the archives in this process. Thread-safe."""

    said = "in this process"

    def __repr__(self) -> str:
        return "<InProcess>"

    def of(self, model: ArchiveVersion) -> tuple[Asked, Callable[[], str]]:
        """Build the archive and run its golden sample."""
        opened = open_model(model.archive)
        opened.prove()

        def ask(instances: Instances) -> Float64:
            return _parse_quantiles(opened.answer(_encode_request(instances)))

        return ask, lambda: model.version


class ThroughServer:
    """Answers by a running server, through the client of the SDK. Thread-safe."""

    def __init__(self, url: str) -> None:
        """Connect to `url`. Raises ValueError for a URL that is not one of HTTP."""
        self._url = url
        self._client = Client(url, access_key=find_access_key(), token=find_token())

    def __repr__(self) -> str:
        return f"<ThroughServer {self._url}>"

    @property
    def said(self) -> str:
        """What it is, in words."""
        return f"through {self._url}"

    def of(self, model: ArchiveVersion) -> tuple[Asked, Callable[[], str]]:
        """Use the model of this name on the server."""
        seen = [""]

        def ask(instances: Instances) -> Float64:
            try:
                reply = self._client.invoke(model.name, _encode_request(instances))
            except FleetcastError as error:
                raise Unfit(f"{model.name}: {error}") from error
            seen[0] = reply.headers.get(HEADER_MODEL_VERSION.lower(), "")
            return _parse_quantiles(reply.body)

        return ask, lambda: seen[0]


class _Prediction(msgspec.Struct):
    quantiles: dict[str, list[float]]


class _WindowAnswer(msgspec.Struct):
    predictions: list[_Prediction]


class _ProductsPrediction(msgspec.Struct):
    quantiles: dict[str, list[list[float]]]


class _ProductsAnswer(msgspec.Struct):
    predictions: list[_ProductsPrediction]


_ANSWER = msgspec.json.Decoder(_WindowAnswer)
_PRODUCTS_ANSWER = msgspec.json.Decoder(_ProductsAnswer)


def _encode_request(instances: Instances) -> bytes:
    return msgspec.json.encode({"instances": instances, **PRICE_SCORES})


def _parse_quantiles(answer: bytes) -> Float64:
    """Parse an answer into quantiles [n, horizon, levels], in the order of the archive's levels."""
    found = _ANSWER.decode(answer).predictions
    return np.array([list(each.quantiles.values()) for each in found], np.float64).transpose(0, 2, 1)


@dataclass(frozen=True, slots=True)
class Rolling:
    """The windows to forecast: one every `every` steps (0: without overlap), with all steps from `first` to `until`.

    Windows are counted from `first` on if it is given, else backwards from `until` or the end of the series. `most`
    limits them to the last ones, 0: all. An archive that forecasts from one time of day has windows from then only.
    """

    every: int = 0
    most: int = 0
    first: datetime | None = None
    until: datetime | None = None

    def origins(self, series: Series, forecasts: Sequence[ForecastSpec]) -> Steps:
        """Return the first step of each window [W] that all of `forecasts` can answer within the series.

        Raises Unfit if there is none, SeriesInvalid if no step is at an archive's time of day.
        """
        history = max(each.history_length for each in forecasts)
        horizon = max(each.prediction_length for each in forecasts)
        end = series.first_at(self.until) if self.until else len(series.values)
        begin = series.first_at(self.first) if self.first else 0
        places = find_common_origins(series, forecasts)
        places = places[(places >= begin) & (places <= end - horizon)]
        gap = int(places[1] - places[0]) if len(places) > 1 else 1
        stride = -(-(self.every or horizon) // gap)
        if self.first is None:
            found = places[places >= history][::-stride][::-1]
        else:
            found = places[::stride]
            found = found[found >= history]
        if not len(found):
            raise Unfit(_explain_no_window(series, forecasts, history, horizon, end))
        return found[-self.most :]


def find_common_origins(series: Series, forecasts: Sequence[ForecastSpec]) -> Steps:
    """Return the evenly spaced steps from which all of the forecasts may start. Raises Unfit, SeriesInvalid."""
    ranges = [list_origins(series, each) for each in forecasts]
    found = np.arange(ranges[0].start, ranges[0].stop, ranges[0].step)
    for other in ranges[1:]:
        found = found[(found >= other.start) & ((found - other.start) % other.step == 0)]
    times = sorted({each.origin for each in forecasts if each.origin})
    if len(times) > 1 and not len(found):
        raise Unfit(f"{series.name}: one archive forecasts from {times[0]} on and another from {times[1]}")
    return found


def explain_unused_rows(series: Series, forecast: ForecastSpec, last: int) -> str:
    """Say which rows after the last window, whose last step is `last`, no window uses; empty if there are none."""
    left = len(series.values) - 1 - last
    if not forecast.origin or left <= 0:
        return ""
    what = f"forecasts start at {forecast.origin}, so the last window ends at {series.stamp(last)}"
    return f"{what}; {left} later row{'s are' if left > 1 else ' is'} not used"


def _explain_no_window(series: Series, forecasts: Sequence[ForecastSpec], history: int, horizon: int, end: int) -> str:
    span = f"{series.name} has {end} steps before {series.stamp(end)}"
    times = {each.origin for each in forecasts if each.origin}
    only = f", from {' and '.join(sorted(times))} on" if times else ""
    return f"{span}; a window needs {history} of history and {horizon} to forecast{only}"


@dataclass(frozen=True, slots=True)
class WindowForecasts:
    """The forecasts of one model for windows of a series: quantiles [W, H, levels] from the steps `origins` [W] on.

    `refitted`: the record of the fit that forecast each window [W], such as its tail rule; empty where it is the
    archive's own.
    """

    series: Series
    model: ModelName
    version: str
    origins: Steps
    levels: Float64
    quantiles: Float64
    refitted: Sequence[ForecastSpec] = ()

    def __repr__(self) -> str:
        return f"<WindowForecasts of {self.series.name} by {self.model}: {len(self.origins)} windows of {self.horizon}>"

    @property
    def horizon(self) -> int:
        """The number of steps of a window."""
        return int(self.quantiles.shape[1])

    @property
    def steps(self) -> Steps:
        """The indices in the series that are forecast [W, H]."""
        return self.origins[:, None] + np.arange(self.horizon)

    @property
    def actuals(self) -> Float64:
        """The actual values [W, H], NaN if missing."""
        return self.series.values[self.steps]

    def cut(self, horizon: int, levels: Float64) -> "WindowForecasts":
        """Cut to the first `horizon` steps and to some of the levels."""
        kept = np.isin(self.levels, levels)
        return replace(self, levels=self.levels[kept], quantiles=self.quantiles[:, :horizon, kept])


def forecast_windows(
    answers: Answers, model: ArchiveVersion, series: Series, origins: Steps, told: Told = lambda _: None
) -> WindowForecasts:
    """Forecast every window. Raises LoadError, Unfit."""
    forecast = model.forecast
    _check_windows(model, series, origins)
    ask, version = answers.of(model)
    found = []
    for at in range(0, len(origins), ROWS):
        some = origins[at : at + ROWS].tolist()
        history, horizon = forecast.history_length, forecast.prediction_length
        try:
            found.append(ask([series.instance(origin - history, origin, horizon) for origin in some]))
        except (RequestError, RunFailed, msgspec.MsgspecError) as error:
            raise Unfit(f"{model.name}, windows from {series.stamp(some[0])}: {error}") from error
        told(len(some))
    levels = np.array(forecast.quantile_levels)
    return WindowForecasts(series, model.name, version(), origins, levels, np.concatenate(found))


def forecast_products(model: ArchiveVersion, products: Sequence[Series], origins: Steps) -> list[WindowForecasts]:
    """Forecast every window of all products of an archive together, in this process.

    The covariates are those of the first series. Raises LoadError, Unfit.
    """
    forecast = model.forecast_of_any
    _check_windows(model, products[0], origins)
    opened = open_model(model.archive)
    opened.prove()
    history, horizon, found = forecast.history_length, forecast.prediction_length, []
    for at in range(0, len(origins), ROWS):
        asked = []
        for origin in origins[at : at + ROWS].tolist():
            each = [one.instance(origin - history, origin, horizon) for one in products]
            asked.append({**each[0], "target": [one["target"] for one in each]})
        try:
            answer = _PRODUCTS_ANSWER.decode(opened.answer(_encode_request(asked)))
        except (RequestError, RunFailed, msgspec.MsgspecError) as error:
            raise Unfit(f"{model.name}, windows from {products[0].stamp(int(origins[at]))}: {error}") from error
        found += [list(each.quantiles.values()) for each in answer.predictions]  # [W][levels][D][H]
    quantiles, levels = np.array(found, np.float64).transpose(2, 0, 3, 1), np.array(forecast.quantile_levels)
    return [
        WindowForecasts(series, model.name, model.version, origins, levels, of_product)
        for series, of_product in zip(products, quantiles, strict=True)
    ]


def list_hours_of_windows(found: WindowForecasts) -> Steps:
    """List the hour of the day [W, H] of each forecast step, on the wall clock of the series."""
    start = found.series.start
    begin = start.hour * HOUR + start.minute * 60 + start.second
    step_s = round(found.series.step.total_seconds())
    hours: Steps = (begin + found.steps * step_s) % DAY // HOUR
    return hours


def _check_windows(model: ArchiveVersion, series: Series, origins: Steps) -> None:
    """Check for what a server would refuse in a request. Raises Unfit, in terms of the file."""
    forecast = model.forecast_of_any
    if parse_step_seconds(forecast.frequency) != round(series.step.total_seconds()):
        raise Unfit(f"{model.name} forecasts steps of {forecast.frequency}, but {series.name} has {series.frequency}")
    begin, end = int(origins[0]) - forecast.history_length, int(origins[-1]) + forecast.prediction_length
    for name, row in zip(series.known_names, series.known[:, begin:end], strict=True):
        missing = np.flatnonzero(np.isnan(row))
        if len(missing):
            what = "a known-future value is missing; fill it, as every request must bring it"
            raise Unfit(f"column {name!r} at {series.stamp(begin + int(missing[0]))}: {what}")


def add_known_series(columns: Mapping[str, Series], target: str, forecast: ForecastSpec) -> Series:
    """Return the series of one column with others as the covariates of an archive.

    Raises SeriesInvalid if the prices are deviations from a column without values.
    """
    series, known = columns[target], forecast.dynamic_feat
    rows = np.stack([columns[name].values for name in known]) if known else series.known
    found = replace(series, known=rows, known_names=tuple(known))
    return found.without_gaps(forecast.residual_to) if forecast.residual_to else found
