"""`lear`: it reads the numbers of Lago et al., its regressions are at their optimum, and it holds up on their data."""

import csv
import gzip
import os
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from handlers.codecs.deepar import DeepAr
from handlers.errors import RequestError
from handlers.forecasters import build_family
from handlers.forecasters.lear import Lear, LearConfig, list_taps
from handlers.training import quantile_lasso
from handlers.training.batched_networks import get_input_needs
from handlers.training.fit import Fitted, Fitting, fit_forecasters
from handlers.training.input_recipe import list_origins, make_recipe
from handlers.training.quantile_lasso import Coefficients, Problem, Regressions
from handlers.training.time_series import Series, SeriesInvalid, read_csv
from handlers.training.windows import Windows
from model_store.archives.manifest import ForecastSpec
from model_store.errors import ArchiveInvalid

START = datetime.fromisoformat("2024-01-01 05:00")  # a Monday
HOURS = 24 * 300


def make_series(seed: int = 0, hours: int = HOURS) -> Series:
    """Hourly prices that a load of the same hour and yesterday's price tell, and that are lower on Sundays."""
    rng = np.random.default_rng(seed)
    load, values = rng.normal(1000, 100, (1, hours)), np.zeros(hours)
    for t in range(hours):
        sunday = (START + t * timedelta(hours=1)).weekday() == 6
        values[t] = 0.5 * values[t - 24] + load[0, t] / 50 - 8 * sunday + rng.normal(0, 1)
    return Series(f"market{seed}", START, timedelta(hours=1), values, load, ("load",))


def make_forecast(series: Series, origin: str = "00:00", context: int = 192) -> ForecastSpec:
    """The recipe of `fleetcast train --architecture lear`."""
    return make_recipe(
        series, context, context_length=context, prediction_length=24, weekdays=True, origin=origin, scaling="linear"
    )


def make_fit(*series: Series, **config: int) -> list[Fitted]:
    """Fitted with the last tenth held out."""
    return fit_forecasters(series, [make_forecast(each) for each in series], "lear", {**config}, Fitting())


def test_an_hour_that_is_not_observed_in_the_holdout_is_fitted_like_the_others() -> None:
    """No loss of 0 chooses its penalty, which would be the largest of all."""
    series = make_series()
    values = series.values.copy()
    hours = (np.arange(HOURS) + START.hour) % 24
    values[(hours == 7) & (np.arange(HOURS) > 0.88 * HOURS)] = np.nan
    (found,) = make_fit(replace(series, values=values))
    used = (np.abs(found.tensors["head.weight"].reshape(24, -1)) > 1e-3).sum(1)
    assert used[7] > used[[6, 8]].min() / 2, used  # 221 of 253; by the largest penalty 60


def test_it_reads_the_regressors_of_lago_et_al() -> None:
    """Prices of d-1, d-2, d-3, d-7, the covariate of d, d-1, d-7 and the weekday: by value, for a request of ours."""
    series = make_series()
    forecast, end = make_forecast(series), 24 * 20 - 5  # midnight
    request = {"instances": [series.instance(end - forecast.history_length, end, 24)]}
    rows, _ = DeepAr(forecast).decode(msgspec.json.encode(request))
    family = build_family("lear", {"features": len(forecast.inputs), "marks": 7})
    assert isinstance(family, Lear)
    read = rows[0].ravel()[family.taps.numpy()]
    days = [series.values[end - 24 * back : end - 24 * back + 24] for back in (1, 2, 3, 7)]
    loads = [series.known[0, end - 24 * back : end - 24 * back + 24] for back in (0, 1, 7)]
    scaler, load_scaler = forecast.scaler, forecast.inputs[1].scaler
    expected = [
        *((np.concatenate(days) - scaler.center) / scaler.scale),
        *((np.concatenate(loads) - load_scaler.center) / load_scaler.scale),
        *np.eye(7)[(START + end * timedelta(hours=1)).weekday()],
    ]
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)
    assert len(read) == 4 * 24 + 3 * 24 + 7


def test_blocks_before_the_context_are_left_out() -> None:
    """A context of three days has d-1, d-2 and d-3 of the price, and of covariates d and d-1."""
    config = LearConfig(features=3, context_length=72, marks=1)
    assert len(list(list_taps(config))) == 3 * 24 + 2 * 24 + 1
    assert get_input_needs(build_family("lear", {"features": 3})).context == 192


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"features": 3, "past": 2, "marks": 2}, "past 2 and marks 2 are more than the 3 features"),
        ({"features": 1, "context_length": 23}, "make context_length at least prediction_length"),
        ({"features": 1000, "quantiles": 1000}, "are more than 67108864 parameters; name fewer past_blocks"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config: dict[str, int], said: str) -> None:
    """The message names the fields and what to do."""
    with pytest.raises(ArchiveInvalid, match=said):
        build_family("lear", config)


