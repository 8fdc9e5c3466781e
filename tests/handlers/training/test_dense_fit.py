"""`ddnn`: its gradient is autograd's, scaling is folded in, and the base helps where levels wander."""

from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from handlers.forecasters import build_family, random_tensors
from handlers.forecasters.ddnn import LAYERS, Ddnn
from handlers.training import dense_fit
from handlers.training.batched_networks import flatten_tensors
from handlers.training.dense_fit import (
    BATCH,
    Design,
    _Layers,
    _write_gradient,
    fit_base,
    run_networks,
    split_parameters,
    train_networks,
)
from handlers.training.fit import Fitted, Fitting, compute_pinball, fit_forecasters, suggest_inputs
from handlers.training.time_series import Series

pytestmark = pytest.mark.slow

LEVELS = torch.tensor([0.1, 0.5, 0.9])
QUICK = Fitting(epochs=40)
START = datetime.fromisoformat("2024-01-01")


def build_small() -> Ddnn:
    """Four channels, of which one is a mark, and steps of six."""
    config = {"features": 4, "context_length": 20, "prediction_length": 6, "quantiles": 3, "marks": 1, "hidden": 5}
    family = build_family("ddnn", config)
    assert isinstance(family, Ddnn)
    return family


def make_design(family: Ddnn, models: int = 2, windows: int = 40) -> Design:
    """Reads of any scale, and targets that depend on them; one is missing."""
    draw = torch.Generator().manual_seed(0)
    mean, spread = torch.randn((models, len(family.taps)), generator=draw), torch.full((models, len(family.taps)), 3.0)
    x = torch.randn((models, windows, len(family.taps)), generator=draw)
    y = x[..., :6] + 0.1 * torch.randn((models, windows, 6), generator=draw)
    y[0, 3, 2] = torch.nan
    return Design(x, y, mean, spread)


def make_walk(seed: int, days: int = 200, wander: float = 0.0) -> Series:
    """Hourly prices with a daily shape and a covariate, whose level wanders."""
    rng = np.random.default_rng(seed)
    hours = np.arange(24 * days)
    load = rng.normal(0, 1, len(hours))
    level = wander * np.repeat(rng.normal(0, 1, days).cumsum(), 24)
    values = 50 + level + 10 * np.sin(2 * np.pi * hours / 24) + 5 * load + rng.normal(0, 1, len(hours))
    return Series(f"m{seed}", START, timedelta(hours=1), values, load[None], ("load",))


def fit_ddnn(series: list[Series], config: dict[str, int] | None = None, fitting: Fitting = QUICK) -> list[Fitted]:
    """A small model of each series, all together."""
    of = {"hidden": 16, **(config or {})}
    return fit_forecasters(series, suggest_inputs(series, "ddnn", of), "ddnn", {**of}, fitting)


def test_the_written_gradient_is_autograds() -> None:
    """Of the mean pinball loss with dropout, for every weight and bias; a missing target has none."""
    family = build_small()
    tensors = [random_tensors(family, seed) for seed in range(2)]
    weights = torch.from_numpy(np.stack([flatten_tensors(family, each) for each in tensors]))
    parts = split_parameters(family, weights)
    flat = torch.cat(
        [
            part
            for name in LAYERS
            for part in (parts[f"{name}.weight"].transpose(1, 2).flatten(1), parts[f"{name}.bias"])
        ],
        1,
    ).requires_grad_()
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn((2, BATCH, len(family.taps)), generator=draw), torch.randn((2, BATCH, 6), generator=draw)
    y[0, 1] = torch.nan
    mask = (torch.rand((2, BATCH, 5), generator=draw) > 0.3).float() / 0.7
    first, bias, second, second_bias, head, head_bias = _Layers(family, flat).views
    h = torch.nn.functional.elu(x @ first + bias) * mask
    answers = torch.nn.functional.elu(h @ second + second_bias) @ head + head_bias
    loss = compute_pinball(y, answers.view(2, BATCH, 6, 3), LEVELS).sum() / (BATCH * 6)
    (expected,) = torch.autograd.grad(loss, flat)
    found = torch.zeros_like(flat)
    with torch.no_grad():
        slopes = _Layers(family, found).views
        _write_gradient(_Layers(family, flat).views, slopes, x, y.repeat_interleave(3, 2), LEVELS, mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_step_is_adamws() -> None:
    """The same numbers as those of torch's optimiser, for several steps at changing rates."""
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.ones(50) for _ in range(2))
    parameter = torch.nn.Parameter(theirs)
    optimiser = torch.optim.AdamW([parameter], weight_decay=dense_fit.DECAY)
    moments = torch.zeros(50), torch.zeros(50)
    for step in range(1, 6):
        gradient = torch.randn(50, generator=draw)
        parameter.grad = gradient
        optimiser.param_groups[0]["lr"] = 0.01 * step
        optimiser.step()
        dense_fit._take_step(ours, gradient, moments, step, 0.01 * step)
    torch.testing.assert_close(ours, parameter.data)


