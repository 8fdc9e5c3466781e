"""Rates and quantiles between two readings of a server."""

import math

import pytest

from server.cli.fleet.rates import Buckets, Change, Reading


def make_reading(at: float, requests: dict[str, float], counts: list[float], total: float = 0.0) -> Reading:
    """An answer of `GET /fleet/overview`, as far as these tests look at it."""
    buckets = {"bounds": [0.001, 0.01, 0.1], "counts": counts, "sum": total}
    return {"at": at, "requests": requests, "request_seconds": buckets, "load_seconds": {"disk": buckets}}


def test_rates_are_differences_by_time() -> None:
    """Of all keys, or of those that are named; a key that is new began at zero."""
    change = Change(
        make_reading(10, {"200": 100}, [0, 0, 0, 0]), make_reading(14, {"200": 180, "503": 4}, [0, 0, 0, 0])
    )
    assert change.rate("requests") == (80 + 4) / 4
    assert change.rate("requests", "503") == 1
    assert change.share("requests", "200") == 80 / 84
    assert math.isnan(Change(change.now, change.now).share("requests", "200"))


def test_a_server_that_was_started_anew_began_at_zero() -> None:
    """No rate is negative."""
    change = Change(make_reading(10, {"200": 1000}, [5, 9, 9, 9]), make_reading(12, {"200": 10}, [1, 2, 3, 3], 0.06))
    assert change.rate("requests") == 5
    assert change.buckets("request_seconds").count == 3


def test_quantiles_lie_on_straight_lines_within_buckets() -> None:
    """As Prometheus' `histogram_quantile` says of the same buckets."""
    before = make_reading(0, {}, [10, 10, 10, 10])
    found = Change(before, make_reading(1, {}, [10, 20, 30, 30], 0.6)).buckets("load_seconds", "disk")
    assert (found.count, found.mean) == (20, 0.6 / 20)
    assert found.quantile(0.25) == pytest.approx(0.001 + 0.009 / 2)
    assert found.quantile(0.5) == pytest.approx(0.01)
    assert found.quantile(1.0) == pytest.approx(0.1)


def test_quantiles_above_the_last_bound_lie_on_it() -> None:
    """Nothing is known of how far above; without observations there is no quantile."""
    assert Buckets([0.1, 1.0], [1, 2, 10], 99.0).quantile(0.99) == 1.0
    assert math.isnan(Buckets([0.1], [0, 0], 0.0).quantile(0.5))
    assert math.isnan(Buckets((), (), 0.0).mean)
