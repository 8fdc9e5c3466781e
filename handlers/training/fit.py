"""Fits forecasters: all series of a call are fitted together, along a leading model dimension. Torch; no files.

The parameters of M models are one tensor [M, n] with one optimiser. Gradients are clipped and the best weights kept for
each model, so that the results of models are independent. Measured on one core: 67,000 windows a second of the default
`tcn`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, isnan, pi, prod
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from handlers.base import Family, Float32
from handlers.codecs.deepar import DeepAr
from handlers.codecs.features import Float64, from_network, parse_step_seconds
from handlers.forecasters import ARCHITECTURES, build_family, find_architecture, random_tensors, split_members
from handlers.forecasters.ddnn import Ddnn
from handlers.forecasters.lear import Lear
from handlers.forecasters.mixture import (
    LINEAR,
    MIXTURE,
    OF_PART,
    SCALING,
    SHAPE,
    SHARES,
    Mixture,
    list_inputs,
    list_parts,
)
from handlers.training.batched_networks import (
    InputNeeds,
    compute_reach,
    flatten_tensors,
    get_batched_forward,
    get_input_needs,
    get_likelihood,
    list_part_needs,
    run_parts,
    unflatten_weights,
)
from handlers.training.dense_fit import BATCH, STEPS, DenseFit
from handlers.training.input_recipe import (
    DAY,
    WEEK,
    choose_channels,
    choose_context_length,
    choose_prediction_length,
    count_season_steps,
    find_channels,
    list_origins,
    make_recipe,
    merge_recipes,
)
from handlers.training.lear_fit import LinearFit
from handlers.training.shares import learn_shares
from handlers.training.tails import fit_tails
from handlers.training.time_series import Series
from handlers.training.windows import Windows
from model_store.archives.manifest import ForecastSpec, GoldenSample, PartSettings, Setting, Tails
from model_store.errors import ArchiveInvalid

Config = dict[str, Setting]

Judged = tuple[float, float, Tails | None]  #: holdout losses of a model and of the naive forecast; the model's tails
Progress = Callable[[int, int, float], None]  #: takes the steps done, the most steps, and the mean holdout loss

EPOCHS, LEAST_STEPS = 20, 600  #: passes of a run whose number is not given, and its least number of steps
WARM_UP = 0.05  #: share of the steps in which the learning rate rises
CLIP = 1.0  #: largest norm of the gradient of one model
GOLDEN_REL = 1e-3
GOLDEN_ABS = 1e-4  #: in units of the scaler's scale: network numbers near zero differ by about 1e-6


def suggest_inputs(
    series: Sequence[Series],
    architecture: str,
    config: Mapping[str, Any],
    prediction_length: int = 0,
    context_length: int = 0,
    **options: Any,
) -> list[ForecastSpec]:
    """Make the input recipe of an architecture for each series; lengths of 0 are the network's, else by the frequency.

    `options` are those of `handlers.training.input_recipe.make_recipe`. Without an `origin`, forecasts of a network of
    whole days start at midnight if they are whole days long; with "any" they may start at any time. Raises
    SeriesInvalid; model_store.errors.ArchiveInvalid for an unknown architecture or config.
    """
    step_s = round(series[0].step.total_seconds())
    horizon = prediction_length or choose_prediction_length(step_s)
    known = ARCHITECTURES.get(architecture)
    least = horizon if known and known.whole_days else 1  # such a network reads whole blocks of a forecast's length
    context = context_length or max(choose_context_length(step_s), least)
    needs = get_input_needs(
        build_family(architecture, {**config, "context_length": context, "prediction_length": horizon})
    )
    asked, of_days = options.pop("origin", ""), needs.whole_days and step_s < DAY and horizon * step_s % DAY == 0
    far = horizon * step_s > WEEK  # its blocks of days would be of weeks: one has the whole rhythm
    length = context_length or (not far and needs.context) or context
    origin = "" if asked == "any" else asked or ("00:00" if of_days else "")
    lengths: dict[str, Any] = {"context_length": length, "prediction_length": horizon}
    parts = list_part_needs(build_family(architecture, {**config, **lengths}))

    def make(each: Series, part: InputNeeds) -> ForecastSpec:
        reach = length if part.context else part.reach
        return make_recipe(each, reach, **lengths, origin=origin, weekdays=part.whole_days, paths=part.paths, **options)

    return [merge_recipes([make(each, part) for part in parts]) for each in series]


@dataclass(frozen=True, slots=True)
class Fitting:
    """The parameters of a fit: `epochs` are passes over the windows of a series, `holdout` is the last share of it.

    The holdout says how long to train; then a second run of that length learns from all windows.
    """

    epochs: float = 0.0  #: most passes; 0: 20, or as many as 600 steps for a short series
    batch: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    average: float = 0.995  #: decay of the average of the weights, which is kept
    holdout: float = 0.1
    holdout_windows: int = 512
    checks: int = 40  #: evaluations of the holdout in a whole run
    patience: int = 12  #: evaluations without a better loss of any model after which the run ends
    half_life_days: float = 0.0  #: a window so many days older counts half, for every architecture; 0: all count alike
    max_seconds: float = float("inf")  #: about, of both runs; a run that reaches half of it is not reproducible
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained forecaster, fitted to all of its series and ready to be packed.

    Losses are mean pinball losses of the holdout in the series' unit, by the fit to the rows before it.
    """

    name: str
    architecture: str
    config: Config
    forecast: ForecastSpec
    tensors: dict[str, Float32]
    golden: GoldenSample
    loss: float
    naive_loss: float