def test_scaling_and_base_are_folded_into_the_network() -> None:
    """What is answered to reads that are not scaled is the base alone before the first step, for a head of zeros."""
    family = build_small()
    design = make_design(family)
    bases = fit_base(family, design)
    start = torch.zeros((1, sum(torch.Size(shape).numel() for shape in family.parameters.values())))
    weights = train_networks(family, design, bases, start, LEVELS, 0, 0)[:, 0]
    read = design.x * design.spread[:, None] + design.mean[:, None]
    answers = run_networks(family, split_parameters(family, weights), read)
    base = design.x[..., : family.base_taps] @ bases
    quantiles = (design.y - base).nanquantile(LEVELS, dim=1).permute(1, 2, 0)
    torch.testing.assert_close(answers, base[..., None] + quantiles[:, None], atol=1e-4, rtol=1e-4)


def test_a_fit_learns_and_repeats_itself() -> None:
    """Half of the naive forecast's loss where the covariate tells most; the same seed gives the same numbers."""
    series = [make_walk(seed) for seed in range(2)]
    first, again, other = fit_ddnn(series), fit_ddnn(series), fit_ddnn(series, None, Fitting(epochs=40, seed=5))
    for one, two, three in zip(first, again, other, strict=True):
        assert one.loss < 0.5 * one.naive_loss
        assert all(np.array_equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
        assert not np.array_equal(one.tensors["first.weight"], three.tensors["first.weight"])


def test_a_model_does_not_depend_on_the_others_or_on_threads() -> None:
    """Alone, beside others, on two threads: the same numbers up to rounding."""
    series = [make_walk(seed) for seed in range(10)]  # more than a group
    together = fit_ddnn(series, {"hidden": 8}, Fitting(epochs=5, threads=2))
    (alone,) = fit_ddnn(series[9:], {"hidden": 8}, Fitting(epochs=5))
    for name, tensor in alone.tensors.items():
        np.testing.assert_allclose(together[9].tensors[name], tensor, atol=1e-3)


def test_the_base_is_for_levels_that_wander(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random walk gets it, in every member, and forecasts better by it than without."""
    series = [make_walk(1, wander=8.0)]
    (based,) = fit_ddnn(series, {"members": 2})
    bases = [based.tensors[f"members.{i}.base.weight"] for i in range(2)]
    assert np.abs(bases[0]).max() > 0.01
    np.testing.assert_array_equal(bases[0], bases[1])
    first, second = (based.tensors[f"members.{i}.second.weight"] for i in range(2))
    assert not np.array_equal(first, second)
    monkeypatch.setattr(dense_fit, "fit_base", lambda *of: torch.zeros_like(fit_base(*of)))
    (plain,) = fit_ddnn(series, {"members": 2})
    assert based.loss < 0.9 * plain.loss


def test_missing_prices_are_learnt_around() -> None:
    """A fifth of the targets without values leaves finite numbers and a loss below the naive one."""
    series = make_walk(0)
    values = series.values.copy()
    values[np.random.default_rng(1).random(len(values)) < 0.2] = np.nan
    (found,) = fit_ddnn([replace(series, values=values)])
    assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())
    assert found.loss < 0.7 * found.naive_loss
