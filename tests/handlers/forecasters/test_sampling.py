"""Networks that sample: noise of the request alone, paths that are drawn right, and the contract's answers of them."""

from datetime import datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from handlers.base import Family
from handlers.codecs.deepar import DeepAr
from handlers.codecs.features import make_seed_numbers
from handlers.errors import RequestError
from handlers.forecasters import build_family, check_forecast, random_tensors
from handlers.forecasters.counter_rng import draw_normals
from handlers.forecasters.deepstate import Deepstate, DeepstateReference, Filter, make_state_space
from handlers.training.batched_networks import (
    compute_reach,
    flatten_tensors,
    get_batched_forward,
    get_likelihood,
    unflatten_weights,
)
from handlers.training.fit import Fitting, fit_forecasters
from handlers.training.input_recipe import make_recipe
from handlers.training.time_series import Series
from model_store.archives.manifest import ForecastSpec, InputChannel
from model_store.errors import ArchiveInvalid

SAMPLERS = ["deepar", "deepstate"]
SMALL: dict[str, int] = {"features": 4, "context_length": 30, "prediction_length": 6, "hidden": 8, "paths": 16}
FORECAST = ForecastSpec(
    frequency="1h",
    context_length=30,
    prediction_length=6,
    quantile_levels=(0.1, 0.5, 0.9),
    inputs=(
        InputChannel(source="target"),
        InputChannel(source="calendar", feature="hour_sin", shift=6),
        InputChannel(source="calendar", feature="hour_cos", shift=6),
        InputChannel(source="seed"),
    ),
    paths=16,
)


def make_series(hours: int = 24 * 30) -> Series:
    """Hourly prices with a daily shape and noise."""
    rng, t = np.random.default_rng(0), np.arange(hours)
    values = 50 + 20 * np.sin(2 * np.pi * t / 24) + rng.normal(0, 5, hours)
    start = datetime.fromisoformat("2024-01-01")
    return Series("market", start, timedelta(hours=1), values, np.empty((0, hours)))


def ask(family: Family, batch: int = 1, at: int = 0, item: str | None = None, **configuration: Any) -> Any:
    """The prediction for one instance, answered at place `at` of a batch of requests for other models."""
    instance = {**make_series().instance(0, 40, 6), **({"item_id": item} if item else {})}
    body = {"instances": [instance], "configuration": configuration}
    rows, encode = DeepAr(FORECAST).decode(msgspec.json.encode(body))
    block = torch.from_numpy(np.stack([family.row(random_tensors(family, abs(i - at))) for i in range(batch)]))
    x = torch.from_numpy(np.random.default_rng(batch).normal(size=(batch, 4, 30)).astype(np.float32))
    x[at] = torch.from_numpy(rows[0])
    answer = family.forward(family.bind(block), x)[at : at + 1].numpy()
    return msgspec.json.decode(encode(answer))["predictions"][0]


def test_noise_is_normal_and_of_the_seed_alone() -> None:
    """A hundred thousand numbers pass for normal and for independent; a seed's are the same in any company."""
    seeds = torch.tensor([[1.0, 2.0], [1.0, 3.0], [16_777_215.0, 0.0]])
    found = draw_normals(seeds, 500, 200)
    assert found.shape == (3, 500, 200)
    expected = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    four_errors = 4 * (torch.tensor([1, 2, 15, 96], dtype=torch.float64) / 100_000).sqrt()
    for each in found.flatten(1).double():
        moments = torch.stack([each.pow(power).mean() for power in (1, 2, 3, 4)])
        assert ((moments - expected).abs() < four_errors).all()
        assert (each < -1.96).double().mean().item() == pytest.approx(0.025, abs=0.002)
    assert torch.corrcoef(found.flatten(1)).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(found[0].T).fill_diagonal_(0).abs().max() < 0.25  # of 500 numbers each, 200 steps
    torch.testing.assert_close(draw_normals(seeds[1:2], 500, 200), found[1:2])


def test_seed_numbers_are_exact_in_float32() -> None:
    """Two whole numbers of 24 bits, others for each seed and item; no seed is seed 0."""
    pairs = [make_seed_numbers(seed, item) for seed in range(50) for item in (None, "a", "b", 1)]
    assert len(set(pairs)) == len(pairs)
    assert all(int(np.float32(number)) == number < 2**24 for pair in pairs for number in pair)
    assert make_seed_numbers(None, "a") == make_seed_numbers(0, "a")


