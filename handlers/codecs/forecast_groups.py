"""Decodes and encodes the forecasts of one call together: one set of array operations for all models alike. No torch.

A market's tick shares its stamps, so that what follows from them is found once: checks of the start, calendar
features, the requested levels. Histories are scaled, quantiles sorted, shifted and averaged as arrays over all models.
Whatever is not regular (gaps, doubtful histories, instants with an offset, several products, samples, covariates of a
wrong length) is left to `DeepAr`, item by item, which also words every error.

INVARIANT: an answer has the numbers that `DeepAr` gives for the same request alone: the same operations in the same
order, only over more rows. `tests/handlers/codecs/test_forecast_groups.py` compares them.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels, BandCalibration, count_seconds
from handlers.codecs.deepar import FLOAT32_MAX, OVERFLOWS, DeepAr, Levels, interpolate_prices
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.features import FirstStep, Float64, Inputs
from handlers.codecs.history import measure_courses
from handlers.codecs.sorted_levels import SortedLevels, sort_levels
from handlers.codecs.tensors import Place, check_finite
from handlers.errors import RequestError, RunFailed

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]


class ForecastColumns(NamedTuple):
    """Forecasts of a call as columns: targets [n, T], further series [n, steps] each, and categories [n, categories].

    `names`: of the series, then of the categories.
    """

    starts: Sequence[str]
    item_ids: Sequence[str | None]
    target: Float64
    series: Sequence[Float64]
    cats: npt.NDArray[np.int64]
    names: Sequence[str]

    def read_instance(self, at: int) -> Instance[Any]:
        """One of them by itself."""
        features: Any = [each[at] for each in self.series] or None
        cat = [int(each) for each in self.cats[at]] or None
        return Instance(
            self.starts[at], self.target[at], cat, features, self.item_ids[at], names=list(self.names) or None
        )


class GroupNumbers(NamedTuple):
    """The numbers of answers that were computed together: `means` [n, prediction], `quantiles` [n, prediction, levels].

    None where not asked. `failures`: why those at these places have none.
    """

    start: str
    means: Float32 | None
    quantiles: Float32 | None
    failures: dict[int, RunFailed]


class GroupEncode(Struct, eq=False, gc=False):  # made in a tenth of the time that a frozen dataclass takes
    """Stands for the encoder of one forecast of a group that is taken out of its block.

    `answered`: a list where the archive keeps the levels that it answers.
    """

    group: "ForecastGroup"
    at: int
    answered: list[AnsweredLevels] | tuple[()] = ()


def select_places(places: Sequence[int]) -> Any:
    """An index of these places: a slice, which copies nothing, where they follow each other."""
    if isinstance(places, range):
        return slice(places.start, places.stop)
    first, last = places[0], places[-1]
    return slice(first, last + 1) if list(places) == list(range(first, last + 1)) else list(places)


def encode_group(encoders: Sequence[GroupEncode], outputs: Float32) -> GroupNumbers:
    """Make the numbers of answers of outputs [n, prediction, levels], one for each encoder, all of one group."""
    group = encoders[0].group
    numbers = group.compute_answers(np.array([each.at for each in encoders]), outputs)
    if group.keeps_levels:
        for each in encoders:
            assert isinstance(each.answered, list), "its group keeps levels"
            each.answered.extend(group.take_levels(each.at))
    return numbers


class ForecastGroup:
    """Forecasts of one recipe, start and length. It is decoded once, and encoded in as many parts as it runs in."""

    def __init__(self, codecs: Sequence[DeepAr], configuration: Configuration) -> None:
        self._codecs, self._configuration = codecs, configuration
        self._first = codecs[0]  #: its recipe is everybody's
        self._channels = self._first.forecast.inputs
        self._kind = self._first.forecast.scaler.kind
        bounds = np.frombuffer(b"".join([codec.packed_bounds for codec in codecs])).reshape(-1, 5).T
        self._centers, self._scales = np.ascontiguousarray(bounds[:2])[..., None]
        self._floors, self._caps = bounds[2:4, :, None, None]
        self._is_bounded = bool(np.isfinite(bounds[2:4]).any())
        self._has_tails = bool(bounds[4].any())
        self._levels: Levels
        self.keeps_levels = True in [codec.keeps_levels for codec in codecs]
        self.stamp = ""  #: of the first forecast step
        self.everyone: Places = np.arange(len(codecs))  #: the places of all
        self._item_ids: Sequence[str | int | None] = ()
        self._kept: dict[int, bytes] = {}
        self.numbers = 0  #: about the number of values in one answer

    def __repr__(self) -> str:
        """For example `<ForecastGroup of 1000 forecasts from 2026-01-14 00:00:00>`."""
        return f"<ForecastGroup of {len(self._codecs)} forecasts from {self.stamp}>"

    @property
    def names(self) -> Sequence[str]:
        """The requested levels."""
        return self._levels.names

    def get_zone(self, at: int) -> str:
        """The time zone of a forecast."""
        return self._codecs[at].forecast.time_zone

    def get_item_id(self, at: int) -> str | int | None:
        """What the client calls a forecast's series."""
        return self._item_ids[at]

    # --- requests ---------------------------------------------------------------------------------------------------

    def decode(self, instances: Sequence[Instance[Any]], place: Place | None = None) -> "DecodedGroup | None":
        """Decode all; None where nothing is regular."""
        steps = len(instances[0].target)
        instances = [_sort_named(self._first.inputs, each) for each in instances]
        if (started := self._start(instances[0].start, steps)) is None:
            return None
        regular, covariates, categories = self._check_lengths(instances, steps)
        history = np.empty((len(instances), steps))
        for row, each in zip(history, instances, strict=True):
            row[:] = np.asarray(each.target, np.float64)
        item_ids = [each.item_id for each in instances]
        return self._decode_arrays(started, _Arrays(history, covariates, categories, item_ids), regular, place)

    def decode_columns(
        self, columns: ForecastColumns, places: Sequence[int], place: Place | None = None
    ) -> "DecodedGroup | None":
        """Decode the forecasts at these places of a call's columns; None where nothing is regular."""
        sorted_columns = _sort_columns(self._first, columns)
        started = self._start(columns.starts[places[0]], columns.target.shape[1])
        if sorted_columns is None or started is None:
            return None
        series, cats = sorted_columns
        where = select_places(places)
        needed = columns.target.shape[1] + self._first.forecast.prediction_length
        covariates = np.zeros((len(places), 0, 0))
        if series:
            if any(each.shape[1] != needed for each in series):
                return None
            covariates = np.stack([each[where] for each in series], axis=1).astype(np.float64, copy=False)
        history = columns.target[where].astype(np.float64, copy=False)
        item_ids = columns.item_ids[where] if isinstance(where, slice) else [columns.item_ids[i] for i in where]
        arrays = _Arrays(history, covariates, cats[where], item_ids)
        return self._decode_arrays(started, arrays, np.ones(len(places), bool), place)

    def _start(self, start: str, steps: int) -> tuple[datetime, FirstStep] | None:
        """Check what all share; None where it is not regular, or wrong."""
        try:
            found = self._first.inputs.start_regular(start, steps)
            self._levels = self._first.check_configuration(self._configuration, 1)
        except RequestError:
            return None
        self.numbers = self._first.forecast.prediction_length * (1 + len(self._levels.names))
        return found

    def _decode_arrays(
        self, started: "tuple[datetime, FirstStep]", arrays: "_Arrays", regular: Flags, place: Place | None
    ) -> "DecodedGroup":
        """Make the rows of all, at their place; of those that are not regular they may be anything.

        Where the place has no room for the first steps of the context these are only checked.
        """
        moment, first = started
        self.stamp, self._item_ids = first.stamp, arrays.item_ids
        history, inputs = arrays.history, self._first.inputs
        count, steps = history.shape
        regular &= self._find_regular_histories(history, first.hour)
        rows = inputs.rows(count) if place is None else place(count)
        context, kept = self._first.forecast.context_length, rows.shape[2]
        origin = count_seconds(moment.isoformat())
        with np.errstate(over="ignore", invalid="ignore"):
            regular &= self._find_scalable(history)
            for c, channel in enumerate(self._channels):
                at = steps - context - channel.lag + channel.shift
                window = slice(at, at + context)
                if channel.source == "calendar":  # whose features are finite
                    rows[:, c] = inputs.compute_calendar(origin, at, channel)[-kept:]
                    continue
                if channel.source == "target":
                    some = history[:, window.stop - kept : window.stop]
                    rows[:, c] = self._scale(some, self._centers, self._scales, self._kind)
                    continue
                if channel.source == "dynamic_feat":
                    numbers = self._scale_channel(arrays.covariates[:, channel.index, window], c)
                else:
                    numbers = self._scale_channel(arrays.categories[:, channel.index, None], c)
                rows[:, c] = numbers[:, -kept:]
                regular &= _are_finite_as_float32(numbers)
        return DecodedGroup(rows, regular)

    def _find_scalable(self, history: Float64) -> Flags:
        """Find the histories [n, T] whose numbers are all known, and finite once they are scaled and float32.

        Scaling and rounding are monotone, so that the largest and the smallest number of a history say it.
        """
        largest = max(abs(float(history.max())), abs(float(history.min())))
        if self._most_scaled(largest) <= FLOAT32_MAX / 2:  # as mostly; NaN is not
            return np.ones(len(history), bool)
        extremes = np.stack([history.max(axis=1), history.min(axis=1)], axis=1)
        scaled = self._scale(extremes, self._centers, self._scales, self._kind).astype(np.float32)
        found: Flags = np.all(np.isfinite(scaled), axis=1)
        return found

    def _most_scaled(self, number: float) -> float:
        """The largest that a number of at most this size may become in any model's units, before any arcsinh."""
        if self._kind == "identity":
            return number
        return float((number + np.abs(self._centers).max()) / np.abs(self._scales).min())

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
        scaled: Float64 = values - centers
        scaled /= scales
        return np.arcsinh(scaled, out=scaled) if kind == "asinh" else scaled

    def _scale_channel(self, values: Float64, place: int) -> Float64:
        """Scale the numbers [n, T] of a channel that has scalers of its own."""
        scalers = [codec.forecast.inputs[place].scaler for codec in self._codecs]
        centers, scales = (np.array([getattr(each, name) for each in scalers])[:, None] for name in ("center", "scale"))
        return self._scale(values, centers, scales, scalers[0].kind)

    def _find_regular_histories(self, history: Float64, first_hour: int) -> Flags:
        """Find the histories [n, T] that have nothing doubtful; those that lack values may be anything."""
        regular = np.ones(len(history), bool)
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

    def compute_answers(self, places: Places, outputs: Float32) -> GroupNumbers:
        """Make the answers of the forecasts at `places` from the network's outputs [n, prediction, levels]."""
        is_whole = places is self.everyone
        codecs = self._codecs if is_whole else [self._codecs[i] for i in places.tolist()]
        where = slice(None) if is_whole else places
        numbers = outputs.astype(np.float64)
        calibrations = [codec.calibration for codec in codecs]  # `adapt` may replace one meanwhile
        is_shifted = any(calibrations)
        with np.errstate(over="ignore", invalid="ignore"):
            prices = self._unscale(numbers, where)
        good = _find_prices(prices, calibrations if is_shifted else ())
        prices = self._bound(prices, where)
        if is_shifted:
            prices = self._bound(self._shift(prices, calibrations), where)
        ordered = sort_levels(prices)
        if self.keeps_levels:
            self._keep_levels(places, codecs, prices, good)
        kinds = self._configuration.output_types
        means = self._average(prices, codecs) if "mean" in kinds else None
        quantiles = _pick_levels(self._levels, ordered) if "quantiles" in kinds else None
        failures = {i: _explain_failure(outputs[i : i + 1]) for i in np.flatnonzero(~good).tolist()}
        return GroupNumbers(self.stamp, means, quantiles, failures)

    def _bound(self, prices: Float64, where: Places | slice) -> Float64:
        """Keep prices between floor and cap, of those that have one."""
        return np.clip(prices, self._floors[where], self._caps[where]) if self._is_bounded else prices

    def take_levels(self, at: int) -> Iterator[AnsweredLevels]:
        """Give the levels that a forecast was answered with, once, where its archive keeps them."""
        levels = self._kept.pop(at, None)
        if levels is not None:
            yield AnsweredLevels(count_seconds(self.stamp), levels)

    def _unscale(self, numbers: Float64, where: Places | slice) -> Float64:
        """As `features.from_network`, with a scaler for each forecast, in place."""
        if self._kind == "identity":
            return numbers
        if self._kind == "asinh":
            np.sinh(numbers, out=numbers)
        numbers *= self._scales[where][:, :, None]
        numbers += self._centers[where][:, :, None]
        return numbers

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

    def _average(self, prices: Float64, codecs: Sequence[DeepAr]) -> Float32:
        if self._has_tails:
            weights = np.stack([codec.mean_weights for codec in codecs])[:, :, None]
        else:  # one recipe has one rule then
            weights = codecs[0].mean_weights[None, :, None]
        means: Float64 = np.matmul(prices, weights)[:, :, 0]
        for i, codec in enumerate(codecs if self._has_tails else ()):
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


