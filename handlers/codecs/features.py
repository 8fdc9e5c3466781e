"""Fills the input channels of a network with history, covariates and calendar, by the recipe `inputs`. No torch.

Stamps are wall-clock times of the archive's `time_zone`, counted without daylight-saving jumps, as DeepAR does. A
`start` with an offset is a real instant, and the series are then real steps: `handlers.codecs.clock` places them.
"""

import re
from calendar import day_name
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.clock import (
    EPOCH,
    Int64,
    SlotPlan,
    ZoneUnknown,
    average_slots,
    fill_skipped,
    find_zone,
    format_instant,
    plan_slots,
)
from handlers.codecs.deepar_schema import Instance, Numbers, parse_start, quote_names
from handlers.codecs.gaps import EMPTY, History, complete_plainly
from handlers.errors import RequestError
from model_store.archives.manifest import FLEETCAST_JSON, ForecastSpec, InputChannel, Scaler
from model_store.errors import ArchiveInvalid

FREQUENCY = re.compile(r"([1-9]\d{0,4})?(s|min|T|h|H|d|D|W)")
DAYS = tuple(day.lower() for day in day_name)  #: the first weekday is Monday
DAY, HOUR, MINUTE = 86_400, 3600, 60
KEPT_FEATURES, KEPT_STEPS = 512, 2048  #: calendar features that are kept, and the most steps of one: 8 MB in all
MOST_BASE = 1e30  #: largest number that a forecast is added to: beyond it the sum may be no float32
SECONDS = {"s": 1, "min": 60, "T": 60, "h": 3600, "H": 3600, "d": 86_400, "D": 86_400, "W": 604_800}

Float64 = npt.NDArray[np.float64]


#: Takes a history with NaN for what is missing, its steps that were not sent, and the hour of the first forecast step.
ReadHistory = Callable[[Float64, int, int], History]


class FirstStep(NamedTuple):
    """When a forecast begins: the stamp of its first step, and which of its slots each real step takes (None: all).

    `base` [prediction] is added to the forecast of each slot: what it is a deviation from, if it is one.
    """

    stamp: str
    steps: Int64 | None = None
    base: Float64 | None = None

    @property
    def hour(self) -> int:
        """The hour of the day."""
        return int(self.stamp[11:13])


class Filled(NamedTuple):
    """What came of an instance: when its forecast begins, and its history. `history` is that of the first product."""

    first: FirstStep
    history: History


class PlacedSeries(NamedTuple):
    """The series of an instance on the slots of the archive's wall clock, from `start` on, and when it goes on."""

    start: datetime
    series: Sequence[Numbers | Float64]  #: by product [T]
    covariates: Sequence[Float64] | None  #: [K][T + prediction]; None: not read yet
    first: FirstStep


