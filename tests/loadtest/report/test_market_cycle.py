"""A turn of the market's clock: the feed, the bodies, what is read of answers, and what moves together."""

import json
from datetime import datetime, timedelta

import numpy as np
import orjson
import pytest

from handlers.training.time_series import Series
from loadtest.driver.market_client import (
    Feed,
    MarketClient,
    NotAnswered,
    rank_correlation,
    read_quantiles,
    write_turn_bodies,
)
from loadtest.fleets.synthetic_markets import make_coupled_markets
from loadtest.observe.processes import find_free_port
from model_store.names import ModelName

START = datetime(2025, 1, 6)  # noqa: DTZ001 -- stamps have no zone
MODELS = {"a": ModelName("a.mar"), "b": ModelName("b.mar")}


def feed(keep: int = 3) -> Feed:
    """Two products, five hours published."""
    rows = np.arange(10.0).reshape(2, 5)
    none = np.empty((0, 5))
    return Feed(
        [Series(name, START, timedelta(hours=1), row, none) for name, row in zip("ab", rows, strict=True)], keep
    )


def test_a_published_interval_is_the_last_that_is_asked_with() -> None:
    """A line becomes the newest price of every product, the oldest goes, the start moves; an empty price is null."""
    published = feed()
    published.publish("2025-01-06 05:00:00,7.5,")
    assert published.rows.shape == (3, 2)
    asked = json.loads(write_turn_bodies(published.requests(MODELS, 3), ModelName("j.mar"), 10, 7).quantiles)
    assert asked["requests"][0] == {"target_model": "a.mar", "start": "2025-01-06 03:00:00", "target": [3.0, 4.0, 7.5]}
    assert asked["requests"][1]["target"] == [8.0, 9.0, None]
    assert asked["configuration"] == {"output_types": ["quantiles"]}


@pytest.mark.parametrize(
    "line", ["2025-01-06 06:00:00,1,2", "2025-01-06 05:00:00,1", "soon,1,2", "2025-01-06 05:00,x,2"]
)
def test_only_the_next_interval_is_taken(line: str) -> None:
    """A gap, a missing column, no stamp, no number: refused, and nothing has changed."""
    published = feed()
    with pytest.raises(ValueError, match=r"expected|[Ii]nvalid|convert"):
        published.publish(line)
    assert published.next == START + timedelta(hours=5)
    assert published.rows[-1].tolist() == [4.0, 9.0]


def test_both_calls_are_about_the_same_histories() -> None:
    """They differ in the configuration alone, and the joint one names correlation, number and seed."""
    asked = write_turn_bodies(feed().requests(MODELS, 2), ModelName("j.mar"), 10, 7)
    tick, joint = json.loads(asked.quantiles), json.loads(asked.scenarios)
    assert tick["requests"] == joint["requests"]
    assert joint["configuration"] == {"joint": True, "correlation": "j.mar", "num_samples": 10, "seed": 7}


def test_quantiles_are_read_by_level() -> None:
    """Levels ascend as numbers and are the last axis; a product without a forecast is named with its reason."""
    good = {"quantiles": {"0.5": [2, 3], "0.1": [1, 2], "0.95": [4, 5]}}
    levels, found = read_quantiles(orjson.dumps({"predictions": [good, good], "failed": 0}), ["a", "b"])
    assert levels == [0.1, 0.5, 0.95]
    assert found.shape == (2, 2, 3)
    assert found[1, 1].tolist() == [2, 3, 5]
    bad = {"error": {"code": "not_found", "message": "b.mar is not in the store"}}
    with pytest.raises(NotAnswered, match=r"no forecast of b: b\.mar is not in the store \(1 of 2 failed\)"):
        read_quantiles(orjson.dumps({"predictions": [good, bad], "failed": 1}), ["a", "b"])


def test_what_moves_together_is_found() -> None:
    """A product and a rising function of it have 1, a falling one -1, another by itself about 0; the diagonal is 1."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 400, 6))
    found = rank_correlation(np.stack([one, np.exp(one), -one, other], axis=1).astype(np.float32))
    assert found[0, :3] == pytest.approx([1.0, 1.0, -1.0])
    assert abs(found[0, 3]) < 0.1
    assert found.diagonal() == pytest.approx(np.ones(4))


def test_nobody_there_is_said() -> None:
    """The address and what to start are in the message; an address that is none is a wrong flag."""
    address = f"http://127.0.0.1:{find_free_port()}"
    with (
        MarketClient(address) as client,
        pytest.raises(NotAnswered, match=rf"{address} does not answer.*fleetcast serve"),
    ):
        client.forecasts(b"{}")
    with pytest.raises(ValueError, match="give http://HOST:PORT"):
        MarketClient("localhost:8080")


def test_coupled_markets_are_coupled() -> None:
    """Energy prices of regions rise together, raise reserves with them, lower reserves against; the seed decides."""
    markets = make_coupled_markets(["x", "y"], ["energy", "raise", "lower"], 3, 24 * 60, 24)
    assert [each.name for each in markets][:4] == ["x/energy", "x/raise", "x/lower", "y/energy"]
    ranks = np.stack([each.values for each in markets]).argsort(axis=1).argsort(axis=1)
    found = np.asarray(np.corrcoef(ranks))
    assert found[0, 3] > 0.6
    assert found[0, 1] > 0.3
    assert found[0, 2] < -0.3
    assert found[2, 5] > 0.3
    again, other = (
        make_coupled_markets(["x", "y"], ["energy", "raise", "lower"], seed, 24 * 60, 24) for seed in (3, 4)
    )
    np.testing.assert_array_equal(markets[5].values, again[5].values)
    assert (markets[5].values != other[5].values).mean() > 0.9
