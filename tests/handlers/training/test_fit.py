"""Training runs the served network on the served inputs, learns, and repeats itself."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from handlers.base import Family
from handlers.codecs.deepar import DeepAr
from handlers.codecs.features import to_network
from handlers.forecasters import build_family, random_tensors
from handlers.golden import find_mismatch
from handlers.training.batched_networks import compute_reach, flatten_tensors, get_batched_forward, unflatten_weights
from handlers.training.fit import Fitted, Fitting, ask_network, compute_pinball, fit_forecasters, make_reference_network
from handlers.training.input_recipe import compute_naive_lag, make_recipe
from handlers.training.time_series import Series, SeriesInvalid
from handlers.training.windows import Windows
from model_store.archives.manifest import ForecastSpec

pytestmark = pytest.mark.slow

QUICK = Fitting(epochs=12, batch=32, learning_rate=8e-3, average=0.95, holdout_windows=24, checks=8)
SMALL = {"channels": 12}
START = datetime.fromisoformat("2024-01-01")


def make_series(seed: int = 0, steps: int = 24 * 40, known: int = 0) -> Series:
    """Hourly prices with a daily shape of the seed's own and some noise, and covariates that tell part of it."""
    rng = np.random.default_rng(seed)
    hours = np.arange(steps)
    covariates = rng.normal(1000, 100, (known, steps))
    values = 50 + 20 * np.sin(2 * np.pi * (hours + seed) / 24) + rng.normal(0, 5, steps) + covariates.sum(0) / 50
    names = tuple(f"load{i}" for i in range(known))
    return Series(f"market{seed}", START, timedelta(hours=1), values, covariates, names)


def make_forecast(series: Series, context: int = 168, prediction: int = 24) -> ForecastSpec:
    """The default recipe for a default `tcn`."""
    return make_recipe(series, min(81, context), context_length=context, prediction_length=prediction)


def make_fit(count: int, fitting: Fitting = QUICK, architecture: str = "tcn") -> list[Fitted]:
    """That many series, fitted together."""
    series = [make_series(seed) for seed in range(count)]
    config = SMALL if architecture in ("tcn", "mqcnn") else {"hidden": 16}
    context = 168 if architecture in ("tcn", "mqcnn", "mlp") else 36
    return fit_forecasters(series, [make_forecast(each, context) for each in series], architecture, {**config}, fitting)