@pytest.mark.parametrize("architecture", SAMPLERS)
def test_a_request_is_answered_alike_whatever_the_batch(architecture: str) -> None:
    """Alone, or in any place among requests for other models: the same paths to rounding."""
    family = build_family(architecture, SMALL)
    alone = ask(family, seed=7, output_types=["samples"], num_samples=16)["samples"]
    for batch, at in ((2, 1), (33, 20)):
        beside = ask(family, batch, at, seed=7, output_types=["samples"], num_samples=16)["samples"]
        np.testing.assert_allclose(beside, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SAMPLERS)
def test_seed_and_item_decide_the_paths(architecture: str) -> None:
    """The same seed gives the same numbers, no seed those of seed 0; another seed or item gives others."""
    family = build_family(architecture, SMALL)
    asked: dict[str, Any] = {"output_types": ["samples"], "num_samples": 4}
    first = ask(family, seed=1, **asked)["samples"]
    assert ask(family, seed=1, **asked)["samples"] == first
    assert ask(family, seed=2, **asked)["samples"] != first
    assert ask(family, item="a", seed=1, **asked)["samples"] != first
    assert ask(family, **asked)["samples"] == ask(family, seed=0, **asked)["samples"]


def test_quantiles_and_mean_are_those_of_the_paths() -> None:
    """What the answer says agrees with all of its samples, which are whole paths and not sorted step by step."""
    answer = ask(build_family("deepar", SMALL), num_samples=16, output_types=["mean", "quantiles", "samples"])
    samples = np.array(answer["samples"])
    assert samples.shape == (16, 6)
    np.testing.assert_allclose(answer["mean"], samples.mean(0), rtol=1e-4)
    for level, values in answer["quantiles"].items():
        np.testing.assert_allclose(values, np.quantile(samples, float(level), axis=0, method="hazen"), rtol=1e-4)
    assert (np.diff(samples, axis=0) < 0).any()
    fewer = ask(build_family("deepar", SMALL), num_samples=3, output_types=["samples"])["samples"]
    np.testing.assert_array_equal(fewer, samples[:3])


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ({"output_types": ["samples"], "num_samples": 17}, "draws 16 paths; ask for at most so many"),
        ({"quantiles": ["0.01"]}, "level 0.01 is outside the trained range 0.03125 to 0.96875"),
    ],
)
def test_what_paths_cannot_tell_is_refused(configuration: dict[str, Any], said: str) -> None:
    """More samples than there are paths, and levels beyond them."""
    with pytest.raises(RequestError, match=said):
        ask(build_family("deepar", SMALL), **configuration)


def test_a_record_says_how_many_paths() -> None:
    """The number is the network's; a network of quantiles has none; levels beyond the paths are no default."""
    check_forecast(build_family("deepar", SMALL), FORECAST)
    with pytest.raises(ArchiveInvalid, match=r"forecast.paths says 20, but the network deepar-\w+ has 16"):
        check_forecast(build_family("deepar", SMALL), replace(FORECAST, paths=20))
    with pytest.raises(ArchiveInvalid, match=r"forecast.paths says 0, but the network deepar-\w+ has 16"):
        check_forecast(build_family("deepar", SMALL), replace(FORECAST, paths=msgspec.UNSET))
    with pytest.raises(ArchiveInvalid, match=r"forecast.paths says 16, but the network mlp"):
        check_forecast(build_family("mlp", {"features": 4, "context_length": 30, "prediction_length": 6}), FORECAST)
    with pytest.raises(ValueError, match=r"16 paths tell nothing of the levels 0.01 and 0.9"):
        replace(FORECAST, quantile_levels=(0.01, 0.9)).__post_init__()


@pytest.mark.parametrize("architecture", SAMPLERS)
def test_poison_stays_in_its_row(architecture: str) -> None:
    """NaN in one model's row or target changes no bit of its neighbours' paths."""
    family = build_family(architecture, SMALL)
    block = torch.from_numpy(np.stack([family.row(random_tensors(family, seed)) for seed in range(5)]))
    bound, x = family.bind(block), torch.ones(5, *family.input_shape)
    clean = family.forward(bound, x)
    block[1], x[3, 0] = torch.nan, torch.nan
    poisoned = family.forward(bound, x)
    assert poisoned[[1, 3]].isnan().all()
    assert torch.equal(poisoned[[0, 2, 4]], clean[[0, 2, 4]])