class _Arrays(NamedTuple):
    """What a group is decoded from: histories [n, T], covariates [n, series, steps] and categories [n, categories]."""

    history: Float64
    covariates: Float64
    categories: Float64
    item_ids: Sequence[str | int | None]


def _sort_columns(codec: DeepAr, columns: ForecastColumns) -> tuple[list[Float64], Float64] | None:
    """Series and categories in the order of the archive; None where they are not its own."""
    forecast = codec.forecast
    if sorted(columns.names) != sorted((*forecast.dynamic_feat, *forecast.cat)):
        return None
    series = dict(zip(columns.names, columns.series, strict=False))
    cats = {name: i for i, name in enumerate(columns.names[len(columns.series) :])}
    if not all(name in series for name in forecast.dynamic_feat) or not all(name in cats for name in forecast.cat):
        return None
    places = [cats[name] for name in forecast.cat]
    return [series[name] for name in forecast.dynamic_feat], columns.cats[:, places].astype(np.float64)


def _pick_levels(levels: Levels, ordered: SortedLevels) -> Float32:
    """The requested levels [n, prediction, asked], as `Levels.of` computes them."""
    columns, has_zeros = ordered
    found = np.empty((len(levels.names), *columns[0].shape), np.float32)
    for row, below, above, weight in zip(found, levels.below, levels.above, levels.weight, strict=True):
        low, high = columns[below], columns[above]
        if weight or has_zeros:  # else nothing would change: a sum with zero changes the sign of a zero alone
            low = interpolate_prices(low, high, weight)
        row[...] = low
    return found.transpose(1, 2, 0)


