"""DeepAR JSON for one archive: a request's history and covariates to network rows, network quantiles to a forecast.

Contract: CONTRACTS 5, for archives of one product; one JSON object, or JSON Lines with an instance a line. Stamps are
wall-clock times of the archive's `time_zone`, counted without daylight-saving jumps, as DeepAR does. Unknown fields of
an instance are let through, those of `configuration` refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from handlers.base import Float32
from handlers.errors import RequestError, RunFailed
from handlers.tensors import write_json
from model_store.errors import ArchiveInvalid
from model_store.manifest import FLEETCAST_JSON, Channel, Forecast, Scaler

MAX_ROWS = 1024  #: instances in one request
MAX_SAMPLES = 4_000_000  #: numbers in one request's samples
FREQUENCY = re.compile(r"([1-9]\d{0,4})?(s|min|T|h|H|d|D|W)")
SECONDS = {"s": 1, "min": 60, "T": 60, "h": 3600, "H": 3600, "d": 86_400, "D": 86_400, "W": 604_800}
START = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?)?")
PLACE = re.compile(r"(.*) - at `\$\.?(?:instances\[(\d+)\]\.?)?(.*)`", re.DOTALL)

T = TypeVar("T")
Float64 = npt.NDArray[np.float64]
Whole = Annotated[int, Meta(ge=-(2**53), le=2**53)]


class Instance(Struct):
    """One time series and what is known of its future."""

    start: str
    target: list[float | Literal["NaN"] | None]
    cat: list[Whole] | None = None
    dynamic_feat: list[list[float]] | None = None
    item_id: str | Whole | None = None


class Configuration(Struct, forbid_unknown_fields=True):
    """What the answer shall hold. `quantiles` are levels as text, echoed as they came."""

    num_samples: Annotated[int, Meta(ge=1, le=10_000)] = 100
    output_types: tuple[Literal["mean", "quantiles", "samples"], ...] = ("mean", "quantiles")
    quantiles: Annotated[list[str], Meta(min_length=1, max_length=1000)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    joint: bool = False


class Body(Struct):
    """The request."""

    instances: Annotated[list[Instance], Meta(min_length=1, max_length=MAX_ROWS)]
    configuration: Configuration = msgspec.field(default_factory=Configuration)


class Line(Instance):
    """One line of JSON Lines: an instance, and what the answer shall hold where that is not the default."""

    configuration: Configuration = msgspec.field(default_factory=Configuration)


DECODER, LINE_DECODER = msgspec.json.Decoder(Body), msgspec.json.Decoder(Line)

Prediction = dict[str, object]


class Asked(NamedTuple):
    """What one instance wants to know, checked: `levels` by the name they were asked under."""

    configuration: Configuration
    levels: dict[str, float]
    start: str  #: of the first forecast step
    item_id: str | int | None


class DeepAr:
    """One archive's forecast contract, checked once when the archive is loaded."""

    def __init__(self, forecast: Forecast) -> None:
        """Raises ArchiveInvalid for an unknown frequency, or a channel scaler where the archive's own applies."""
        self._forecast = forecast
        self._step_s = step_seconds(forecast.frequency)
        self._levels = np.array(forecast.quantile_levels)
        self._mean = mean_weights(self._levels)
        for i, channel in enumerate(forecast.inputs):
            if channel.source in ("target", "calendar") and channel.scaler != Scaler():
                what = f"forecast.inputs[{i}].scaler: a {channel.source} channel has none of its own"
                raise ArchiveInvalid(f"{FLEETCAST_JSON}: {what}")

    def __repr__(self) -> str:
        forecast = self._forecast
        return f"<DeepAr {forecast.context_length} -> {forecast.prediction_length} steps of {forecast.frequency}>"

    def decode(self, body: bytes) -> tuple[Float32, Callable[[Float32], bytes]]:
        """The body -> (rows [n, channels, context], finite outputs [n, prediction, levels] -> the answer's body).

        Raises RequestError that names instance and field. The second function raises RunFailed where the prices of an
        output overflow.
        """
        request = _parse(DECODER, body)
        levels = self._check_configuration(request.configuration, len(request.instances))
        rows = self._rows(len(request.instances))
        asked = []
        for i, instance in enumerate(request.instances):
            try:
                start = self._fill(rows[i], instance)
            except RequestError as error:
                raise RequestError(error.message, instance=i, field=error.field) from None
            asked.append(Asked(request.configuration, levels, start, instance.item_id))
        return rows, lambda outputs: write_json({"predictions": self._predictions(asked, outputs)})

    def decode_lines(self, body: bytes) -> tuple[Float32, Callable[[Float32], bytes]]:
        """As `decode` for JSON Lines, an answer a line. A line that cannot be answered has an error for its answer.

        Raises RequestError for no line at all, and for more than MAX_ROWS.
        """
        lines = body.removesuffix(b"\n").split(b"\n", MAX_ROWS)
        if len(lines) > MAX_ROWS or not body.strip():
            raise RequestError(f"a request has 1 to {MAX_ROWS} lines, each an instance")
        rows, asked, errors = self._rows(len(lines)), list[Asked](), dict[int, RequestError]()
        for i, text in enumerate(lines):
            try:
                line = _parse(LINE_DECODER, text)
                levels = self._check_configuration(line.configuration, len(lines))
                start = self._fill(rows[len(asked)], line)
            except RequestError as error:
                errors[i] = error
            else:
                asked.append(Asked(line.configuration, levels, start, line.item_id))

        def encode(outputs: Float32) -> bytes:
            answers = iter(self._each(asked, outputs))
            found = [_error(errors[i]) if i in errors else next(answers) for i in range(len(lines))]
            return b"".join(write_json(each) + b"\n" for each in found)

        return rows[: len(asked)], encode

    def _each(self, asked: Sequence[Asked], outputs: Float32) -> Iterator[Prediction]:
        """Predictions of instances with configurations of their own; one that fails is an error by itself."""
        for i, one in enumerate(asked):
            try:
                yield from self._predictions([one], outputs[i : i + 1])
            except RunFailed as failed:
                yield {"error": {"code": "model_failed", "message": str(failed)}}

    def _rows(self, count: int) -> Float32:
        return np.empty((count, len(self._forecast.inputs), self._forecast.context_length), np.float32)

    def _check_configuration(self, configuration: Configuration, instances: int) -> dict[str, float]:
        """The asked quantile levels by the name they were asked under."""
        trained = self._forecast.quantile_levels
        if configuration.joint:
            message = "joint scenarios need several models in one call; this call names one"
            raise RequestError(message, field="configuration.joint")
        if "samples" in configuration.output_types:
            if self._forecast.tail == "none":
                message = "the archive has no tail rule (`tail` is none), without which it cannot be sampled"
                raise RequestError(message, field="configuration.output_types")
            numbers = configuration.num_samples * instances * self._forecast.prediction_length
            if numbers > MAX_SAMPLES:
                message = f"{numbers} numbers of samples are more than {MAX_SAMPLES}; ask for fewer"
                raise RequestError(message, field="configuration.num_samples")
        if configuration.quantiles is None:
            return {str(level): level for level in trained}
        return {text: _level(text, trained) for text in configuration.quantiles}

    def _fill(self, row: Float32, instance: Instance) -> str:
        """Writes an instance's row [channels, context]; returns the stamp of the first forecast step."""
        forecast = self._forecast
        start, steps = _start(instance.start), len(instance.target)
        short = max(0, forecast.history_length - steps)
        if short and not forecast.pad_context:
            lags = forecast.history_length - forecast.context_length
            needed = f"{forecast.history_length} (a context of {forecast.context_length} and lags of {lags})"
            raise RequestError(f"target has {steps} steps, but the model needs {needed}", field="target")
        first = _first_forecast(start, steps * self._step_s)
        covariates = self._covariates(instance, steps)
        cat = _checked_cat(instance.cat, forecast.cat)
        target = to_network(_filled(instance.target, short, forecast.scaler.center), forecast.scaler)
        begin = short + steps - forecast.context_length  # of the context, in series that are padded by `short`
        with np.errstate(over="ignore"):
            for values, channel in zip(row, forecast.inputs, strict=True):
                at = begin - channel.lag + channel.shift
                window = slice(at, at + forecast.context_length)
                if channel.source == "target":
                    values[:] = target[window]
                elif channel.source == "dynamic_feat":
                    padded = np.concatenate([np.full(short, channel.scaler.center), covariates[channel.index]])
                    values[:] = to_network(padded[window], channel.scaler)
                elif channel.source == "static":
                    values[:] = to_network(np.array(cat[channel.index], np.float64), channel.scaler)
                else:
                    values[:] = self._calendar(start, at - short, channel)
        if not np.isfinite(row).all():
            raise RequestError("the numbers are too large: scaled for the model they are not finite")
        return first

    def _covariates(self, instance: Instance, steps: int) -> list[Float64]:
        names, sent = self._forecast.dynamic_feat, instance.dynamic_feat or []
        if len(sent) != len(names):
            message = f"the model needs {len(names)} rows{_named(names)}, not {len(sent)}"
            raise RequestError(message, field="dynamic_feat")
        needed = steps + self._forecast.prediction_length
        for i, values in enumerate(sent):
            if len(values) != needed:
                message = f"{len(values)} numbers, but target and prediction have {needed} steps together"
                raise RequestError(message, field=f"dynamic_feat[{i}]")
        return [np.array(values, np.float64) for values in sent]

    def _calendar(self, start: datetime, step: int, channel: Channel) -> Float64:
        """The feature at context_length steps, the first `step` steps after (or before) start."""
        origin = np.datetime64(start, "s").astype(np.int64)
        seconds = origin + (step + np.arange(self._forecast.context_length)) * self._step_s
        return calendar(seconds, channel.feature)

    def _predictions(self, asked: Sequence[Asked], outputs: Float32) -> list[Prediction]:
        """Finite outputs [n, prediction, levels] in network numbers, all asked alike -> what is known of each."""
        prices = self._prices(outputs)
        configuration, levels = asked[0].configuration, asked[0].levels
        kinds = configuration.output_types
        unit = np.eye(len(self._levels))
        weights = np.stack([np.interp(list(levels.values()), self._levels, each) for each in unit])
        quantiles = np.ascontiguousarray((prices @ weights).transpose(0, 2, 1), np.float32)  # [n, asked, prediction]
        means = (prices @ self._mean).astype(np.float32)
        samples = self._samples(prices, configuration) if "samples" in kinds else None
        predictions: list[Prediction] = []
        for i, one in enumerate(asked):
            answer: Prediction = {} if one.item_id is None else {"item_id": one.item_id}
            answer["start"] = one.start
            if "mean" in kinds:
                answer["mean"] = means[i]
            if "quantiles" in kinds:
                answer["quantiles"] = dict(zip(levels, quantiles[i], strict=True))
            if samples is not None:
                answer["samples"] = samples[i]
            predictions.append(answer)
        return predictions

    def _prices(self, outputs: Float32) -> Float64:
        """Network numbers -> prices, sorted by level, within floor and cap. Raises RunFailed beyond float32."""
        prices = from_network(outputs.astype(np.float64), self._forecast.scaler)
        if not (np.abs(prices) <= np.finfo(np.float32).max).all():
            raise RunFailed("the model's output overflows when it is scaled back to prices")
        prices.sort(axis=-1)
        if self._forecast.floor is None and self._forecast.cap is None:
            return prices
        return np.clip(prices, self._forecast.floor, self._forecast.cap)

    def _samples(self, prices: Float64, configuration: Configuration) -> Float32:
        """Draws [n, num_samples, prediction]: the inverse CDF with flat tails; steps are drawn independently."""
        knots = np.concatenate([[0.0], self._levels, [1.0]])
        values = np.concatenate([prices[..., :1], prices, prices[..., -1:]], axis=-1)[:, None]  # [n, 1, P, knots]
        n, steps, _ = prices.shape
        u = np.random.default_rng(configuration.seed).random((n, configuration.num_samples, steps))
        upper = np.searchsorted(knots, u, side="right")
        weight = (u - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
        low = np.take_along_axis(values, (upper - 1)[..., None], -1)[..., 0]
        high = np.take_along_axis(values, upper[..., None], -1)[..., 0]
        return np.asarray(low + weight * (high - low), np.float32)


def step_seconds(frequency: str) -> int:
    """A pandas offset alias of fixed length, such as `5min`, `1h`, `D` -> seconds. Raises ArchiveInvalid."""
    match = FREQUENCY.fullmatch(frequency)
    if match is None:
        what = f"{FLEETCAST_JSON}: forecast.frequency {frequency!r} is not a number and one of {', '.join(SECONDS)}"
        raise ArchiveInvalid(what)
    return int(match[1] or 1) * SECONDS[match[2]]


def mean_weights(levels: Float64) -> Float64:
    """The mean of quantiles q at these levels is q @ weights.

    It is the integral over (0, 1) of the quantile function that is linear between the levels and flat outside them
    (trapezoids between, rectangles at both ends): the tail rule `clamp`, and the plainest choice where there is none.
    """
    knots = np.concatenate([[0.0], levels, [1.0]])
    gaps = np.diff(knots)
    weights = (gaps[:-1] + gaps[1:]) / 2
    weights[0] += gaps[0] / 2
    weights[-1] += gaps[-1] / 2
    return weights


def calendar(seconds: npt.NDArray[np.int64], feature: str) -> Float64:
    """Stamps in seconds since 1970-01-01 -> the feature of each.

    `hour_*`: the time of day, seconds included, as a turn of 24 h; `weekday_*`: the whole day of the week, Monday 0, as
    a turn of 7 days; `year_*`: the whole day of the year, 1 January 0, as a turn of 365.25 days; `weekend`: 1 on
    Saturday and Sunday, else 0.
    """
    days = seconds // 86_400
    weekday = (days + 3) % 7  # 1970-01-01 was a Thursday
    if feature == "weekend":
        return (weekday >= 5).astype(np.float64)  # noqa: PLR2004 - Saturday
    if feature.startswith("hour"):
        turns = seconds % 86_400 / 86_400
    elif feature.startswith("weekday"):
        turns = weekday / 7
    else:
        dates = days.astype("datetime64[D]")
        turns = (dates - dates.astype("datetime64[Y]")).astype(np.int64) / 365.25
    return np.sin(2 * np.pi * turns) if feature.endswith("sin") else np.cos(2 * np.pi * turns)


def to_network(values: Float64, scaler: Scaler) -> Float64:
    """Prices -> network numbers."""
    if scaler.kind == "identity":
        return values
    scaled: Float64 = (values - scaler.center) / scaler.scale
    return np.arcsinh(scaled) if scaler.kind == "asinh" else scaled


def from_network(values: Float64, scaler: Scaler) -> Float64:
    """Network numbers -> prices, the inverse of `to_network`; too large a number becomes infinite."""
    if scaler.kind == "identity":
        return values
    with np.errstate(over="ignore"):
        unscaled = np.sinh(values) if scaler.kind == "asinh" else values
        prices: Float64 = unscaled * scaler.scale + scaler.center
        return prices


def _error(error: RequestError) -> Prediction:
    """A bad line's answer."""
    place = {} if error.field is None else {"field": error.field}
    return {"error": {"code": "bad_request", "message": error.message, **place}}


def _parse(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        match = PLACE.fullmatch(str(error))
        if match is None:
            raise RequestError(str(error)) from error
        message, instance, field = match.groups()
        if re.fullmatch(r"target\[\d+\]", field) and message.endswith("got `array`"):
            field, message = "target", "[D][T] belongs to archives of several products; this one has one: send [T]"
        raise RequestError(
            message, instance=None if instance is None else int(instance), field=field or None
        ) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error


def _start(text: str) -> datetime:
    try:
        if START.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass
    raise RequestError(f"expected YYYY-MM-DD HH:MM:SS without zone, not {text[:40]!r}", field="start")


def _first_forecast(start: datetime, seconds: int) -> str:
    try:
        return (start + timedelta(seconds=seconds)).isoformat(sep=" ", timespec="seconds")
    except OverflowError:
        raise RequestError("the forecast would lie beyond the year 9999", field="start") from None


def _filled(target: list[float | Literal["NaN"] | None], short: int, center: float) -> Float64:
    """The target with `short` steps before it; missing steps take the last known value, before any the center."""
    values = np.full(short + len(target), np.nan)
    values[short:] = np.array(target, np.float64)  # None and "NaN" become NaN
    missing = np.isnan(values)
    if missing.any():
        last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(values))))
        values = np.where(last < 0, center, values[last])
    return values


def _checked_cat(cat: list[int] | None, names: Sequence[str]) -> list[int]:
    sent = cat or []
    if len(sent) != len(names):
        raise RequestError(f"the model needs {len(names)} numbers{_named(names)}, not {len(sent)}", field="cat")
    return sent


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _level(text: str, trained: Sequence[float]) -> float:
    try:
        level = float(text)
    except ValueError:
        raise RequestError(f"{text[:40]!r} is not a quantile level", field="configuration.quantiles") from None
    if not trained[0] <= level <= trained[-1]:
        message = f"level {text[:40]} is outside the trained range {trained[0]:g} to {trained[-1]:g}"
        raise RequestError(message, field="configuration.quantiles")
    return level