class Inputs:
    """The input recipe of one archive, checked once when the archive is loaded."""

    def __init__(self, forecast: ForecastSpec, read: ReadHistory | None = None) -> None:
        """`read` judges and completes histories; without it, what is missing takes the last known value.

        Raises ArchiveInvalid for an unknown frequency, or a scaler of a target or calendar channel.
        """
        self._forecast, self._read = forecast, read
        self.step_s = parse_step_seconds(forecast.frequency)
        self._history_length = forecast.history_length
        self._scalers = forecast.product_scalers
        self._base = forecast.dynamic_feat.index(forecast.residual_to) if forecast.residual_to else None
        for i, channel in enumerate(forecast.inputs):
            if channel.source in ("target", "calendar") and channel.scaler != Scaler():
                what = f"forecast.inputs[{i}].scaler: a {channel.source} channel has none of its own"
                raise ArchiveInvalid(f"{FLEETCAST_JSON}: {what}")

    def rows(self, count: int) -> Float32:
        """Allocate rows [count, channels, context], not yet filled."""
        return np.empty((count, len(self._forecast.inputs), self._forecast.context_length), np.float32)

    def fill(self, row: Float32, instance: Instance[Any], seed: int | None = None) -> Filled:
        """Write the row [channels, context] of an instance; returns when its forecast begins, and its history.

        Without a seed, a network that samples uses seed 0.

        Raises RequestError that names the field.
        """
        forecast = self._forecast
        instance = self.sort_named(instance)
        moment = parse_start(instance.start)
        self._check_grid(moment)
        if moment.tzinfo is not None:
            start, series, covariates, first = self._place_real_steps(moment, instance)
            steps = len(series[0])
            short = self._short(steps)
        else:
            start, series = moment, self._series(instance)
            steps = len(series[0])
            short = self._short(steps)
            first = FirstStep(_first_forecast(start, steps * self.step_s))
            covariates = None
        self._check_origin(first, start, steps)
        if covariates is None:
            covariates = self._covariates(instance, steps + forecast.prediction_length)
        cat = self._cat(instance)
        if self._base is not None:
            series, first = self._subtract_base(series[0], covariates[self._base], first)
        histories = [
            self._read_history(numbers, short, scaler.center, first)
            for numbers, scaler in zip(series, self._scalers, strict=True)
        ]
        targets = [to_network(each.values, scaler) for each, scaler in zip(histories, self._scalers, strict=True)]
        origin = count_wall_seconds(start)
        begin = short + steps - forecast.context_length  # of the context, in series that are padded by `short`
        with np.errstate(over="ignore"):
            for values, channel in zip(row, forecast.inputs, strict=True):
                at = begin - channel.lag + channel.shift
                window = slice(at, at + forecast.context_length)
                if channel.source == "target":
                    values[:] = targets[channel.product][window]
                elif channel.source == "dynamic_feat":
                    values[:] = _cut_covariate(covariates[channel.index], short, window, channel.scaler)
                elif channel.source == "static":
                    values[:] = to_network(np.array(cat[channel.index], np.float64), channel.scaler)
                elif channel.source == "seed":
                    values[:] = 0.0
                    values[:2] = make_seed_numbers(seed, instance.item_id)[: len(values)]
                else:
                    values[:] = self.compute_calendar(origin, at - short, channel)
        if not np.isfinite(row).all():
            raise RequestError("the numbers are too large: scaled for the model they are not finite")
        codes = tuple(dict.fromkeys(code for each in histories for code in each.codes))
        return Filled(first, histories[0]._replace(codes=codes))

    def sort_named(self, instance: Instance[Any]) -> Instance[Any]:
        """Bring the covariates and categories of an instance into the archive's order, by their names.

        Raises RequestError for names that are not the archive's.
        """
        if instance.names is None:
            return instance
        forecast, asked = self._forecast, instance.names
        known = (*forecast.dynamic_feat, *forecast.cat)
        rows = [*(instance.dynamic_feat or []), *(instance.cat or [])]
        if sorted(known) != sorted(asked) or len(rows) != len(asked):
            message = f"the model needs the columns{quote_names(known) or ' of no covariates'}, not{quote_names(asked)}"
            raise RequestError(message, field="dynamic_feat")
        by_name = dict(zip(asked, rows, strict=True))
        series, numbers = ([by_name[name] for name in names] for names in (forecast.dynamic_feat, forecast.cat))
        return replace(instance, dynamic_feat=series or None, cat=numbers or None, names=None)

    def start_regular(self, text: str, steps: int) -> tuple[datetime, FirstStep] | None:
        """Check a start without an offset and a history that needs no padding; None for others.

        Raises RequestError, as `fill` does.
        """
        moment = parse_start(text)
        if moment.tzinfo is not None or steps < self._history_length:
            return None
        self._check_grid(moment)
        first = FirstStep(_first_forecast(moment, steps * self.step_s))
        self._check_origin(first, moment, steps)
        return moment, first

    def _read_history(self, target: Numbers | Float64, short: int, center: float, first: FirstStep) -> History:
        """Judge and complete the history of a product, with `short` steps before it that were not sent.

        Raises RequestError where nothing is known and the archive has a rule for it.
        """
        values = np.full(short + len(target), np.nan)
        values[short:] = np.array(target, np.float64)  # None and "NaN" become NaN
        if self._read is None:
            return complete_plainly(values, center)
        found = self._read(values, short, first.hour)
        if EMPTY in found.codes and found.fallback is None:
            raise RequestError(
                "no step of the history has a value, so that there is nothing to forecast from", field="target"
            )
        return found

    def _subtract_base(
        self, numbers: Numbers | Float64, base: Float64, first: FirstStep
    ) -> tuple[Sequence[Float64], FirstStep]:
        """Return the deviations of a history from its covariate, whose further numbers the forecast is added to.

        Raises RequestError for numbers so large that the sum may be none.
        """
        if not (np.abs(base) <= MOST_BASE).all():
            message = f"{self._forecast.residual_to} has numbers beyond {MOST_BASE:g}, which are no prices"
            raise RequestError(message, field=f"dynamic_feat[{self._base}]")
        steps = len(numbers)
        return [np.array(numbers, np.float64) - base[:steps]], first._replace(base=base[steps:])

    def _place_real_steps(self, moment: datetime, instance: Instance[Any]) -> PlacedSeries:
        """Place the real steps of an instance on the slots of the archive's wall clock. Raises RequestError.

        Where a clock repeats an hour, slots are fewer than steps: a history that is long enough in steps is lengthened
        by its first value.
        """
        forecast, series = self._forecast, self._series(instance)
        steps = len(series[0])
        try:
            zone = find_zone(forecast.time_zone)
            ahead = forecast.prediction_length
            plan = plan_slots(zone, moment, self.step_s, steps, ahead, skipped_first=bool(forecast.origin))
        except ZoneUnknown as error:
            raise RequestError(f"the archive's zone {error}; send `start` without an offset", field="start") from None
        except OverflowError:
            raise RequestError("series and forecast must lie in the years 1 to 9999", field="start") from None
        if not len(plan.steps):
            message = f"the clock of {forecast.time_zone} skips all {ahead} steps of this forecast"
            raise RequestError(message, field="start")
        sent = self._covariates(instance, len(plan.slots), f" of real time in {forecast.time_zone}")
        merged = max(0, self._history_length - plan.history) if steps >= self._history_length else 0
        histories = [_merge_steps(np.array(each, np.float64), plan, plan.history, merged) for each in series]
        slots = plan.history + forecast.prediction_length
        covariates = [fill_skipped(_merge_steps(each, plan, slots, merged)) for each in sent]
        start = EPOCH + timedelta(seconds=plan.start - merged * self.step_s)
        begin = round(moment.timestamp()) + steps * self.step_s
        stamp = _first_forecast(moment.astimezone(zone), steps * self.step_s)
        if self.step_s < DAY:
            stamp = format_instant(begin, zone)
        return PlacedSeries(start, histories, covariates, FirstStep(stamp, plan.steps))

    def _check_grid(self, moment: datetime) -> None:
        """Check that a history may start at this time: steps of an hour have no quarters. Raises RequestError.

        Steps are counted from the archive's time of day, by default from midnight; an instant may lie on the grid of
        the clock it is written in, or of the archive's. Days and longer steps start at any full hour, such as gas days.
        """
        grid = gcd(self.step_s, DAY) if self.step_s < DAY else HOUR
        if grid <= 1 or self._lies_on(moment, grid):
            return
        if moment.tzinfo is not None:
            try:
                if self._lies_on(moment.astimezone(find_zone(self._forecast.time_zone)), grid):
                    return
            except (ZoneUnknown, OverflowError):
                return  # it is refused with more to say where its steps are placed
        first = _format_clock(self._find_phase(grid))
        second = _format_clock(self._find_phase(grid) + grid)
        message = f"the model has steps of {self._forecast.frequency}, which start at {first}, {second} and so on"
        raise RequestError(f"{message}, not at {moment.time().isoformat()}", field="start")

    def _find_phase(self, grid: int) -> int:
        """The seconds after midnight at which a first step begins."""
        hour, _, minute = (self._forecast.origin or "00:00").partition(":")
        return (int(hour) * HOUR + int(minute) * MINUTE) % grid

    def _lies_on(self, moment: datetime, grid: int) -> bool:
        seconds = moment.hour * HOUR + moment.minute * MINUTE + moment.second
        return (seconds - self._find_phase(grid)) % grid == 0

    def _check_origin(self, first: FirstStep, start: datetime, steps: int) -> None:
        """Check that the forecast starts at the archive's time of day, if it has one, on its wall clock.

        Raises RequestError.
        """
        if not self._forecast.origin:
            return
        wall = first.stamp if first.steps is None else _first_forecast(start, steps * self.step_s)
        if wall[11:] != f"{self._forecast.origin}:00":
            what = f"the first forecast step is {wall}, but the model forecasts from {self._forecast.origin} on"
            raise RequestError(f"{what}; send a target that ends before that", field="target")

    def _short(self, steps: int) -> int:
        """Count the missing steps of history, which are padded. Raises RequestError if the archive pads none."""
        needed = self._history_length
        if steps < needed and not self._forecast.pad_context:
            context = self._forecast.context_length
            lengths = f"{needed} (a context of {context} and lags of {needed - context})"
            raise RequestError(f"target has {steps} steps, but the model needs {lengths}", field="target")
        return max(0, needed - steps)

    def _series(self, instance: Instance[Any]) -> Sequence[Numbers]:
        """Return the histories by product, of equal length."""
        if len(self._scalers) == 1:
            return (instance.target,)
        names, series = self._forecast.products, instance.target
        if len(series) != len(names):
            message = f"the model has {len(names)} products{quote_names(names)}: send a row for each, not {len(series)}"
            raise RequestError(message, field="target")
        for i, numbers in enumerate(series):
            if len(numbers) != len(series[0]):
                message = f"{len(numbers)} steps of {names[i]}, but {len(series[0])} of {names[0]}; fill up with null"
                raise RequestError(message, field=f"target[{i}]")
        return list(series)

    def _covariates(self, instance: Instance[Any], needed: int, counted: str = "") -> list[Float64]:
        """Return the rows [K][needed]; `counted` says in words how steps are counted."""
        names, sent = self._forecast.dynamic_feat, instance.dynamic_feat or []
        if len(sent) != len(names):
            message = f"the model needs {len(names)} rows{quote_names(names)}, not {len(sent)}"
            raise RequestError(message, field="dynamic_feat")
        for i, values in enumerate(sent):
            if len(values) != needed:
                message = f"{len(values)} numbers, but target and prediction have {needed} steps{counted} together"
                raise RequestError(message, field=f"dynamic_feat[{i}]")
        return [np.array(values, np.float64) for values in sent]

    def _cat(self, instance: Instance[Any]) -> list[int]:
        names, sent = self._forecast.cat, instance.cat or []
        if len(sent) != len(names):
            raise RequestError(
                f"the model needs {len(names)} numbers{quote_names(names)}, not {len(sent)}", field="cat"
            )
        return sent

    def compute_calendar(self, start: int, step: int, channel: InputChannel) -> Float64:
        """Return the feature at context_length steps, the first of them `step` steps after (or before) start.

        `start` is in seconds since 1970 on the wall clock.
        """
        length = self._forecast.context_length
        return find_calendar_feature(start + step * self.step_s, self.step_s, length, channel.feature)


