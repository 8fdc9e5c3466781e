"""DeepAR JSON for one archive: turns history and covariates into network rows, and network quantiles into a forecast.

Contract: CONTRACTS 5; one JSON object, or JSON Lines with an instance per line. Requests and answers have series
[T] for an archive of one product, [D][T] for one of several; arrays here have an axis D only for the latter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels, BandCalibration, count_seconds, make_calibration
from handlers.codecs.clock import add_offset, find_jumps
from handlers.codecs.deepar_schema import MAX_ROWS, Configuration, DeepArRequest, Instance, RequestReader
from handlers.codecs.features import Filled, FirstStep, Float64, Inputs, from_network, parse_step_seconds
from handlers.codecs.history import UNJUDGED, HistoryReader
from handlers.codecs.marks import NARROW_LEVELS, NO_MARKS, Marks, count_marks
from handlers.codecs.shared_recipe import find_shared_recipe
from handlers.codecs.tails import ExponentialTails, has_narrow_levels
from handlers.codecs.tensors import encode_in_blocks, write_json
from handlers.errors import RequestError, RunFailed
from handlers.work import RequestBudget
from model_store.archives.manifest import ForecastSpec

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_SAMPLES = 4_000_000  #: most numbers in the samples of one request
LEVEL_TOLERANCE = 1e-9  #: how far a level may lie outside the trained range: clients compute 1 - 0.9 and send that
OVERFLOWS = "the model's output overflows when it is scaled back to prices"
NO_TAIL = "the archive has no tail rule (`tail` is none), without which it cannot be sampled"

Prediction = dict[str, object]


def interpolate_prices(low: Float64, high: Float64, weight: Float64) -> Float64:
    """Prices at the fraction `weight` of the way from `low` to `high`.

    Products and sums are rounded monotonically; the bound is needed for weights that are rounded up to one.
    """
    return np.minimum(low + weight * (high - low), high)


class Levels(NamedTuple):
    """Requested quantile levels: each lies at the fraction `weight` between the trained levels `below` and `above`."""

    names: Sequence[str]  #: the levels as requested
    below: npt.NDArray[np.intp]
    above: npt.NDArray[np.intp]
    weight: Float64

    def of(self, prices: Float64) -> Float64:
        """Interpolate sorted quantiles at trained levels [..., levels] to the requested ones [..., asked], sorted."""
        return interpolate_prices(prices[..., self.below], prices[..., self.above], self.weight)


class InstanceRequest(NamedTuple):
    """The checked request of one instance."""

    configuration: Configuration
    levels: Levels
    first: FirstStep
    item_id: str | int | None
    quality: tuple[str, ...] = ()
    fallback: Float64 | None = None  #: prices [prediction, levels] instead of the network's


@dataclass(frozen=True, slots=True)
class Encode:
    """Encodes the outputs of the network as the body of an answer, which has about `numbers` values.

    `answered`: what it has encoded, where the archive keeps that (`DeepAr.keeps_levels`); empty before.
    """

    write: Callable[[Float32], bytes]
    numbers: int
    answered: list[AnsweredLevels]
    marks: Marks = NO_MARKS

    def __call__(self, outputs: Float32) -> bytes:
        """Encode finite outputs [n, *network's]. Raises RunFailed if the prices of an output overflow."""
        return self.write(outputs)


class DeepAr:
    """The forecast contract of one archive, checked once when the archive is loaded."""

    def __init__(
        self,
        forecast: ForecastSpec,
        budget: RequestBudget | None = None,
        calibration: BandCalibration | None = None,
    ) -> None:
        """`budget` refuses requests of too many rows, `calibration` shifts the levels, or the paths by rank.

        Raises ArchiveInvalid if the input recipe cannot be run.
        """
        self._forecast, self._budget = forecast, budget
        self.calibration = calibration  #: what shifts its levels now; `adapt` may replace it
        self._own_calibration = calibration  #: that of the archive
        self.keeps_levels = False  #: whether encoders say what they have answered
        self._reader = RequestReader(forecast.products)
        self._histories = HistoryReader.of(forecast, parse_step_seconds(forecast.frequency))
        self._inputs = Inputs(forecast, self._histories.read if self._histories else None)
        self._trained = np.array(forecast.trained_levels)
        default = forecast.quantile_levels
        self._default = _interpolate_levels([str(level) for level in default], np.array(default), self._trained)
        self._mean, self._tails = compute_mean_weights(self._trained), ExponentialTails.of(forecast)
        if self._tails is not None:
            self._mean = self._tails.shift_mean(self._mean, self._trained)
        self._narrow = has_narrow_levels(self._trained)
        self.packed_bounds = _pack_bounds(forecast, self._tails is not None)  #: as `forecast_groups` reads them
        self.recipe = find_shared_recipe(forecast)  #: what it shares with others; None: its forecasts are single
        products = len(forecast.products)
        self._several = products > 1
        self._by_level = (0, 3, 1, 2) if self._several else (0, 2, 1)
        self._shape = (forecast.prediction_length, *((products,) if self._several else ()), len(self._trained))

    def __repr__(self) -> str:
        forecast = self._forecast
        products = f" of {', '.join(forecast.products)}" if self._several else ""
        lengths = f"{forecast.context_length} -> {forecast.prediction_length} steps of {forecast.frequency}"
        return f"<DeepAr {lengths}{products}>"

    @property
    def forecast(self) -> ForecastSpec:
        """The record of the archive."""
        return self._forecast

    @property
    def inputs(self) -> Inputs:
        """Its input recipe."""
        return self._inputs

    @property
    def histories(self) -> HistoryReader | None:
        """The rules of its histories, if it has any."""
        return self._histories

    @property
    def mean_weights(self) -> Float64:
        """Weights [levels]: a mean is sorted quantiles @ these."""
        return self._mean

    @property
    def tails(self) -> ExponentialTails | None:
        """Its tail rule, if it is `exponential`."""
        return self._tails

    @property
    def is_adaptable(self) -> bool:
        """Whether `adapt` can shift its levels."""
        return make_calibration(self._forecast) is not None

    @property
    def calibration_identity(self) -> str:
        """A name of the archive's own calibration; empty if it has none."""
        return "" if self._own_calibration is None else self._own_calibration.identity

    def adapt(self, offsets: Float32 | None) -> None:
        """Shift levels by these offsets [D?, rows, levels] too, in place of those given before; None: by its own alone.

        Safe while other threads encode: an answer has the offsets of before or after. Only if `is_adaptable`.
        """
        own = self._own_calibration
        if offsets is not None:
            start = make_calibration(self._forecast) if own is None else own
            assert start is not None, "only adaptable archives are adapted"
            own = start.add(offsets)
        self.calibration = own

    def decode(self, body: bytes) -> tuple[Float32, Encode]:
        """Decode a body into rows [n, channels, context] and the encoder of finite outputs [n, *network's].

        Outputs are [n, prediction, levels], or of several products as `ForecastSpec` says. Raises RequestError that
        names instance and field. The encoder raises RunFailed if the prices of an output overflow.
        """
        request = self._reader.body(body)
        return self.decode_instances(request.instances, request.configuration)

    def read_body(self, body: bytes) -> DeepArRequest[Any]:
        """Read a body without checking what the archive needs. Raises RequestError that names instance and field."""
        return self._reader.body(body)

    def decode_instances(
        self, instances: Sequence[Instance[Any]], configuration: Configuration
    ) -> tuple[Float32, Encode]:
        """Decode instances that have been read, see `decode`. A target may be an array of float64, NaN where missing.

        Raises RequestError.
        """
        levels = self.check_configuration(configuration, len(instances))
        rows = self._allocate(len(instances))
        asked, filled = list[InstanceRequest](), list[Filled]()
        for i, instance in enumerate(instances):
            try:
                filled.append(self._inputs.fill(rows[i], instance, configuration.seed))
            except RequestError as error:
                raise RequestError(error.message, instance=i, field=error.field) from None
            asked.append(InstanceRequest(configuration, levels, filled[i].first, instance.item_id))
        asked, answered = self._judge(asked, filled), list[AnsweredLevels]()
        write = lambda outputs: write_json({"predictions": self._predictions(asked, outputs, answered)})  # noqa: E731
        return rows, Encode(write, self._numbers(asked), answered, self._mark(asked))

    def decode_lines(self, body: bytes) -> tuple[Float32, Encode]:
        """Decode JSON Lines, with an answer per line. The answer of a line that cannot be answered is an error.

        Raises RequestError for a body without lines, and for more than MAX_ROWS or the budget allow.
        """
        lines, answered = body.removesuffix(b"\n").split(b"\n", MAX_ROWS), list[AnsweredLevels]()
        if len(lines) > MAX_ROWS or not body.strip():
            raise RequestError(f"a request has 1 to {MAX_ROWS} lines, each an instance")
        rows, asked, errors = self._allocate(len(lines)), list[InstanceRequest](), dict[int, RequestError]()
        filled = list[Filled]()
        for i, text in enumerate(lines):
            try:
                line = self._reader.line(text)
                levels = self.check_configuration(line.configuration, len(lines))
                filled.append(self._inputs.fill(rows[len(asked)], line, line.configuration.seed))
            except RequestError as error:
                errors[i] = error
            else:
                asked.append(InstanceRequest(line.configuration, levels, filled[-1].first, line.item_id))
        asked = self._judge(asked, filled)

        def encode(outputs: Float32) -> bytes:
            answers = iter(self._each(asked, outputs, answered))
            found = [_make_error_prediction(errors[i]) if i in errors else next(answers) for i in range(len(lines))]
            return b"".join(write_json(each) + b"\n" for each in found)

        return rows[: len(asked)], Encode(encode, self._numbers(asked), answered, self._mark(asked))

    def _allocate(self, count: int) -> Float32:
        """Allocate rows [count, channels, context]. Raises RequestError for more than the budget allows."""
        if count > 1 and self._budget is not None:  # one row is within the limits, which the load has checked
            self._budget(count)
        return self._inputs.rows(count)

    def _numbers(self, asked: Sequence[InstanceRequest]) -> int:
        """Estimate the number of values in these answers."""
        series = self._forecast.prediction_length * len(self._forecast.products)
        return series * sum(_numbers_a_step(one) for one in asked)

    def _warn(self, configuration: Configuration) -> tuple[str, ...]:
        """Return the codes of what the answer to a configuration is warned of."""
        drawn = not {"samples", "marginal"}.isdisjoint(configuration.output_types)
        return (NARROW_LEVELS,) if drawn and self._narrow else ()

    def _judge(self, asked: list[InstanceRequest], filled: Sequence[Filled]) -> list[InstanceRequest]:
        """Add to each request what is doubtful in its history, and its fallback."""
        further = None
        if self._histories is not None and filled:
            needed = self._histories.needed
            rows = np.stack([each.history.values[-needed:] for each in filled])
            further = self._histories.judge_rows(rows, [each.first.hour for each in filled])
        for i, each in enumerate(filled):
            codes = each.history.codes
            if further is not None and UNJUDGED.isdisjoint(codes):
                codes = (*codes, *further[i])
            if codes:
                asked[i] = asked[i]._replace(quality=codes, fallback=each.history.fallback)
        return asked

    def _mark(self, asked: Sequence[InstanceRequest]) -> Marks:
        """Count the codes of these answers."""
        quality = count_marks(one.quality for one in asked)
        if not (self._narrow or quality):
            return NO_MARKS
        return Marks(quality, count_marks(self._warn(one.configuration) for one in asked))

    def _each(
        self, asked: Sequence[InstanceRequest], outputs: Float32, answered: list[AnsweredLevels]
    ) -> Iterator[Prediction]:
        """Predict instances with their own configurations; only the failing ones are errors."""
        for i, one in enumerate(asked):
            try:
                yield from self._predictions([one], outputs[i : i + 1], answered)
            except RunFailed as failed:
                yield {"error": {"code": "model_failed", "message": str(failed)}}

    def check_configuration(self, configuration: Configuration, instances: int) -> Levels:
        """Check a configuration and return the requested quantile levels."""
        if configuration.joint:
            message = "joint scenarios need several models in one call, `POST /v1/forecasts`; this call names one"
            raise RequestError(message, field="configuration.joint")
        if "samples" in configuration.output_types:
            paths = self._forecast.paths
            if paths and configuration.num_samples > paths:
                message = f"the archive's network draws {paths} paths; ask for at most so many"
                raise RequestError(message, field="configuration.num_samples")
            if self._forecast.tail == "none" and not paths:
                raise RequestError(NO_TAIL, field="configuration.output_types")
            series = self._forecast.prediction_length * len(self._forecast.products)
            numbers = configuration.num_samples * instances * series
            if numbers > MAX_SAMPLES:
                message = f"{numbers} numbers of samples are more than {MAX_SAMPLES}; ask for fewer"
                raise RequestError(message, field="configuration.num_samples")
        if "marginal" in configuration.output_types and self._forecast.tail == "none" and not self._forecast.paths:
            raise RequestError(NO_TAIL, field="configuration.output_types")
        if configuration.quantiles is None:
            return self._default
        asked = [_parse_level(text, self._trained) for text in configuration.quantiles]
        return _interpolate_levels(configuration.quantiles, np.array(asked), self._trained)

    def _predictions(
        self, asked: Sequence[InstanceRequest], outputs: Float32, answered: list[AnsweredLevels]
    ) -> list[Prediction]:
        """Make predictions of finite outputs [n, *network's] in network numbers, which share one configuration.

        Their levels are added to `answered`, if they are kept.
        """
        drawn = self._prices(outputs, asked)
        prices = np.sort(drawn, axis=-1)
        answered += self._keep_levels(prices, asked)
        configuration, levels = asked[0].configuration, asked[0].levels
        kinds, means, quantiles, samples = configuration.output_types, None, None, None
        if "mean" in kinds:
            means = self._average(prices)
        if "quantiles" in kinds:  # [n, asked, D?, prediction]
            quantiles = levels.of(prices).transpose(self._by_level).astype(np.float32, order="C")
        if "samples" in kinds and self._forecast.paths:
            samples = drawn[..., : configuration.num_samples].transpose(0, 2, 1).astype(np.float32, order="C")
        elif "samples" in kinds:
            samples = self._samples(prices, configuration)
        predictions: list[Prediction] = []
        for i, one in enumerate(asked):
            answer = self._label(one)
            real = one.first.steps  # a clock change repeats steps or leaves some out
            mean, by_level, drawn_samples = (_select_steps(each, i, real) for each in (means, quantiles, samples))
            if mean is not None:
                answer["mean"] = mean
            if by_level is not None:
                answer["quantiles"] = dict(zip(levels.names, by_level, strict=True))
            if drawn_samples is not None:
                answer["samples"] = encode_in_blocks(drawn_samples)
            if "marginal" in kinds:
                price = prices[i] if real is None else prices[i][..., real, :]
                answer["marginal"] = self._marginal(price, one.first)
            predictions.append(answer)
        return predictions

    def _keep_levels(self, prices: Float64, asked: Sequence[InstanceRequest]) -> Iterator[AnsweredLevels]:
        """Give the levels of sorted prices [n, D?, prediction, levels or paths] by all slots of the wall clock.

        Those of paths are at the archive's default levels.
        """
        if not self.keeps_levels:
            return
        given = self._default.of(prices) if self._forecast.paths else prices
        levels = given.astype(np.float32).tobytes()
        size = len(levels) // len(prices)
        for i, one in enumerate(asked):
            start, steps = count_seconds(one.first.stamp), one.first.steps
            if steps is not None and len(steps):  # slots before the first step, which the clock has skipped
                start -= int(steps[0]) * self._inputs.step_s
            yield AnsweredLevels(start, levels[i * size : (i + 1) * size])

    def _label(self, one: InstanceRequest) -> Prediction:
        """Begin a prediction: whose it is, when it begins, and what it is to be doubted for."""
        answer: Prediction = {} if one.item_id is None else {"item_id": one.item_id}
        answer["start"] = one.first.stamp
        answer["time_zone"] = self._forecast.time_zone
        if warnings := self._warn(one.configuration):
            answer["warnings"] = warnings
        if one.quality:
            answer["quality"] = one.quality
        return answer

    def _average(self, prices: Float64) -> Float32:
        """Return the means [n, D?, prediction] of sorted quantiles [n, D?, prediction, levels]."""
        means: Float64 = prices @ self._mean
        if self._tails is not None:  # a tail reaches beyond floor and cap, and the mean with it
            means = self._tails.bound(means)
        return means.astype(np.float32)

    def _marginal(self, prices: Float64, first: FirstStep) -> dict[str, object]:
        """Encode the prices [D?, prediction, levels] of one instance as `handlers.codecs.joint` reads them."""
        values = prices.astype(np.float32).reshape(-1, *prices.shape[-2:])
        products = {"products": self._forecast.products} if self._several else {}
        zone, step_s = self._forecast.time_zone, self._inputs.step_s
        clock: dict[str, object] = {"start": add_offset(first.stamp, zone), "step_s": step_s}
        if jumps := find_jumps(first.stamp, zone, step_s, prices.shape[-2]):
            clock["jumps"] = jumps
        tails = {} if self._tails is None else {"tails": self._tails}
        return {"levels": self._trained, "values": values, **clock, **products, **tails}

    def _prices(self, outputs: Float32, asked: Sequence[InstanceRequest]) -> Float64:
        """Turn network numbers into prices [n, D?, prediction, levels or paths], calibrated, within floor and cap.

        Deviations become prices before all else, so that floor, cap and calibration are about prices. Raises RunFailed
        beyond float32.
        """
        forecast = self._forecast
        numbers = outputs.astype(np.float64).reshape(len(outputs), *self._shape)
        if self._several:
            scaled = [from_network(numbers[:, :, d], scaler) for d, scaler in enumerate(forecast.product_scalers)]
            prices = np.stack(scaled, axis=1)
        else:
            prices = from_network(numbers, forecast.scaler)
        if forecast.residual_to:
            prices = prices + np.stack([one.first.base for one in asked if one.first.base is not None])[..., None]
        calibration = self.calibration  # which `adapt` may replace meanwhile
        if not (np.abs(prices) <= FLOAT32_MAX / (1 if calibration is None else calibration.growth)).all():
            raise RunFailed(OVERFLOWS)
        if calibration is not None:  # it has learnt from sorted prices within floor and cap
            prices, starts = self._clip(prices), [one.first.stamp for one in asked]
            if forecast.paths:
                prices = calibration.shift_paths(prices, starts)
            else:
                prices.sort(axis=-1)  # they are this call's own: `from_network` and `clip` make new arrays
                prices = calibration.shift(prices, starts)
        for place, one in enumerate(asked):
            if one.fallback is not None:
                prices[place] = one.fallback if one.first.base is None else one.fallback + one.first.base[:, None]
        return self._clip(prices)

    def _clip(self, prices: Float64) -> Float64:
        forecast = self._forecast
        if forecast.floor is None and forecast.cap is None:
            return prices
        return np.clip(prices, forecast.floor, forecast.cap)

    def _samples(self, prices: Float64, configuration: Configuration) -> Float32:
        """Draw samples [n, num_samples, D?, prediction] by the inverse CDF with its tail rule, independently."""
        knots = np.concatenate([[0.0], self._trained, [1.0]])
        values = np.concatenate([prices[..., :1], prices, prices[..., -1:]], axis=-1)[:, None]  # [n, 1, D?, P, knots]
        n, *series = prices.shape[:-1]
        u = np.random.default_rng(configuration.seed).random((n, configuration.num_samples, *series))
        found = np.empty(u.shape, np.float32)
        for i in range(n):  # one instance at a time, because the copies below would take 200 MB for 16 instances
            upper = np.searchsorted(knots, u[i], side="right")
            weight = (u[i] - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
            low = np.take_along_axis(values[i], (upper - 1)[..., None], -1)[..., 0]
            high = np.take_along_axis(values[i], upper[..., None], -1)[..., 0]
            drawn = low + weight * (high - low)
            found[i] = drawn if self._tails is None else self._extend(drawn, u[i], prices[i], self._tails)
        return found

    def _extend(self, drawn: Float64, u: Float64, prices: Float64, tails: ExponentialTails) -> Float64:
        """Move samples [S, D?, P] drawn at u outside the levels to where the tail rule has them."""
        first, last = float(self._trained[0]), float(self._trained[-1])
        widths = np.broadcast_to(tails.measure_widths(prices), u.shape)
        under, over = u < first, u > last
        drawn[under] -= tails.reach_below(widths[under], u[under], first)
        drawn[over] += tails.reach_above(widths[over], u[over], last)
        return tails.bound(drawn)


def compute_mean_weights(levels: Float64) -> Float64:
    """Return weights such that q @ weights is the mean of quantiles q at these levels.

    The mean is the integral over (0, 1) of the quantile function that is linear between levels and flat outside them
    (trapezoids between, rectangles at both ends): the tail rule `clamp`, and the simplest choice without a rule.
    """
    knots = np.concatenate([[0.0], levels, [1.0]])
    gaps = np.diff(knots)
    weights = (gaps[:-1] + gaps[1:]) / 2
    weights[0] += gaps[0] / 2
    weights[-1] += gaps[-1] / 2
    return weights


def _select_steps(numbers: Float32 | None, at: int, real: npt.NDArray[np.intp] | None) -> Float32 | None:
    """The numbers [..., prediction] of one instance, of its real steps alone where a clock has changed."""
    if numbers is None or real is None:
        return None if numbers is None else numbers[at]
    return np.take(numbers[at], real, -1)


def _numbers_a_step(asked: InstanceRequest) -> int:
    samples = asked.configuration.num_samples if "samples" in asked.configuration.output_types else 0
    return samples + len(asked.levels.names)


def _pack_bounds(forecast: ForecastSpec, has_tails: bool) -> bytes:
    """Center and scale of the first product, floor, cap and whether there are tails, as float64.

    One object, because a call for a thousand models reads that of each.
    """
    floor = -np.inf if forecast.floor is None else forecast.floor
    cap = np.inf if forecast.cap is None else forecast.cap
    return np.array([forecast.scaler.center, forecast.scaler.scale, floor, cap, has_tails]).tobytes()


def _make_error_prediction(error: RequestError) -> Prediction:
    """Make the answer of a faulty line."""
    place = {} if error.field is None else {"field": error.field}
    return {"error": {"code": "bad_request", "message": error.message, **place}}


def _parse_level(text: str, trained: Float64) -> float:
    try:
        level = float(text)
    except ValueError:
        raise RequestError(f"{text[:40]!r} is not a quantile level", field="configuration.quantiles") from None
    nearest = min(max(level, float(trained[0])), float(trained[-1]))
    if not abs(level - nearest) <= LEVEL_TOLERANCE:  # NaN is outside as well
        message = f"level {text[:40]} is outside the trained range {trained[0]:g} to {trained[-1]:g}"
        raise RequestError(message, field="configuration.quantiles")
    return nearest


def _interpolate_levels(names: Sequence[str], asked: Float64, trained: Float64) -> Levels:
    """Locate the requested levels, which lie within the trained range, among the trained ones."""
    below = np.searchsorted(trained, asked, side="right") - 1
    above = np.minimum(below + 1, len(trained) - 1)
    gap = trained[above] - trained[below]
    weight = np.divide(asked - trained[below], gap, out=np.zeros(len(asked)), where=gap > 0)
    return Levels(names, below, above, weight)