def fit_forecasters(
    series: Sequence[Series],
    forecasts: Sequence[ForecastSpec],
    architecture: str,
    config: Config,
    fitting: Fitting = Fitting(),
    progress: Progress | None = None,
) -> list[Fitted]:
    """Fit one forecaster per series, all of one family and of equal length. The same seed gives the same numbers.

    `config` is completed by the forecasts (features, lengths, quantiles). The fit method "lasso" uses only holdout and
    threads of `fitting`. Where a forecast has `tails`, they are learnt from the prices of the holdout.

    Raises:
        SeriesInvalid: unequal lengths, too few steps, or no values in one of the parts. ArchiveInvalid: a wrong config.
    """
    config = complete_config(architecture, config, forecasts[0])
    family = build_family(architecture, config)
    with _open_threads(fitting.threads) as pool:
        weights, losses = _fit_family(family, series, forecasts, fitting, pool, progress)
    found = []
    for i, (each, given) in enumerate(zip(series, forecasts, strict=True)):
        ours, naive, tails = losses[i]
        forecast = msgspec.structs.replace(given, tails=tails) if tails else given
        parts = unflatten_weights(family, weights[i : i + 1])
        tensors = {name: part[0].numpy().copy() for name, part in parts.items()}
        golden = make_golden_sample(architecture, config, forecast, tensors, each)
        found.append(Fitted(each.name, architecture, config, forecast, tensors, golden, ours, naive))
    return found


