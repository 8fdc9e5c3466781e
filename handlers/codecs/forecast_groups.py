"""Decodes and encodes the forecasts of one call together: one set of array operations for all models alike. No torch.

A market's tick shares its stamps, so that what follows from them is found once: checks of the start, calendar
features, the requested levels. Histories are scaled, quantiles sorted, shifted and averaged as arrays over all models.
Whatever is not regular (gaps, doubtful histories, instants with an offset, several products, samples, covariates of a
wrong length) is left to `DeepAr`, item by item, which also words every error.

INVARIANT: an answer has the numbers that `DeepAr` gives for the same request alone: the same operations in the same
order, only over more rows. `tests/handlers/codecs/test_forecast_groups.py` compares them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels, BandCalibration, count_seconds
from handlers.codecs.deepar import FLOAT32_MAX, OVERFLOWS, DeepAr, Encode, Levels
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.features import Float64, Inputs
from handlers.codecs.history import measure_courses
from handlers.codecs.tensors import check_finite
from handlers.errors import RequestError, RunFailed

REGULAR = {"mean", "quantiles"}  #: output types that are computed together
LEAST = 2  #: forecasts that are worth it

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]


class AskedForecast(NamedTuple):
    """One forecast of a call: the contract of its model's archive, and what is asked. A target may be an array."""

    codec: DeepAr
    instance: Instance[Any]


class ForecastNumbers(NamedTuple):
    """The numbers of one answer: `mean` [prediction], `quantiles` [levels, prediction]; None where not asked."""

    start: str
    mean: Float32 | None
    quantiles: Float32 | None


@dataclass(frozen=True, slots=True)
class GroupEncode:
    """Stands for the encoder of one forecast that is encoded with the others of its group."""

    group: "ForecastGroup"
    at: int
    item_id: str | int | None
    answered: list[AnsweredLevels]


class DecodedForecast(NamedTuple):
    """Its rows [1, channels, context], and its encoder."""

    rows: Float32
    encode: "GroupEncode | Encode"


def decode_together(
    asked: Sequence[AskedForecast], configuration: Configuration
) -> list[DecodedForecast | RequestError]:
    """Decode the forecasts of a call, in order. Those of one recipe, start and length are decoded as arrays."""
    found: list[DecodedForecast | RequestError | None] = [None] * len(asked)
    for places in _group_regular(asked, configuration):
        group = ForecastGroup([asked[i].codec for i in places], configuration)
        for i, each in zip(places, group.decode([asked[i].instance for i in places]), strict=True):
            found[i] = each
    return [_decode_alone(one, configuration) if each is None else each for one, each in zip(asked, found, strict=True)]


def encode_together(encoders: Sequence[GroupEncode], outputs: Sequence[Float32]) -> "list[ForecastNumbers | RunFailed]":
    """Make the numbers of answers of outputs [1, prediction, levels], one for each encoder, in order."""
    found: list[ForecastNumbers | RunFailed | None] = [None] * len(encoders)
    for group, members in _sort_by_group(encoders):
        places = np.array([encoders[i].at for i in members])
        numbers = group.compute_answers(places, np.concatenate([outputs[i] for i in members]))
        for i, each in zip(members, numbers, strict=True):
            found[i] = each
            if isinstance(each, ForecastNumbers):
                encoders[i].answered.extend(group.take_levels(encoders[i].at))
    return cast("list[ForecastNumbers | RunFailed]", found)


def _group_regular(asked: Sequence[AskedForecast], configuration: Configuration) -> Iterator[list[int]]:
    """The places of forecasts that can be decoded as arrays, by recipe, start and length of their histories."""
    names = configuration.quantiles or ()
    if configuration.joint or not REGULAR.issuperset(configuration.output_types) or len(set(names)) != len(names):
        return
    groups: dict[object, list[int]] = {}
    for i, (codec, instance) in enumerate(asked):
        if codec.recipe is not None:
            groups.setdefault((id(codec.recipe), instance.start, len(instance.target)), []).append(i)
    yield from (places for places in groups.values() if len(places) >= LEAST)