def _format_clock(seconds: int) -> str:
    """Format seconds after midnight, such as `13:30:00`."""
    return f"{seconds // HOUR:02}:{seconds // MINUTE % 60:02}:{seconds % 60:02}"


def parse_step_seconds(frequency: str) -> int:
    """Parse a pandas offset alias of fixed length, such as `5min`, `1h`, `D`, into seconds. Raises ArchiveInvalid."""
    match = FREQUENCY.fullmatch(frequency)
    if match is None:
        what = f"{FLEETCAST_JSON}: forecast.frequency {frequency!r} is not a number and one of {', '.join(SECONDS)}"
        raise ArchiveInvalid(what)
    return int(match[1] or 1) * SECONDS[match[2]]


def compute_calendar_feature(seconds: npt.NDArray[np.int64], feature: str) -> Float64:
    """Compute a feature of stamps, which are seconds since 1970-01-01.

    `hour_*`: the time of day, seconds included, as a turn of 24 h; `weekday_*`: the whole day of the week, Monday 0, as
    a turn of 7 days; `year_*`: the whole day of the year, 1 January 0, as a turn of 365.25 days; `weekend`: 1 on
    Saturday and Sunday, else 0; `monday` to `sunday`: 1 on that day, else 0.
    """
    days = seconds // 86_400
    weekday = (days + 3) % 7  # 1970-01-01 was a Thursday
    if feature == "weekend":
        return (weekday >= 5).astype(np.float64)  # noqa: PLR2004 - Saturday
    if feature in DAYS:
        that: Float64 = (weekday == DAYS.index(feature)).astype(np.float64)
        return that
    if feature.startswith("hour"):
        turns = seconds % 86_400 / 86_400
    elif feature.startswith("weekday"):
        turns = weekday / 7
    else:
        dates = days.astype("datetime64[D]")
        turns = (dates - dates.astype("datetime64[Y]")).astype(np.int64) / 365.25
    return np.sin(2 * np.pi * turns) if feature.endswith("sin") else np.cos(2 * np.pi * turns)


