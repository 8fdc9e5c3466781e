"""The evaluation of real markets measures what it says, asks without looking ahead, and passes on real prices."""

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.kinds import ArchiveParts, pack_model
from handlers.training.fit import Fitted, Fitting, ask_network, fit_forecasters, make_reference_network
from handlers.training.input_recipe import make_recipe
from handlers.training.time_series import Series, read_csv
from loadtest.benchmarks.markets import SAME, Score, ScoringClient, evaluate_market, make_request_for, score_market
from loadtest.fleets.synthetic_markets import make_markets
from loadtest.observe.local_server import run_local_server
from model_store.archives.manifest import Kind
from model_store.names import ModelName
from model_store.stores.object_store import open_source

TEST_FROM = datetime.fromisoformat("2025-03-20")
REAL = "nem/nsw_vic_hourly_2020_2024.csv.gz"


def fitted_before(series: Series, moment: datetime, fitting: Fitting, config: dict[str, Any]) -> Fitted:
    """A default hourly `tcn` of the series before the moment."""
    past = series.before(moment)
    forecast = make_recipe(past, 81, context_length=168, prediction_length=24)
    return fit_forecasters([past], [forecast], "tcn", config, fitting)[0]


def store_archive(folder: Path, fitted: Fitted) -> None:
    """The archive `{name}.mar` in the folder."""
    archive = pack_model(
        Kind.FORECASTER,
        ArchiveParts(
            tensors=fitted.tensors, architecture=fitted.architecture, config=fitted.config, forecast=fitted.forecast
        ),
        model_name=fitted.name,
        golden=fitted.golden,
    )
    (folder / f"{fitted.name}.mar").write_bytes(archive)


@pytest.fixture(scope="module")
def market() -> Series:
    """One synthetic market."""
    return make_markets(1, seed=0)[0]


@pytest.fixture(scope="module")
def fitted(market: Series) -> Fitted:
    """A forecaster of it."""
    return fitted_before(market, TEST_FROM, Fitting(epochs=6, batch=32, learning_rate=8e-3), {"channels": 8})


@pytest.fixture
def server_url(tmp_path: Path, fitted: Fitted) -> Iterator[str]:
    """A real server of the one archive."""
    store_archive(tmp_path, fitted)
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server:
        yield server.inference


@pytest.mark.e2e
def test_a_served_market_is_scored(market: Series, tmp_path: Path, server_url: str) -> None:
    """Through boto3 and real processes: every test day, the network's own numbers, one miss, and a useful forecast."""
    client = ScoringClient(server_url)
    found = evaluate_market(market, TEST_FROM, open_source(str(tmp_path)), client.ask)
    assert (found.days, client.cache) == (17, {"miss": 1, "hit": 16})
    assert (found.finite, found.is_sorted) == (True, True)
    assert found.difference <= SAME
    assert found.ratio < 0.9


@pytest.mark.slow
def test_other_numbers_than_the_networks_are_seen(market: Series, fitted: Fitted, tmp_path: Path) -> None:
    """A server that answers a cent too much is told from one that answers right."""
    store_archive(tmp_path, fitted)
    network = make_reference_network("tcn", fitted.config, fitted.tensors)

    def answer_wrongly(_: ModelName, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = ask_network(network, fitted.forecast, request)
        for values in answer["predictions"][0]["quantiles"].values():
            values[-1] += 0.05
        return answer

    found = evaluate_market(market, TEST_FROM, open_source(str(tmp_path)), answer_wrongly)
    assert "the served numbers are not those of the network" in found.failures


def test_a_request_holds_nothing_of_the_future(market: Series, fitted: Fitted) -> None:
    """History ends just before the forecast's first step: changing later values does not change the request."""
    request = make_request_for(market, 1000, fitted.forecast)
    changed = Series(market.name, market.start, market.step, market.values.copy(), market.known)
    changed.values[1000:] = 1e6
    assert make_request_for(changed, 1000, fitted.forecast) == request
    start = datetime.fromisoformat(request["instances"][0]["start"])
    assert start + timedelta(hours=len(request["instances"][0]["target"])) == market.start + timedelta(hours=1000)


def test_score_by_hand(fitted: Fitted) -> None:
    """Loss, coverage (ends included, missing values left out) and the naive loss of a case one can add up."""
    y = np.array([[10.0, 0.0, 5.0, np.nan]])
    quantiles = np.broadcast_to(np.array([0.0, 2.0, 4.0, 6.0, 8.0]), (1, 4, 5)).copy()
    found = score_market(y, quantiles, quantiles + 1e-9, np.full((1, 4, 1), 2.0), fitted.forecast)
    pairs = list(zip(fitted.forecast.quantile_levels, (0.0, 2.0, 4.0, 6.0, 8.0), strict=True))
    losses = [max(level * (v - q), (level - 1) * (v - q)) for v in (10.0, 0.0, 5.0) for level, q in pairs]
    assert found.pinball == pytest.approx(np.mean(losses))
    assert found.naive == pytest.approx((8 + 2 + 3) * 0.5 / 3)
    assert found.coverage == pytest.approx(2 / 3)
    assert found.difference < 1e-9
    assert found.is_sorted


def test_failures_are_named() -> None:
    """Each limit has its own words, and NaN passes none."""
    good = Score(366, 28.0, 49.0, 28 / 49, 0.72, 1e-6, finite=True, is_sorted=True)
    assert good.failures == []
    bad = Score(366, np.nan, 49.0, np.nan, np.nan, np.nan, finite=False, is_sorted=False)
    assert len(bad.failures) == 5


def test_real_prices_of_2024() -> None:
    """NSW1 fitted briefly on 2020-2023: pinball at most 0.7 of the lag-24 naive, 60-90 % of hours within 10-90 %."""
    path = Path(os.environ.get("FLEETCAST_DATA", ""), REAL)
    if not path.is_file():
        pytest.skip(f"FLEETCAST_DATA names no folder with {REAL}")
    (series,), year = read_csv(path, "nem_hour", ["NSW1"]), datetime.fromisoformat("2024-01-01")
    found = fitted_before(series, year, Fitting(epochs=4), {})
    network, horizon = make_reference_network("tcn", found.config, found.tensors), 24
    starts = np.arange(series.first_at(year), len(series.values) - horizon + 1, horizon)
    requests = [make_request_for(series, int(start), found.forecast) for start in starts]
    body = {"instances": [each["instances"][0] for each in requests], "configuration": requests[0]["configuration"]}
    levels = [str(level) for level in found.forecast.quantile_levels]
    answers = [
        [p["quantiles"][level] for level in levels] for p in ask_network(network, found.forecast, body)["predictions"]
    ]
    quantiles, steps = np.array(answers).transpose(0, 2, 1), starts[:, None] + np.arange(horizon)
    naive = series.values[steps - 24][..., None]
    result = score_market(series.values[steps], quantiles, quantiles, naive, found.forecast)
    assert (result.days, result.failures) == (366, [])