def test_the_filter_draws_from_the_joint_distribution() -> None:
    """Mean and covariance of many paths given the past are those of the Gaussian that the model is, by brute force."""
    family = build_family("deepstate", {**SMALL, "season": 8, "harmonics": 1, "paths": 10_000, "prediction_length": 3})
    assert isinstance(family, Deepstate)
    numbers = torch.randn((1, 8, 4), generator=torch.Generator().manual_seed(1))
    past, constants = torch.tensor([[0.5, -1.0, 2.0, 0.3, 1.0]]), make_state_space(family.config)
    found = Filter(constants, numbers)
    for step, value in enumerate(past.unbind(1)):
        found.update(step, value[:, None] - found.predict(step)[0])
    paths = found.drawn(5, draw_normals(torch.tensor([[3.0, 4.0]]), 10_000, 3))[0].double()
    mean, covariance = _compute_joint(numbers[0].double(), [each.double() for each in constants])
    seen, ahead = covariance[:5, :5], covariance[5:, :5]
    expected = mean[5:] + ahead @ torch.linalg.solve(seen, past[0].double() - mean[:5])
    conditional = covariance[5:, 5:] - ahead @ torch.linalg.solve(seen, ahead.T)
    assert ((paths.mean(1) - expected).abs() < 4 * (conditional.diagonal() / 10_000).sqrt()).all()
    torch.testing.assert_close(torch.cov(paths), conditional, atol=0.1, rtol=0.05)


def _compute_joint(numbers: torch.Tensor, constants: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [T] and covariance [T, T] of the observations, written out from the state's covariances."""
    observation, turn, changes = constants
    scales = (torch.nn.functional.softplus(numbers[:, 1:]) + 1e-2).square()
    steps, states = len(numbers), [torch.eye(len(turn), dtype=torch.float64)]
    for step in range(steps - 1):
        states.append(turn @ states[-1] @ turn.T + torch.diag(scales[step, 1:] @ changes))
    covariance = torch.diag(scales[:, 0])
    for i in range(steps):
        moved = states[i]
        for j in range(i, steps):
            covariance[i, j] += observation @ moved @ observation
            covariance[j, i] = covariance[i, j]
            moved = moved @ turn.T
    return numbers[:, 0], covariance


@pytest.mark.parametrize("architecture", SAMPLERS)
def test_the_likelihood_rewards_the_truth(architecture: str) -> None:
    """A path the network drew itself is likelier than one of noise; a missing target counts nothing, batched or not."""
    family = build_family(architecture, SMALL)
    x = torch.randn((5, *family.input_shape), generator=torch.Generator().manual_seed(0))
    tensors = random_tensors(family, 1)
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        y = network(x)[..., 0]
        own, other = network(x, y), network(x, y + 5)
        assert (own < other).all()
        y[:, 2] = torch.nan
        assert network(x, y).isfinite().all()
        fitted_by = get_likelihood(family)
        assert fitted_by is not None
        parts = unflatten_weights(family, torch.from_numpy(flatten_tensors(family, tensors))[None])
        batched = fitted_by(parts, x[None].transpose(2, 3)[:, :, -compute_reach(family) :], y[None])
        torch.testing.assert_close(batched[0], network(x, y))
        answers = get_batched_forward(family)(parts, x[None].transpose(2, 3))
        torch.testing.assert_close(answers[0], network(x))


def test_the_deepstate_likelihood_is_that_of_its_joint_distribution() -> None:
    """-log p of all targets together, by brute force, up to the constant."""
    config = {**SMALL, "season": 8, "harmonics": 1, "context_length": 9, "prediction_length": 3}
    family = build_family("deepstate", config)
    network = family.reference()
    assert isinstance(network, DeepstateReference)
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn((1, *family.input_shape), generator=random), torch.randn((1, 3), generator=random)
    with torch.no_grad():
        loss = network(x, y)
        states, _ = network.gru(x[:, :-1].transpose(1, 2))
        constants = [each.double() for each in make_state_space(network.config)]
        mean, covariance = _compute_joint(network.head(states)[0].double(), constants)
    error = torch.cat([x[0, 0, 3:], y[0]]).double() - mean
    expected = (error @ torch.linalg.solve(covariance, error) + covariance.logdet()) / 2
    assert loss.item() * 9 / 3 == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SAMPLERS)
def test_a_fit_learns_the_day_and_its_spread(architecture: str) -> None:
    """A few epochs beat the naive forecast clearly, and about 80 in 100 held-out values lie in the 80 % interval."""
    series = make_series()
    forecast = make_recipe(series, 48, context_length=48, prediction_length=24, scaling="linear", paths=50)
    fitting = Fitting(epochs=8, batch=32, learning_rate=1e-2, average=0.95, holdout_windows=24, checks=6)
    (found,) = fit_forecasters([series], [forecast], architecture, {"hidden": 12, "paths": 50}, fitting)
    assert found.loss < 0.85 * found.naive_loss
    quantiles = found.golden.response["predictions"][0]["quantiles"]
    inside = (np.array(quantiles["0.1"]) < series.values[-24:]) & (series.values[-24:] < np.array(quantiles["0.9"]))
    assert inside.mean() > 0.5