def _decode_alone(one: AskedForecast, configuration: Configuration) -> DecodedForecast | RequestError:
    try:
        return DecodedForecast(*one.codec.decode_instances([one.instance], configuration))
    except RequestError as error:
        return error


def _sort_by_group(encoders: Sequence[GroupEncode]) -> Iterable[tuple["ForecastGroup", list[int]]]:
    groups: dict[int, tuple[ForecastGroup, list[int]]] = {}
    for i, each in enumerate(encoders):
        groups.setdefault(id(each.group), (each.group, []))[1].append(i)
    return groups.values()


class ForecastGroup:
    """Forecasts of one recipe, start and length. It is decoded once, and encoded in as many parts as it runs in."""

    def __init__(self, codecs: Sequence[DeepAr], configuration: Configuration) -> None:
        self._codecs, self._configuration = codecs, configuration
        self._first = codecs[0]  #: its recipe is everybody's
        forecasts = [codec.forecast for codec in codecs]
        self._channels = self._first.forecast.inputs
        self._kind = self._first.forecast.scaler.kind
        self._centers = np.array([each.scaler.center for each in forecasts])[:, None]
        self._scales = np.array([each.scaler.scale for each in forecasts])[:, None]
        lows = [-np.inf if each.floor is None else each.floor for each in forecasts]
        self._floors = np.array(lows)[:, None, None]
        self._caps = np.array([np.inf if each.cap is None else each.cap for each in forecasts])[:, None, None]
        self._levels: Levels
        self.stamp = ""  #: of the first forecast step
        self._kept: dict[int, bytes] = {}

    def __repr__(self) -> str:
        """For example `<ForecastGroup of 1000 forecasts from 2026-01-14 00:00:00>`."""
        return f"<ForecastGroup of {len(self._codecs)} forecasts from {self.stamp}>"

    @property
    def names(self) -> Sequence[str]:
        """The requested levels."""
        return self._levels.names

    @property
    def numbers(self) -> int:
        """About the number of values in one answer."""
        return self._first.forecast.prediction_length * (1 + len(self._levels.names))

    def get_zone(self, at: int) -> str:
        """The time zone of a forecast."""
        return self._codecs[at].forecast.time_zone

    # --- requests ---------------------------------------------------------------------------------------------------

    def decode(self, instances: Sequence[Instance[Any]]) -> list[DecodedForecast | RequestError | None]:
        """Decode all; None for a forecast that is not regular."""
        inputs, steps = self._first.inputs, len(instances[0].target)
        instances = [_sort_named(inputs, each) for each in instances]
        try:
            started = inputs.start_regular(instances[0].start, steps)
            self._levels = self._first.check_configuration(self._configuration, 1)
        except RequestError:
            return [None] * len(instances)
        if started is None:
            return [None] * len(instances)
        moment, first = started
        self.stamp = first.stamp
        regular, covariates, categories = self._check_lengths(instances, steps)
        history = np.stack([np.asarray(each.target, np.float64) for each in instances])
        regular &= self._find_regular_histories(history, first.hour)
        rows = inputs.rows(len(instances))
        origin = count_seconds(moment.isoformat())
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = self._scale(history, self._centers, self._scales, self._kind)
            for c, channel in enumerate(self._channels):
                at = steps - rows.shape[2] - channel.lag + channel.shift
                window = slice(at, at + rows.shape[2])
                if channel.source == "target":
                    rows[:, c] = scaled[:, window]
                elif channel.source == "calendar":
                    rows[:, c] = inputs.compute_calendar(origin, at, channel)
                elif channel.source == "dynamic_feat":
                    rows[:, c] = self._scale_channel(covariates[:, channel.index, window], c)
                else:
                    rows[:, c] = self._scale_channel(categories[:, channel.index, None], c)
        regular &= np.all(np.isfinite(rows), axis=(1, 2))
        return [
            DecodedForecast(rows[i : i + 1], GroupEncode(self, i, instances[i].item_id, [])) if is_regular else None
            for i, is_regular in enumerate(regular.tolist())
        ]

    def _check_lengths(self, instances: Sequence[Instance[Any]], steps: int) -> tuple[Flags, Float64, Float64]:
        """Whose covariates and categories are as many as the archive has; and these, zeros for all others."""
        forecast = self._first.forecast
        known, needed, count = len(forecast.dynamic_feat), steps + forecast.prediction_length, len(instances)
        regular = np.ones(count, bool)
        covariates = np.zeros((count, known, needed if known else 0))
        categories = np.zeros((count, len(forecast.cat)))
        for i, each in enumerate(instances):
            series, numbers = each.dynamic_feat or [], each.cat or []
            if len(series) != known or len(numbers) != len(forecast.cat) or any(len(row) != needed for row in series):
                regular[i] = False
                continue
            if known:
                covariates[i] = series
            if numbers:
                categories[i] = numbers
        return regular, covariates, categories

    @staticmethod
    def _scale(values: Float64, centers: Float64, scales: Float64, kind: str) -> Float64:
        """As `features.to_network`, with a scaler for each row."""
        if kind == "identity":
            return values
        scaled: Float64 = (values - centers) / scales
        return np.arcsinh(scaled) if kind == "asinh" else scaled

    def _scale_channel(self, values: Float64, place: int) -> Float64:
        """Scale the numbers [n, T] of a channel that has scalers of its own."""
        scalers = [codec.forecast.inputs[place].scaler for codec in self._codecs]
        centers, scales = (np.array([getattr(each, name) for each in scalers])[:, None] for name in ("center", "scale"))
        return self._scale(values, centers, scales, scalers[0].kind)

    def _find_regular_histories(self, history: Float64, first_hour: int) -> Flags:
        """Find the histories [n, T] that have all their values, and nothing doubtful; the others may be anything."""
        regular: Flags = np.all(~np.isnan(history), axis=1)
        readers = [codec.histories for codec in self._codecs]
        reader = readers[0]
        if reader is None:
            return regular
        rules = [each.rules for each in readers if each is not None]
        rows = history[:, -reader.needed :]
        low, high, least = (np.array([getattr(each, name) for each in rules]) for name in ("low", "high", "least_span"))
        with np.errstate(invalid="ignore"):
            lowest, highest = rows.min(axis=1), rows.max(axis=1)
            regular &= (lowest >= low) & (highest <= high) & (highest - lowest >= least)
        steps = history.shape[1]
        flat, stale, season = rules[0].flat_steps, rules[0].stale_steps, reader.season
        if steps >= flat:
            regular &= ~np.all(history[:, -flat:] == history[:, -1:], axis=1)
        if season > 1 and steps >= stale + season:
            before = history[:, steps - stale - season : steps - season]
            regular &= ~np.all(history[:, -stale:] == before, axis=1)
        if reader.turns is not None:
            turns = np.stack([each.turns for each in readers if each is not None and each.turns is not None])
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = self._scale(rows, self._centers, self._scales, self._kind)
                fits = np.matmul(measure_courses(scaled, reader.step_s)[:, None], turns)[:, 0]
            regular &= fits.argmax(axis=1) == first_hour
        return regular

    # --- answers ----------------------------------------------------------------------------------------------------

    def compute_answers(self, places: Places, outputs: Float32) -> list[ForecastNumbers | RunFailed]:
        """Make the answers of the forecasts at `places` from the network's outputs [n, prediction, levels]."""
        codecs = [self._codecs[i] for i in places]
        numbers = outputs.astype(np.float64)
        calibrations = [codec.calibration for codec in codecs]  # `adapt` may replace one meanwhile
        with np.errstate(over="ignore", invalid="ignore"):
            prices = self._unscale(numbers, places)
            growth = np.array([1.0 if each is None else each.growth for each in calibrations])[:, None, None]
            good = np.all(np.abs(prices) <= FLOAT32_MAX / growth, axis=(1, 2))  # NaN is not
            prices[~good] = 0.0
        floors, caps = self._floors[places], self._caps[places]
        prices = np.clip(prices, floors, caps)
        if any(calibrations):
            prices = np.clip(self._shift(prices, calibrations), floors, caps)
        prices.sort(axis=-1)
        self._keep_levels(places, codecs, prices, good)
        kinds = self._configuration.output_types
        means = self._average(prices, codecs) if "mean" in kinds else None
        by_level = self._levels.of(prices).transpose(0, 2, 1).astype(np.float32, order="C")
        quantiles = by_level if "quantiles" in kinds else None
        found = list[ForecastNumbers | RunFailed]()
        for i, is_good in enumerate(good.tolist()):
            if is_good:
                mean, levels = (None if each is None else each[i] for each in (means, quantiles))
                found.append(ForecastNumbers(self.stamp, mean, levels))
            else:
                found.append(_explain_failure(outputs[i : i + 1]))
        return found

    def take_levels(self, at: int) -> Iterator[AnsweredLevels]:
        """Give the levels that a forecast was answered with, once, where its archive keeps them."""
        levels = self._kept.pop(at, None)
        if levels is not None:
            yield AnsweredLevels(count_seconds(self.stamp), levels)

    def _unscale(self, numbers: Float64, places: Places) -> Float64:
        """As `features.from_network`, with a scaler for each forecast."""
        if self._kind == "identity":
            return numbers
        unscaled = np.sinh(numbers) if self._kind == "asinh" else numbers
        prices: Float64 = unscaled * self._scales[places][:, :, None] + self._centers[places][:, :, None]
        return prices

    def _shift(self, prices: Float64, calibrations: Sequence[BandCalibration | None]) -> Float64:
        """Shift the levels of those that have a calibration, each by its offsets."""
        found = np.sort(prices, axis=-1)
        units: dict[tuple[int, int], list[int]] = {}
        for i, each in enumerate(calibrations):
            if each is not None:
                units.setdefault(each.unit, []).append(i)
        for (low, high), places in units.items():
            offsets = np.empty((len(places), *prices.shape[1:]))
            for row, i in zip(offsets, places, strict=True):
                calibration = calibrations[i]
                assert calibration is not None, "these have one"
                row[...] = calibration.find_offsets([self.stamp])
            some = found[places]
            found[places] = offsets * (some[..., high : high + 1] - some[..., low : low + 1]) + some
        return found

    def _keep_levels(self, places: Places, codecs: Sequence[DeepAr], prices: Float64, good: Flags) -> None:
        levels = prices.astype(np.float32)
        for i, (place, codec) in enumerate(zip(places.tolist(), codecs, strict=True)):
            if codec.keeps_levels and good[i]:
                self._kept[place] = levels[i].tobytes()

    @staticmethod
    def _average(prices: Float64, codecs: Sequence[DeepAr]) -> Float32:
        weights = np.stack([codec.mean_weights for codec in codecs])[:, :, None]
        means: Float64 = np.matmul(prices, weights)[:, :, 0]
        for i, codec in enumerate(codecs):
            if codec.tails is not None:  # a tail reaches beyond floor and cap, and the mean with it
                means[i] = codec.tails.bound(means[i])
        return means.astype(np.float32)


def _sort_named(inputs: Inputs, instance: Instance[Any]) -> Instance[Any]:
    """Sort covariates that have names; where these are wrong, there are none then, which is refused alone."""
    if instance.names is None:
        return instance
    try:
        return inputs.sort_named(instance)
    except RequestError:
        return replace(instance, dynamic_feat=[[]], cat=None)


def _explain_failure(outputs: Float32) -> RunFailed:
    """Say why outputs [1, prediction, levels] are no prices."""
    try:
        check_finite("predictions", outputs)
    except RunFailed as failed:
        return failed
    return RunFailed(OVERFLOWS)