def make_problem(features: int = 6, windows: int = 400) -> Problem:
    """Two steps and two levels, which two of the features tell, with gaps; mean and spread not standard."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((windows, features), generator=random)
    y = x[:, :2] + 0.3 * x[:, 1:3] + 0.4 * torch.randn((windows, 2), generator=random)
    y[torch.rand(y.shape, generator=random) < 0.05] = torch.nan
    return Problem(5 + 3 * x, y, torch.tensor([0.3, 0.5]))


def compute_objective(problem: Problem, found: Coefficients, penalty: torch.Tensor) -> torch.Tensor:
    """What is to be least of every column, as the module says it; the losses' mean is over all windows, gaps too."""
    y, spread = problem.y.repeat_interleave(2, 1), problem.x.std(0, correction=0)[:, None]
    losses, standard = (
        quantile_lasso.compute_losses(problem, found) * (~y.isnan()).float().mean(0),
        found.weight * spread,
    )
    return losses + penalty * standard.abs().sum(0) + quantile_lasso.RIDGE / (2 * len(y)) * (standard**2).sum(0)


@pytest.mark.slow
def test_the_regressions_are_at_their_optimum() -> None:
    """No step from what is found, of one coefficient or in any of many directions, comes lower (it is convex)."""
    problem, random = make_problem(), torch.Generator().manual_seed(1)
    regressions = Regressions(problem, quantile_lasso.make_null_model(problem))
    penalty = regressions.penalties()[1]
    found = regressions.solve(penalty, 2000)
    least = compute_objective(problem, found, penalty)
    active = found.weight != 0
    assert 0 < active.sum() < active.numel()
    directions = [*torch.eye(7), *torch.randn((200, 7), generator=random)]
    for size in (1e-3, 1e-2, -1e-3, -1e-2):
        for each in directions:
            moved = Coefficients(found.weight + size * each[:-1, None], found.bias + size * each[-1])
            assert (compute_objective(problem, moved, penalty) > least - 1e-5).all()


