"""Training windows: many series in network numbers on one time axis, cut at possible starts of a forecast. Torch."""

from collections.abc import Sequence
from math import expm1, log

import numpy as np
import torch

from handlers.base import Float32
from handlers.codecs.features import to_network
from handlers.training.input_recipe import DAY, build_rows, compute_naive_lag, get_base, list_origins, subtract_base
from handlers.training.time_series import Series, SeriesInvalid
from model_store.archives.manifest import ForecastSpec

FORWARD_ROWS = 512  #: windows in one forward, whose scratch of some MiB stays in the caches


class Windows:
    """The series in network numbers on one time axis, and windows of them by the first forecast step."""

    def __init__(
        self,
        series: Sequence[Series],
        forecasts: Sequence[ForecastSpec],
        reach: int,
        holdout: float,
        history: int = 0,
        half_life_days: float = 0.0,
    ) -> None:
        """`history`: least steps before a forecast; the parts of a mixture hold out the same windows by it.

        `half_life_days`: a window so much older counts half; 0: all count the same.

        Raises SeriesInvalid if the series have different lengths, are too short, or have a part without values.
        """
        _require_equal_lengths(series)
        first, steps = forecasts[0], len(series[0].values)
        self.history = max(history, first.history_length)
        self.lag = first.history_length - first.context_length
        self.horizon, self.reach = first.prediction_length, reach
        self._half_life = half_life_days * DAY / series[0].step.total_seconds()  # in steps
        places = list_origins(series[0], first)
        self.train, self.holdout = _split_places(places, steps, self.history, self.horizon, holdout)
        if not self.train or not self.holdout:
            needed = _count_needed_steps(places, self.history, self.horizon, holdout)
            raise SeriesInvalid(f"{series[0].name} has {steps} steps; at least {needed} are needed to learn from")
        for part, starts in {"training": self.train, "holdout": self.holdout}.items():
            _require_values(series, part, slice(starts[0], starts[-1] + self.horizon))
        self.levels, self.exact_levels = torch.tensor(first.quantile_levels), np.array(first.quantile_levels)
        self.has_tails = bool(first.tails)
        self.scalers = [forecast.scaler for forecast in forecasts]
        self.naive_lag = compute_naive_lag(round(series[0].step.total_seconds()), self.horizon)
        pairs = list(zip(series, forecasts, strict=True))
        self.values = [each.values for each in series]
        self.bases = [get_base(each, forecast.residual_to) for each, forecast in pairs]
        scaled = [_scale_targets(each, forecast) for each, forecast in pairs]
        self._targets = torch.from_numpy(np.stack(scaled))  # [M, T], NaN where missing
        inputs = [build_rows(each, forecast).T for each, forecast in pairs]
        self._inputs = torch.from_numpy(np.ascontiguousarray(np.stack(inputs)))  # [M, T - lag - horizon, channels]

    def __len__(self) -> int:
        return len(self._targets)

    def __repr__(self) -> str:
        return f"<Windows of {len(self)} series, to train {self.train}, held out {self.holdout}>"

    def slices(self, count: int, threads: int) -> list[slice]:
        """Split the models into groups: a forward has at most FORWARD_ROWS windows or one model, a thread its share."""
        size = min(max(1, FORWARD_ROWS // count), -(-len(self) // threads))
        return [slice(at, at + size) for at in range(0, len(self), size)]

    def cut(self, starts: torch.Tensor, models: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut windows at first forecast steps [M, B]: x [m, B, reach, channels], y [m, B, horizon] of some models."""
        inputs, targets, some = self._inputs[models], self._targets[models], starts[models]
        count, length, channels = inputs.shape
        first = some - self.lag - self.reach + length * torch.arange(count)[:, None]
        places = first[..., None] + torch.arange(self.reach)
        ahead = some[..., None] + torch.arange(self.horizon)
        x = inputs.reshape(-1, channels).index_select(0, places.flatten()).view(*places.shape, channels)
        return x, targets.gather(1, ahead.flatten(1)).view_as(ahead)

    @property
    def all(self) -> range:
        """The steps to forecast from of both parts, and those between them."""
        return range(self.train.start, self.holdout.stop, self.train.step)

    def drawn(self, starts: range, count: int, random: torch.Generator) -> torch.Tensor:
        """Draw random windows that forecast from some of these steps [M, count], new ones more often by half-life."""
        if not self._half_life:
            places = torch.randint(0, len(starts), (len(self), count), generator=random)
            return starts.start + starts.step * places
        rate = log(2) * starts.step / self._half_life  # each place back counts exp(-rate) as much
        share = torch.rand((len(self), count), generator=random, dtype=torch.float64)
        ages = (-torch.log1p(share * expm1(-rate * len(starts))) / rate).long().clamp(max=len(starts) - 1)
        return starts[-1] - starts.step * ages

    def weigh(self, starts: torch.Tensor) -> torch.Tensor | None:
        """Return the weights of windows [n] by half-life, 1 in the mean; None if all are equal."""
        if not self._half_life:
            return None
        weights = torch.exp2((starts - starts.max()) / self._half_life)
        return weights / weights.mean()

    def held_out(self, count: int) -> torch.Tensor:
        """Return up to `count` evenly spaced windows of the holdout, the same for every model [M, B]."""
        return self.spaced(self.holdout, count)

    def spaced(self, starts: range, count: int) -> torch.Tensor:
        """Return up to `count` of the steps, evenly spaced, the same for every model [M, B]."""
        places = torch.linspace(0, len(starts) - 1, min(count, len(starts))).long()
        return (starts.start + starts.step * places).expand(len(self), -1)


def _scale_targets(series: Series, forecast: ForecastSpec) -> Float32:
    """Return what the network learns [T], in its numbers."""
    return to_network(subtract_base(series, forecast.residual_to), forecast.scaler).astype(np.float32)


def _split_places(places: range, steps: int, history: int, horizon: int, holdout: float) -> tuple[range, range]:
    """Return the steps to forecast from for training, and for the last share that is held out, at least one window."""
    last = places.start + (steps - horizon - places.start) // places.step * places.step
    split = min(steps - round(holdout * (steps - history)), last)
    return _cut_range(places, history, split - horizon), _cut_range(places, max(split, history), steps - horizon)


def _count_needed_steps(places: range, history: int, horizon: int, holdout: float) -> int:
    """Return the least number of steps that has a window in both parts; any larger one has too."""
    enough = history + 2 * (horizon + places.step)
    while all(_split_places(places, enough, history, horizon, holdout)):
        enough -= 1
    return enough + 1


def _cut_range(places: range, first: int, last: int) -> range:
    """Return the places from `first` to `last`, both included."""
    start = places.start + max(0, -(-(first - places.start) // places.step)) * places.step
    return range(start, last + 1, places.step)


def _require_equal_lengths(series: Sequence[Series]) -> None:
    first = series[0]
    for each in series:
        if len(each.values) != len(first.values):
            what = f"{each.name} has {len(each.values)} steps, {first.name} {len(first.values)}; fit them apart"
            raise SeriesInvalid(what)


def _require_values(series: Sequence[Series], part: str, steps: slice) -> None:
    for each in series:
        if np.isnan(each.values[steps]).all():
            raise SeriesInvalid(f"{each.name}: no values in the {part} part")