def _find_prices(prices: Float64, calibrations: Sequence[BandCalibration | None]) -> Flags:
    """Whose numbers [n, prediction, levels] are prices, also when they are shifted; the others' become zero."""
    if not calibrations and prices.min() >= -FLOAT32_MAX and prices.max() <= FLOAT32_MAX:  # as mostly; NaN is not
        return np.ones(len(prices), bool)
    growth = np.ones(len(prices))
    growth[: len(calibrations)] = [1.0 if each is None else each.growth for each in calibrations]
    found: Flags = np.all(np.abs(prices) <= FLOAT32_MAX / growth[:, None, None], axis=(1, 2))
    prices[~found] = 0.0
    return found


class DecodedGroup(NamedTuple):
    """The rows of a group, and which of them are regular."""

    rows: Float32
    regular: Flags


def _are_finite_as_float32(numbers: Float64) -> Flags:
    """Whose numbers [n, T] are finite as float32: the largest and the smallest say it, because rounding is monotone.

    NaN is passed on by both.
    """
    if np.isfinite(np.array([numbers.max(), numbers.min()], np.float32)).all():  # as mostly
        return np.ones(len(numbers), bool)
    extremes = np.stack([numbers.max(axis=1), numbers.min(axis=1)]).astype(np.float32)
    finite: Flags = np.all(np.isfinite(extremes), axis=0)
    return finite


def _explain_failure(outputs: Float32) -> RunFailed:
    """Say why outputs [1, prediction, levels] are no prices."""
    try:
        check_finite("predictions", outputs)
    except RunFailed as failed:
        return failed
    return RunFailed(OVERFLOWS)