def count_wall_seconds(moment: datetime) -> int:
    """Count the whole seconds from 1970 to a time of a wall clock."""
    since = moment.replace(tzinfo=None) - EPOCH
    return since.days * DAY + since.seconds


def find_calendar_feature(first: int, step_s: int, length: int, feature: str) -> Float64:
    """Return a feature [length] of steps from `first` (seconds since 1970) on; it may not be changed.

    A market's models are asked for the same steps at the same time, and tomorrow for others: what was computed is kept.
    """
    if length > KEPT_STEPS:
        return compute_calendar_feature(first + step_s * np.arange(length), feature)
    return _keep_calendar_feature(first, step_s, length, feature)


@lru_cache(maxsize=KEPT_FEATURES)
def _keep_calendar_feature(first: int, step_s: int, length: int, feature: str) -> Float64:
    found = compute_calendar_feature(first + step_s * np.arange(length), feature)
    found.setflags(write=False)
    return found


def make_seed_numbers(seed: int | None, item_id: str | int | None) -> tuple[int, int]:
    """Return two numbers of 24 bits, which float32 holds exactly; they depend on seed and item."""
    digest = sha256(repr((seed or 0, item_id)).encode()).digest()
    return int.from_bytes(digest[:3]), int.from_bytes(digest[3:6])