def _fit_family(
    family: Family,
    series: Sequence[Series],
    forecasts: Sequence[ForecastSpec],
    fitting: Fitting,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[torch.Tensor, list[Judged]]:
    """Fit a family: returns flat parameters [M, n], and what the holdout says. Parts and members are fitted apart."""
    data = Windows(series, forecasts, compute_reach(family), fitting.holdout, half_life_days=fitting.half_life_days)
    if isinstance(family, Mixture):
        best, whole = _fit_parts(family, data, series, forecasts, fitting, pool, progress)
    else:
        best, whole = _fit_members(family, data, series, forecasts, fitting, pool, progress)
    return whole, _Fit(family, data, fitting, pool).price_losses(best)


def _fit_parts(
    family: Mixture,
    data: Windows,
    series: Sequence[Series],
    forecasts: Sequence[ForecastSpec],
    fitting: Fitting,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit each part to its own channels as `_fit_members` does, and learn the shares from what they hold out."""
    found = []
    for part, places, linear in zip(family.parts, family.places, family.linear, strict=True):
        inputs = [replace(each, inputs=tuple(each.inputs[place] for place in places)) for each in forecasts]
        if linear:
            inputs = [replace(each, scaler=replace(each.scaler, kind=LINEAR)) for each in inputs]
        windows = Windows(series, inputs, compute_reach(part), fitting.holdout, data.history, fitting.half_life_days)
        found.append(_fit_members(part, windows, series, inputs, fitting, pool, progress))
    even = torch.full((len(series), prod(family.parameters[SHARES])), 1 / len(family.parts))
    bests, wholes = ([even, *each] for each in zip(*found, strict=True))
    if family.config.stack:
        shares = _learn_shares(family, data, torch.cat(bests, 1), fitting, pool)
        bests[0] = wholes[0] = shares.flatten(1)
    return torch.cat(bests, 1), torch.cat(wholes, 1)


def _learn_shares(
    family: Mixture, data: Windows, weights: torch.Tensor, fitting: Fitting, pool: ThreadPoolExecutor
) -> torch.Tensor:
    """Learn the shares [M, parts, levels] of models with these parameters [M, n] from the holdout."""
    starts = data.held_out(fitting.holdout_windows)

    def learn(models: slice) -> list[torch.Tensor]:
        with torch.no_grad():
            x, y = data.cut(starts, models)
            answers = run_parts(family, unflatten_weights(family, weights[models]), x)
            return [learn_shares(*each, data.levels) for each in zip(answers, y, strict=True)]

    return torch.stack(
        [each for some in pool.map(learn, data.slices(starts.shape[1], fitting.threads)) for each in some]
    )


def _fit_members(
    family: Family,
    data: Windows,
    series: Sequence[Series],
    forecasts: Sequence[ForecastSpec],
    fitting: Fitting,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit to the rows before the holdout, and to all: flat parameters [M, n] each. Members are separate models."""
    member, count = split_members(family)
    if isinstance(member, Mixture):
        raise ArchiveInvalid(f"members: a mixture is not fitted {count} times; give its parts members instead")
    if isinstance(member, Ddnn):
        dense = DenseFit(
            member, data, pool, count, _draw_starts(member, count, fitting.seed), _count_dense_steps(data, fitting)
        )
        best = dense.best(progress)
        return best.view(len(series), -1), dense.whole().view(len(series), -1)
    if count > 1:
        copies = [each for each in series for _ in range(count)], [each for each in forecasts for _ in range(count)]
        data = Windows(*copies, compute_reach(member), fitting.holdout, data.history, fitting.half_life_days)
    if find_architecture(member).fit == "lasso":
        assert isinstance(member, Lear), "the lasso fits a linear model"
        linear = LinearFit(member, data, pool, count)
        best = linear.best(progress)
        whole = linear.whole(best)
    else:
        start = _draw_starts(member, len(data), fitting.seed)
        networks = _Fit(member, data, fitting, pool)
        best, steps = networks.best(start, progress)
        whole = networks.whole(start, steps)
    return best.view(len(series), -1), whole.view(len(series), -1)


def _draw_starts(member: Family, count: int, seed: int) -> torch.Tensor:
    """Draw initial flat parameters [count, n], each of its own seed."""
    return torch.from_numpy(np.stack([flatten_tensors(member, random_tensors(member, seed + i)) for i in range(count)]))


def _count_dense_steps(data: Windows, fitting: Fitting) -> int:
    return round(fitting.epochs * len(data.train) / BATCH) or STEPS


def explain_worse(fitted: Fitted) -> str:
    """Say why a fit is not known to be better than the naive forecast; empty if it is."""
    if isnan(fitted.loss):
        return f"{fitted.name}: nothing is observed in its holdout, so that it cannot be judged"
    if fitted.loss < fitted.naive_loss:
        return ""
    than = f"its holdout loss {fitted.loss:.4g} is no better than the naive forecast's {fitted.naive_loss:.4g}"
    return f"{fitted.name}: {than}"


def complete_config(architecture: str, config: Config, forecast: ForecastSpec) -> Config:
    """Complete the config with the fields that the forecast determines; `season` is by default the frequency's."""
    found: Config = {
        **config,
        "features": len(forecast.inputs),
        "context_length": forecast.context_length,
        "prediction_length": forecast.prediction_length,
    }
    known = ARCHITECTURES.get(architecture)
    fields = known.config.__struct_fields__ if known else ()
    if architecture == MIXTURE:
        found["parts"] = [_complete_part(part, forecast) for part in list_parts(config)]
    if "marks" in fields:
        found["marks"] = sum(channel.source == "calendar" for channel in forecast.inputs)
    if "season" in fields:
        found.setdefault("season", count_season_steps(parse_step_seconds(forecast.frequency)))
    if not forecast.paths:
        found["quantiles"] = len(forecast.quantile_levels)
    return found


def _complete_part(part: PartSettings, forecast: ForecastSpec) -> PartSettings:
    """Complete a part of a mixture: the channels of the forecast that it reads, and what they determine."""
    architecture = str(part["architecture"])
    own: dict[str, Any] = {name: value for name, value in part.items() if name not in OF_PART}
    if "inputs" in part:
        places = list(list_inputs(part, len(forecast.inputs)))
    else:
        lengths = {"context_length": forecast.context_length, "prediction_length": forecast.prediction_length}
        needs = get_input_needs(build_family(architecture, {**own, **lengths, "features": len(forecast.inputs)}))
        reach = forecast.context_length if needs.context else needs.reach
        step_s, covariates = parse_step_seconds(forecast.frequency), len(forecast.dynamic_feat)
        wanted = choose_channels(step_s, forecast.prediction_length, reach, covariates, weekdays=needs.whole_days)
        places = find_channels(wanted, forecast)
    read = replace(forecast, inputs=tuple(forecast.inputs[place] for place in places))
    completed = complete_config(architecture, own, read)
    found: dict[str, Any] = {name: value for name, value in completed.items() if name not in SHAPE}
    if (part.get(SCALING) == LINEAR or part.get(LINEAR)) and forecast.scaler.kind == "asinh":
        found[LINEAR] = [i for i, channel in enumerate(read.inputs) if channel.source == "target"]
    return {"architecture": architecture, "inputs": places, **found}


def make_reference_network(architecture: str, config: Config, tensors: Mapping[str, Float32]) -> nn.Module:
    """Make the plain network with these weights."""
    network = build_family(architecture, config).reference()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return network


def ask_network(network: nn.Module, forecast: ForecastSpec, request: object) -> Any:
    """Answer a DeepAR request like the server, by a call of the network in this process."""
    inputs, encode = DeepAr(forecast).decode(msgspec.json.encode(request))
    with torch.inference_mode():
        return msgspec.json.decode(encode(network(torch.from_numpy(inputs)).numpy()))


def make_golden_sample(
    architecture: str, config: Config, forecast: ForecastSpec, tensors: Mapping[str, Float32], series: Series
) -> GoldenSample:
    """Make a golden sample of the last forecast of the series that has actual values."""
    places = list_origins(series, forecast)
    end = next(at for at in reversed(places) if at <= len(series.values) - forecast.prediction_length)
    request = {"instances": [series.instance(end - forecast.history_length, end, forecast.prediction_length)]}
    response = ask_network(make_reference_network(architecture, config, tensors), forecast, request)
    tolerance = GOLDEN_ABS * forecast.scaler.scale
    return GoldenSample(request=request, response=response, abs_tolerance=tolerance, rel_tolerance=GOLDEN_REL)


def compute_pinball(y: torch.Tensor, forecast: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Compute the loss [...] of quantiles [..., P, Q] for targets [..., P] (NaN: missing): sum over P, mean over Q.

    It is the loss of Koenker and Bassett, max(q e, (q - 1) e) for the error e = y - forecast.
    """
    error = y.nan_to_num()[..., None] - forecast
    loss = torch.maximum(levels * error, (levels - 1) * error).mean(-1)
    return (loss * ~y.isnan()).sum(-1)


class _Fit:
    """A run: the models of one family over their windows, in groups of models on threads of one core each.

    The threads of torch wait for each other in every operation by spinning: on cores that are shared, a step took a
    second instead of 30 ms. Groups of models are independent, so that the numbers do not depend on the threads.
    """

    def __init__(self, family: Family, data: Windows, fitting: Fitting, pool: ThreadPoolExecutor) -> None:
        self._family = family
        self._data = data
        self._fitting = fitting
        self._pool = pool
        self._forward = get_batched_forward(family)
        self._likelihood = get_likelihood(family)
        self._held_out = data.held_out(fitting.holdout_windows)

    def __repr__(self) -> str:
        return f"<_Fit {self._family.key} {self._data!r}>"

    def best(self, start: torch.Tensor, progress: Progress | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Train flat parameters [M, n] on the training part.

        Returns the weight average of each model that is best on the holdout [M, n], and after how many steps that was
        [M]. A model of whose holdout nothing is observed has no loss, and keeps its last average.
        """
        fitting, best = self._fitting, start.clone()
        best_loss, at = torch.full((len(start),), torch.nan), torch.zeros(len(start), dtype=torch.long)
        steps = self._count_steps()
        every, idle, until = max(1, steps // fitting.checks), 0, time.monotonic() + fitting.max_seconds / 2
        for step, average in self._train(start, self._data.train):
            over = step == steps or time.monotonic() > until
            if step % every and not over:
                continue
            losses = self._holdout_losses(average)
            better = ~(losses >= best_loss)
            best[better], best_loss[better], at[better] = average[better], losses[better], step
            idle = 0 if better.any() else idle + 1
            if progress:
                progress(step, steps, best_loss.mean().item())
            if over or idle >= fitting.patience:
                break
        return best, at

    def whole(self, start: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Train flat parameters [M, n] anew on all windows, also those of the holdout, since prices change.

        Each model takes the number of steps [M] after which it was best on the holdout, at the same learning rates.
        """
        found, last = start.clone(), int(steps.max())
        for step, average in self._train(start, self._data.all):
            done = steps == step
            found[done] = average[done]
            if step == last:
                break
        return found

    def _count_steps(self) -> int:
        fitting, pass_steps = self._fitting, len(self._data.train) / self._fitting.batch
        return max(1, round(fitting.epochs * pass_steps or max(EPOCHS * pass_steps, LEAST_STEPS)))

    def _train(self, start: torch.Tensor, windows: range) -> Iterator[tuple[int, torch.Tensor]]:
        """Train on windows from these steps on: yields the number of steps done, and the average of the weights [M, n].

        The optimiser is AdamW; the learning rate warms up and falls by a cosine.
        """
        fitting, draw = self._fitting, torch.Generator().manual_seed(self._fitting.seed)
        weights, average, steps = start.clone(), start.clone(), self._count_steps()
        optimiser = torch.optim.AdamW([weights], weight_decay=fitting.weight_decay, fused=True)
        for step in range(1, steps + 1):
            weights.grad = self._gradient(weights, self._data.drawn(windows, fitting.batch, draw))
            optimiser.param_groups[0]["lr"] = fitting.learning_rate * _compute_rate(step / steps)
            optimiser.step()
            average.lerp_(weights, max(1 - fitting.average, 1 / step))
            yield step, average

    def price_losses(self, weights: torch.Tensor) -> list[Judged]:
        """Judge each model by the holdout: its mean pinball loss in prices, that of the values `naive_lag` before, and
        how far prices lie beyond its outer quantiles.
        """
        data, levels = self._data, self._data.levels
        ahead = self._held_out[0][:, None].numpy() + np.arange(data.horizon)

        def of(models: slice) -> list[Judged]:
            answers, found = self._answers(weights, models).double().numpy(), list[Judged]()
            for answer, values, base, scaler in zip(
                answers, data.values[models], data.bases[models], data.scalers[models], strict=True
            ):
                before = values[ahead - data.naive_lag]
                y = torch.from_numpy(np.where(np.isnan(before), np.nan, values[ahead]))[None]
                quantiles = torch.from_numpy(self._quantiles(from_network(answer, scaler) + base[ahead][..., None]))
                naive = torch.from_numpy(np.nan_to_num(before))[..., None]
                observed = (~y.isnan()).sum()  # 0 / 0 is NaN: where nothing is observed there is no loss
                ours, theirs = (compute_pinball(y, each, levels).sum() / observed for each in (quantiles, naive))
                tails = fit_tails(values[ahead], quantiles.numpy(), data.exact_levels) if data.has_tails else None
                found.append((ours.item(), theirs.item(), tails))
            return found

        return [each for some in self._pool.map(of, self._slices(self._held_out)) for each in some]

    def _quantiles(self, prices: Float64) -> Float64:
        """Return sorted quantiles [..., levels]: those of sample paths, or of the network."""
        if self._likelihood:
            levels = np.quantile(prices, self._data.levels.double().numpy(), axis=-1, method="hazen")
            return np.moveaxis(levels, 0, -1)
        return np.sort(prices)

    def _gradient(self, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Compute the gradient [M, n] of the mean loss of each model over its windows [M, B], clipped by model."""
        found = torch.empty_like(weights)

        def of(models: slice) -> None:
            x, y = self._data.cut(starts, models)
            some = weights[models].detach().requires_grad_()
            loss = self._losses(some, x, y)
            (gradient,) = torch.autograd.grad(loss.sum(), some)
            norm = gradient.norm(dim=1, keepdim=True)
            torch.mul(gradient, CLIP / norm.clamp(min=CLIP), out=found[models])

        list(self._pool.map(of, self._slices(starts)))
        return found

    def _holdout_losses(self, weights: torch.Tensor) -> torch.Tensor:
        """Compute the mean holdout loss of each model in network numbers [M], NaN where nothing is observed."""

        def of(models: slice) -> torch.Tensor:
            with torch.no_grad():
                x, y = self._data.cut(self._held_out, models)
                losses = self._losses(weights[models], x, y)
            return losses.where((~y.isnan()).any(2).any(1), torch.nan)

        return torch.cat(list(self._pool.map(of, self._slices(self._held_out))))

    def _losses(self, weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the loss [m] of windows: the mean pinball loss, or the negative log-likelihood."""
        parts = unflatten_weights(self._family, weights)
        unlikely = self._likelihood(parts, x, y) if self._likelihood else None
        losses = compute_pinball(y, self._forward(parts, x), self._data.levels) if unlikely is None else unlikely
        return losses.sum(1) / _count_observed(y)

    def _answers(self, weights: torch.Tensor, models: slice) -> torch.Tensor:
        """Compute the answers [m, B, horizon, levels or paths] on the holdout."""
        with torch.no_grad():
            x, _ = self._data.cut(self._held_out, models)
            return self._forward(unflatten_weights(self._family, weights[models]), x)

    def _slices(self, starts: torch.Tensor) -> list[slice]:
        return self._data.slices(starts.shape[1], self._fitting.threads)


def _compute_rate(done: float) -> float:
    return min(done / WARM_UP, (1 + cos(pi * done)) / 2)


@contextmanager
def _open_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool of threads, in each of which torch uses one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "fit") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _count_observed(y: torch.Tensor) -> torch.Tensor:
    """Count the values of y [m, B, P] that are not missing, at least 1 for a gradient without any: [m]."""
    return (~y.isnan()).sum((1, 2)).clamp(min=1)
