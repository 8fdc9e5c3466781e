"""Synthetic markets look like markets, and a fleet of them is learned in one go."""

import numpy as np
import pytest

from loadtest.fleets.synthetic_markets import DAY, fit_fleet, make_markets

pytestmark = pytest.mark.slow


def test_a_market_depends_on_seed_and_place_alone() -> None:
    """More markets do not change the first ones; another seed changes all."""
    few, many, other = make_markets(2, seed=1), make_markets(5, seed=1), make_markets(2, seed=2)
    for a, b, c in zip(few, many, other, strict=False):
        np.testing.assert_array_equal(a.values, b.values)
        assert (a.values != c.values).mean() > 0.99
    assert len({market.name for market in many}) == 5


def test_markets_have_the_shapes_of_prices() -> None:
    """Over many markets: evenings above noons, weekdays above weekends, negative prices and spikes in a good part."""
    markets = np.stack([market.values for market in make_markets(40, seed=0)])
    days = markets.reshape(40, -1, DAY)
    assert (np.median(days[:, :, 19], 1) > np.median(days[:, :, 12], 1)).mean() > 0.9
    weekday = np.arange(days.shape[1]) % 7
    assert np.median(days[:, weekday < 5]) > np.median(days[:, weekday >= 5])
    assert 0.2 < (markets.min(1) < 0).mean() < 1
    assert (markets.max(1) > 4 * np.median(markets, 1)).mean() > 0.3
    assert np.isfinite(markets).all()


def test_a_fleet_beats_the_naive_forecast() -> None:
    """A handful of markets fitted together, as `make run` does with hundreds, all learn their own prices."""
    markets = make_markets(6, seed=3)
    fitted = fit_fleet(markets)
    assert [each.name for each in fitted] == [market.name for market in markets]
    assert np.mean([each.loss / each.naive_loss for each in fitted]) < 0.75
    assert all(each.loss < each.naive_loss for each in fitted)