def to_network(values: Float64, scaler: Scaler) -> Float64:
    """Turn prices into network numbers."""
    if scaler.kind == "identity":
        return values
    scaled: Float64 = (values - scaler.center) / scaler.scale
    return np.arcsinh(scaled) if scaler.kind == "asinh" else scaled


def from_network(values: Float64, scaler: Scaler) -> Float64:
    """Turn network numbers into prices, the inverse of `to_network`; too large numbers become infinite."""
    if scaler.kind == "identity":
        return values
    with np.errstate(over="ignore"):
        unscaled = np.sinh(values) if scaler.kind == "asinh" else values
        prices: Float64 = unscaled * scaler.scale + scaler.center
        return prices


def _cut_covariate(numbers: Float64, short: int, window: slice, scaler: Scaler) -> Float64:
    """Return a part of a covariate, with `short` steps of its center before it, in network numbers."""
    return to_network(np.concatenate([np.full(short, scaler.center), numbers])[window], scaler)


def _first_forecast(start: datetime, seconds: int) -> str:
    try:
        return (start + timedelta(seconds=seconds)).isoformat(sep=" ", timespec="seconds")
    except OverflowError:
        raise RequestError("the forecast would lie beyond the year 9999", field="start") from None


def _merge_steps(values: Float64, plan: SlotPlan, count: int, before: int) -> Float64:
    """Average real steps by slot [count], with `before` copies of the first slot before them."""
    merged = average_slots(values, plan.slots[: len(values)], count)
    return np.concatenate([np.repeat(merged[:1], before), merged]) if before else merged