@pytest.mark.slow
def test_a_fit_that_goes_on_ends_where_one_from_the_beginning_does() -> None:
    """From another penalty's solution, and from coefficients that are handed over, the optimum is the same."""
    problem = make_problem()
    regressions = Regressions(problem, quantile_lasso.make_null_model(problem))
    _, penalty, *_, least = regressions.penalties()
    handed = regressions.solve(least)
    gone_on = regressions.solve(penalty, 2000)
    anew = Regressions(problem, handed).solve(penalty, 2000)
    torch.testing.assert_close(gone_on.weight, anew.weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(gone_on.bias, anew.bias, atol=1e-2, rtol=0)


def test_without_a_penalty_each_level_is_undershot_as_often_as_it_says() -> None:
    """The part of observed targets below the answer is the level, of every column; gaps count for nothing."""
    problem = make_problem(features=3, windows=3000)
    found = Regressions(problem, quantile_lasso.make_null_model(problem)).solve(torch.zeros(4), 500)
    answers = torch.addmm(found.bias, problem.x, found.weight).view(-1, 2, 2)
    seen = ~problem.y.isnan()
    below = ((problem.y[..., None] < answers) & seen[..., None]).sum(0) / seen.sum(0)[:, None]
    torch.testing.assert_close(below, problem.levels.expand(2, 2), atol=0.01, rtol=0)


def test_a_path_begins_below_the_penalty_at_which_all_coefficients_are_zero() -> None:
    """At that penalty they are, below it they are not; a column that is always the same stays without a weight."""
    problem = make_problem()
    problem.x[:, 3] = 1.0
    regressions = Regressions(problem, quantile_lasso.make_null_model(problem))
    path = regressions.penalties()
    assert regressions.solve(1.01 * path[0] / quantile_lasso.LARGEST, 500).weight.abs().max() == 0
    found = regressions.solve(path[0], 200).weight
    assert found.abs().max() > 0.1
    assert found[3].abs().max() == 0


@pytest.mark.slow
def test_it_finds_what_the_prices_are_made_of() -> None:
    """Of 175 numbers the fit names the step's load and yesterday's price of its hour, and comes near the noise."""
    hours = np.arange(24)
    for found in make_fit(make_series(0), make_series(1)):
        assert found.loss < 0.25 * found.naive_loss
        weight = np.abs(found.tensors["head.weight"].reshape(24, 5, -1)[:, 2])
        assert weight[hours, 96 + hours].mean() * found.forecast.scaler.scale == pytest.approx(2, rel=0.1)
        assert weight[hours, hours].mean() > 0.2
        weight[hours, hours] = weight[hours, 96 + hours] = 0
        assert weight.mean() < 0.02


@pytest.mark.slow
def test_a_fit_does_not_depend_on_its_neighbours() -> None:
    """A market's numbers are equal bit by bit, whether it is fitted alone or with another on two threads."""
    first, second = make_series(0), make_series(1)
    alone = make_fit(second)[0]
    forecasts = [make_forecast(first), make_forecast(second)]
    together = fit_forecasters([first, second], forecasts, "lear", {}, Fitting(threads=2))[1]
    np.testing.assert_array_equal(alone.tensors["head.weight"], together.tensors["head.weight"])


def test_members_see_calibration_windows_of_their_own() -> None:
    """Three members differ, and the archive's loss is that of their mean."""
    (found,) = make_fit(make_series(), members=3)
    members = [found.tensors[f"members.{i}.head.weight"] for i in range(3)]
    assert not np.array_equal(members[0], members[1])
    assert not np.array_equal(members[1], members[2])
    assert found.config["members"] == 3
    assert found.loss < 0.3 * found.naive_loss


def test_windows_start_at_the_origin() -> None:
    """Every window that is drawn or held out forecasts from midnight; without an origin from any hour."""
    series = make_series()
    data = Windows([series], [make_forecast(series)], 192, 0.1)
    starts = torch.cat([data.drawn(data.train, 200, torch.Generator().manual_seed(0))[0], data.held_out(99)[0]])
    assert {series.stamp(at)[11:] for at in starts.tolist()} == {"00:00:00"}
    assert len(set(starts.tolist())) > 90
    free = Windows([series], [make_forecast(series, "")], 192, 0.1)
    anywhere = free.drawn(free.train, 500, torch.Generator().manual_seed(0))
    assert len({series.stamp(at)[11:] for at in anywhere[0].tolist()}) == 24


def test_an_origin_that_no_step_has_is_named() -> None:
    """Hours that begin at half past have no midnight."""
    series = make_series(hours=48)
    moved = Series("p", START + timedelta(minutes=30), series.step, series.values, series.known, series.known_names)
    assert list(list_origins(series, make_forecast(series, "06:00"))) == [1, 25]
    with pytest.raises(SeriesInvalid, match=r"p: no step of 1h from 2024-01-01 05:30:00 on is at 00:00 every day"):
        list_origins(moved, make_forecast(series))


def test_a_request_from_another_hour_is_refused() -> None:
    """The coefficients belong to hours: a target that ends at one o'clock is answered with what to do."""
    series = make_series()
    forecast, end = make_forecast(series), 24 * 20 - 4
    body = msgspec.json.encode({"instances": [series.instance(end - 192, end, 24)]})
    with pytest.raises(RequestError, match=r"first forecast step is 2024-01-21 01:00:00, .* from 00:00 on") as refused:
        DeepAr(forecast).decode(body)
    assert (refused.value.instance, refused.value.field) == (0, "target")


@pytest.mark.parametrize("market", ["BE", "DE", "FR", "NP", "PJM"])
def test_it_is_as_good_as_the_published_lear(market: str) -> None:
    """Fitted once, two test years on: the median's MAE is at most 3 % above their LEAR that is refitted every day."""
    folder = Path(os.environ.get("FLEETCAST_DATA", ""), "epf")
    if not folder.is_dir():
        pytest.skip("FLEETCAST_DATA names no folder with the markets of Lago et al. 2021 (epf)")
    (series,) = read_csv(folder / f"{market}.csv.gz", "datetime_local", ["price"], ["exog1", "exog2"])
    test = len(series.values) - 17_472
    before = series.before(series.start + test * series.step)
    forecast = make_recipe(before, 192, context_length=192, prediction_length=24, weekdays=True, origin="00:00")
    (found,) = fit_forecasters([before], [forecast], "lear", {}, Fitting())
    family = build_family("lear", found.config)
    bound = family.bind(torch.from_numpy(family.row(found.tensors))[None])
    errors = []
    for start in range(test, len(series.values), 24):
        body = {"instances": [series.instance(start - 192, start, 24)], "configuration": {"quantiles": ["0.5"]}}
        rows, encode = DeepAr(forecast).decode(msgspec.json.encode(body))
        answer = msgspec.json.decode(encode(family.forward(bound, torch.from_numpy(rows)).numpy()))
        errors.append(np.abs(answer["predictions"][0]["quantiles"]["0.5"] - series.values[start : start + 24]))
    with gzip.open(folder / f"{market}_reference_forecasts.csv.gz", "rt") as file:
        theirs = [abs(float(row["lear_1456"]) - float(row["real_price"])) for row in csv.DictReader(file)]
    assert np.mean(errors) < 1.03 * np.mean(theirs)