@pytest.mark.parametrize(
    "family",
    [
        build_family("tcn", {"features": 3, "channels": 5}),
        build_family("tcn", {"features": 3, "channels": 4, "context_length": 50, "kernel": 3}),
        build_family("tcn", {"features": 2, "channels": 4, "context_length": 7, "kernel": 2, "layers": 5}),
        build_family("mlp", {"features": 2, "context_length": 12, "hidden": 6}),
        build_family("gru", {"features": 2, "context_length": 12, "hidden": 6, "layers": 2}),
        build_family("seq2seq", {"features": 3, "context_length": 26, "hidden": 6, "layers": 2}),
        build_family("lear", {"features": 4, "context_length": 30, "prediction_length": 4, "marks": 1}),
        build_family("ddnn", {"features": 4, "context_length": 30, "prediction_length": 4, "marks": 1, "hidden": 5}),
        build_family("mqcnn", {"features": 3, "channels": 5, "prediction_length": 6}),
        build_family("mqcnn", {"features": 3, "channels": 5, "kernel": 2, "layers": 2, "prediction_length": 6}),
        build_family("mqrnn", {"features": 3, "context_length": 26, "prediction_length": 6, "hidden": 6}),
        build_family("mlp", {"features": 2, "context_length": 12, "hidden": 6, "members": 3}),
        build_family("tcn", {"features": 3, "channels": 5, "members": 2}),
        build_family(
            "mixture",
            {
                "features": 3,
                "parts": [{"architecture": "mlp", "inputs": [2, 0]}, {"architecture": "tcn", "members": 2}],
            },
        ),
        build_family("esrnn", {"features": 3, "context_length": 14, "season": 4, "hidden": 6}),
        build_family("recursive", {"features": 3, "context_length": 26, "prediction_length": 5, "hidden": 6}),
    ],
    ids=lambda family: str(family.key),
)
def test_the_batched_forward_is_the_reference_network(family: Family) -> None:
    """For models with different weights, answers and gradients are those of the plain networks."""
    states = [random_tensors(family, seed) for seed in range(3)]
    weights = torch.from_numpy(np.stack([flatten_tensors(family, state) for state in states])).requires_grad_()
    x = torch.randn((3, 4, *family.input_shape), generator=torch.Generator().manual_seed(0))
    answers = get_batched_forward(family)(
        unflatten_weights(family, weights), x.transpose(2, 3)[:, :, -compute_reach(family) :]
    )
    (gradient,) = torch.autograd.grad(answers.square().sum(), weights)
    for model, state in enumerate(states):
        network = family.reference()
        network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in state.items()})
        expected = network(x[model])
        gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
        torch.testing.assert_close(answers[model], expected, rtol=1e-5, atol=1e-5)
        for (name, _), expected in zip(network.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(unflatten_weights(family, gradient)[name][model], expected, rtol=1e-4, atol=1e-4)


def test_training_sees_what_the_server_will_see() -> None:
    """A training window is the tail of what DeepAr decodes from the request: lags, calendar, covariates, gaps."""
    series = [make_series(seed, known=2) for seed in range(3)]
    for each in series:
        each.values[[300, 301, 420, 555]] = np.nan
    forecasts = [make_forecast(each) for each in series]
    assert [channel.lag for channel in forecasts[0].inputs if channel.source == "target"] == [0, 144]
    data = Windows(series, forecasts, 81, 0.1)
    starts = torch.tensor([[312, 560], [777, 422], [400, 936]])
    x, y = data.cut(starts, slice(0, 3))
    for model, (each, forecast) in enumerate(zip(series, forecasts, strict=True)):
        for at, start in enumerate(starts[model].tolist()):
            request = {"instances": [each.instance(start - forecast.history_length, start, 24)]}
            rows, _ = DeepAr(forecast).decode(msgspec.json.encode(request))
            np.testing.assert_array_equal(x[model, at].T, rows[0, :, -81:])
            target = to_network(each.values[start : start + 24], forecast.scaler).astype(np.float32)
            np.testing.assert_array_equal(y[model, at], target)


def test_windows_do_not_reach_from_training_into_the_holdout() -> None:
    """The last training window's forecast ends where the first held-out one begins; nothing of either is left out."""
    data = Windows([make_series()], [make_forecast(make_series())], 81, 0.1)
    drawn = data.drawn(data.train, 5000, torch.Generator().manual_seed(0))
    held = data.held_out(10_000)
    assert (drawn.min().item(), drawn.max().item() + 24) == (168 + 144, held.min().item())
    assert held.max().item() == 24 * 40 - 24


def test_pinball_by_hand() -> None:
    """Above the quantile an error costs its level, below one minus it; a missing value costs nothing."""
    y = torch.tensor([3.0, 1.0, torch.nan])
    forecast = torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    loss = compute_pinball(y, forecast, torch.tensor([0.1, 0.9]))
    assert loss.item() == pytest.approx((0.1 * 2 + 0.9 * 2) / 2 + (0.9 * 1 + 0.1 * 1) / 2)


@pytest.mark.parametrize("architecture", ["tcn", "mlp", "gru", "seq2seq", "mqcnn", "mqrnn", "esrnn", "recursive"])
def test_every_model_of_a_fit_learns_its_own_series(architecture: str) -> None:
    """Series with different phases, fitted together, each beat the naive forecast clearly."""
    slow = architecture not in ("tcn", "mlp", "mqcnn")
    for found in make_fit(2 if slow else 3, replace(QUICK, epochs=6 if slow else 12), architecture):
        assert found.loss < 0.8 * found.naive_loss
        low, high = (np.array(found.golden.response["predictions"][0]["quantiles"][level]) for level in ("0.1", "0.9"))
        assert (high > low).mean() > 0.9


@pytest.mark.parametrize("architecture", ["tcn", "gru", "mqcnn"])
def test_the_same_seed_gives_the_same_numbers_on_any_number_of_threads(architecture: str) -> None:
    """Tensors are equal bit by bit for 1 and 3 threads, and differ for another seed."""
    first, again, other = (
        make_fit(3, replace(QUICK, epochs=2, seed=seed, threads=threads), architecture)
        for seed, threads in ((1, 1), (1, 3), (2, 1))
    )
    for a, b, c in zip(first, again, other, strict=True):
        for name, tensor in a.tensors.items():
            np.testing.assert_array_equal(tensor, b.tensors[name])
        assert any((tensor != c.tensors[name]).any() for name, tensor in a.tensors.items())


def test_the_best_weights_of_each_model_are_kept() -> None:
    """A run that is far too long learns the noise by heart, yet ends with the weights from before it did."""
    losses: list[float] = []
    series = [make_series(seed, steps=600) for seed in range(2)]
    forecasts = [make_forecast(each) for each in series]
    long = Fitting(epochs=100, batch=32, learning_rate=2e-2, average=0.9, patience=100, holdout_windows=48)
    found = fit_forecasters(
        series, forecasts, "tcn", {"channels": 16}, long, lambda _done, _steps, loss: losses.append(loss)
    )
    assert losses == sorted(losses, reverse=True)
    assert sum(each.loss for each in found) < 3.3  # 3.13; the last weights have 3.45, the naive forecast 5.09


@pytest.mark.parametrize("architecture", ["tcn", "mlp", "gru", "esrnn", "lear"])
def test_a_fit_has_learnt_from_the_last_rows_too(architecture: str) -> None:
    """Another last day, in the middle of the holdout's windows, gives other weights after as many steps."""
    once = replace(QUICK, epochs=0.5, checks=1)
    series = make_series(steps=960)
    values = series.values.copy()
    values[-24:] += 30.0
    other, context = replace(series, values=values), 168 if architecture in ("tcn", "mlp", "lear") else 36
    recipe = make_forecast(series, context)
    config = {"tcn": SMALL, "lear": {}}.get(architecture, {"hidden": 8})
    first, second = (fit_forecasters([each], [recipe], architecture, {**config}, once)[0] for each in (series, other))
    assert any((tensor != second.tensors[name]).any() for name, tensor in first.tensors.items())


def test_a_refit_is_as_long_as_was_best_on_the_holdout() -> None:
    """A run that is far too long learns the noise by heart, also of all rows; what is kept forecasts well."""
    series, long = make_series(steps=1200), Fitting(epochs=60, batch=32, learning_rate=2e-2, average=0.9, patience=100)
    before = replace(series, values=series.values[:600], known=series.known[:, :600])
    recipe = make_forecast(before)
    (found,) = fit_forecasters([before], [recipe], "tcn", {"channels": 16}, long)
    network = make_reference_network("tcn", found.config, found.tensors)
    errors = []
    for at in range(600, 1170, 24):
        request = {"instances": [series.instance(at - recipe.history_length, at, 24)]}
        answer = ask_network(network, recipe, request)["predictions"][0]["quantiles"]["0.5"]
        errors.append(np.abs(series.values[at : at + 24] - answer).mean())
    assert np.mean(errors) < 5.3, np.mean(errors)


def test_a_model_without_a_holdout_trains_to_the_end() -> None:
    """Nothing observed is no loss of 0, which the first look at the holdout would have and no later one beat."""
    series = make_series(steps=960)
    values = series.values.copy()
    values[-90:-1] = np.nan  # the windows that are looked at; the last one alone has a value, in its last step
    fitting = replace(QUICK, epochs=4, holdout_windows=1)
    (short,) = fit_forecasters([replace(series, values=values)], [make_forecast(series)], "tcn", {**SMALL}, fitting)
    assert np.isnan(short.loss)
    golden = short.golden.response["predictions"][0]["quantiles"]
    assert np.ptp(golden["0.5"]) > 15  # the daily shape, which no network has after one check


@pytest.mark.parametrize("limit", [{"patience": 2}, {"max_seconds": 0.1}])
def test_a_run_ends_when_nothing_gets_better_or_time_is_up(limit: dict[str, Any]) -> None:
    """Patience and the time limit each end a run long before its last step."""
    steps: list[tuple[int, int]] = []
    series, fitting = make_series(), replace(QUICK, epochs=500, checks=200, patience=1000)
    forecasts = [make_forecast(series)]
    fit_forecasters(
        [series], forecasts, "tcn", {**SMALL}, replace(fitting, **limit), lambda *done: steps.append(done[:2])
    )
    assert steps[-1][0] < steps[-1][1] / 2


def test_missing_values_neither_teach_nor_spoil() -> None:
    """With a tenth of the values gone the weights stay finite and the fit still beats the naive forecast."""
    series = make_series()
    series.values[np.random.default_rng(0).random(len(series.values)) < 0.1] = np.nan
    (found,) = fit_forecasters([series], [make_forecast(series)], "tcn", {**SMALL}, QUICK)
    assert found.loss < 0.85 * found.naive_loss


def test_a_golden_sample_is_the_reference_networks_answer() -> None:
    """Asked of the plain network, the sample's request gives its response; with slightly other weights it does not."""
    (found,) = make_fit(1, replace(QUICK, epochs=1))
    golden, tensors = found.golden, dict(found.tensors)
    network = make_reference_network("tcn", found.config, tensors)
    answer = ask_network(network, found.forecast, golden.request)
    assert find_mismatch(golden.response, answer, golden.abs_tolerance, golden.rel_tolerance) is None
    tensors["head.bias"] = tensors["head.bias"] + np.float32(0.01)
    answer = ask_network(make_reference_network("tcn", found.config, tensors), found.forecast, golden.request)
    assert find_mismatch(golden.response, answer, golden.abs_tolerance, golden.rel_tolerance) is not None


def test_too_short_a_series_says_how_long_it_must_be() -> None:
    """The length named in the error is enough, and one step fewer is not; so is any larger one."""
    series = make_series(steps=330)
    with pytest.raises(SeriesInvalid, match=r"market0 has 330 steps; at least (\d+) are needed") as error:
        Windows([series], [make_forecast(series)], 81, 0.1)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    for steps in (needed, needed + 1, needed + 25, needed + 300):
        enough = make_series(steps=steps)
        assert len(Windows([enough], [make_forecast(enough)], 81, 0.1)) == 1
    less = make_series(steps=needed - 1)
    with pytest.raises(SeriesInvalid, match=f"at least {needed} are needed"):
        Windows([less], [make_forecast(less)], 81, 0.1)


def test_a_holdout_of_which_nothing_is_observed_has_no_loss() -> None:
    """It is no loss of 0, which would be the best there is: no fit and no naive forecast can be judged by it."""
    series = make_series(steps=960)
    values = series.values.copy()
    values[-200:] = np.nan
    values[-1] = 5.0  # a value that no window of the naive forecast can be compared with
    (found,) = fit_forecasters([replace(series, values=values)], [make_forecast(series)], "tcn", {**SMALL}, QUICK)
    assert np.isnan(found.loss)
    assert np.isnan(found.naive_loss)


def test_series_that_cannot_be_fitted_together_are_refused() -> None:
    """Different lengths, no values at all, and none in the holdout are named with the series."""
    series, shorter = make_series(), make_series(1, steps=900)
    with pytest.raises(SeriesInvalid, match="market1 has 900 steps, market0 960; fit them apart"):
        Windows([series, shorter], [make_forecast(series), make_forecast(shorter)], 81, 0.1)
    forecast = make_forecast(series)
    series.values[850:] = np.nan
    with pytest.raises(SeriesInvalid, match="market0: no values in the holdout part"):
        Windows([series], [forecast], 81, 0.1)
    series.values[:] = np.nan
    with pytest.raises(SeriesInvalid, match="market0: no values to learn from"):
        make_forecast(series)


@pytest.mark.parametrize(
    ("minutes", "prediction", "lags", "naive"),
    [
        (60, 24, [0, 144], 24),
        (30, 48, [0, 288], 48),
        (5, 12, [0, 276, 2004], 288),
        (60, 36, [0, 132], 48),
        (24 * 60, 7, [0], 7),
        (7 * 24 * 60, 4, [0], 4),
    ],
)
def test_lags_show_the_same_time_a_day_and_a_week_before(
    minutes: int, prediction: int, lags: list[int], naive: int
) -> None:
    """The last `prediction` steps of a lagged channel lie whole days, and whole weeks, before the forecast ones."""
    step = timedelta(minutes=minutes)
    series = Series("p", START, step, np.arange(50.0), np.empty((0, 50)))
    forecast = make_recipe(series, 81, context_length=168, prediction_length=prediction)
    assert [channel.lag for channel in forecast.inputs if channel.source == "target"] == lags
    assert compute_naive_lag(minutes * 60, prediction) == naive
    features = {channel.feature for channel in forecast.inputs if channel.source == "calendar"}
    assert ("hour_sin" in features, "weekend" in features) == (minutes < 24 * 60, minutes < 7 * 24 * 60)


@pytest.mark.parametrize(("prediction", "shifts"), [(24, [24]), (81, [81]), (100, [100, 19]), (200, [200, 119, 38])])
def test_a_covariate_is_seen_at_every_forecast_step(prediction: int, shifts: list[int]) -> None:
    """Where the network's reach is shorter than the forecast, further channels tell of the steps before its reach."""
    series = make_series(steps=800, known=1)
    forecast = make_recipe(series, 81, context_length=300, prediction_length=prediction)
    channels = [channel for channel in forecast.inputs if channel.source == "dynamic_feat"]
    assert [channel.shift for channel in channels] == shifts
    seen = {shift - back for shift in shifts for back in range(81)}  # steps after the last known, 1 the first
    assert seen >= set(range(1, prediction + 1))
