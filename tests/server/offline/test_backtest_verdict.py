"""The sentences of a backtest's verdict say what the numbers are, for good and for bad ones."""

from dataclasses import replace
from math import nan

import pytest

from handlers.evaluation.point_scores import PointComparison
from handlers.evaluation.scores import Scores
from server.offline.backtest_verdict import make_verdict, measure_bands
from server.offline.evaluation import ByHour, Calibration, MarketScore

EDGES = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]
RIGHT = [0.1, 0.15, 0.25, 0.25, 0.15, 0.1]


def make_score(
    rmae: float, p_value: float = 0.0001, share: list[float] | None = None, name: str = "NSW1"
) -> MarketScore:
    """A market whose error is so many times the naive one, and whose prices fell so between its levels."""
    return MarketScore(
        target=name,
        model=f"{name}.mar",
        version="1",
        frequency="1h",
        unit="AUD/MWh",
        first="2024-01-01 00:00:00",
        last="2024-01-31 23:00:00",
        windows=31,
        scores=Scores(1, 1, 1, 1, rmae, 1, 0.8, 0.8, 744),
        calibration=Calibration(list(EDGES), share or list(RIGHT), list(RIGHT)),
        by_hour=ByHour("hour of the day", [], [], []),
        beside_naive=PointComparison("naive", rmae, 1, 1, 1, 1 - rmae, 1, p_value, 744),
    )


@pytest.mark.parametrize(
    ("rmae", "p_value", "tone", "said"),
    [
        (0.7, 0.0001, "good", "Better than the naive forecast: the error is 30.0% smaller, more than chance explains"),
        (
            0.97,
            0.31,
            "good",
            "Better than the naive forecast: the error is 3.0% smaller, which may be chance (p = 0.31)",
        ),
        (1.4, 0.9999, "bad", "Worse than the naive forecast: the error is 40.0% larger, more than chance explains"),
        (1.02, 0.7, "bad", "Worse than the naive forecast: the error is 2.0% larger, which may be chance (p = 0.3)"),
        (0.8, nan, "good", "20.0% smaller, and there are too few windows to rule out chance"),
        (1.001, 0.5, "plain", "As good as the naive forecast, no better."),
        (nan, nan, "plain", "There is no naive forecast to compare with."),
    ],
)
def test_one_market_is_compared_with_naive(rmae: float, p_value: float, tone: str, said: str) -> None:
    """By how much, and whether that may be chance."""
    accuracy = make_verdict([make_score(rmae, p_value)]).accuracy
    assert accuracy.tone == tone
    assert said in accuracy.text


def test_many_markets_are_counted_and_the_bad_ones_named() -> None:
    """The mean of the ratios is told only where all are better or all are worse."""
    good = [make_score(0.7, name="A"), make_score(0.9, 0.2, name="B")]
    bad = [make_score(1.5, 0.99, name=f"W{i}") for i in range(5)]
    every = make_verdict(good).accuracy
    assert every.tone == "good"
    assert every.text == (
        "Better than the naive forecast on all 2 markets: the errors are 20.0% smaller on average (from 10.0% to "
        "30.0%). On 1 of them the difference may be chance."
    )
    mixed = make_verdict([*good, *bad]).accuracy
    assert mixed.tone == "bad"
    assert mixed.text == (
        "Better than the naive forecast on 2 of 7 markets, worse on 5 (W0, error 50.0% larger; W1, error 50.0% "
        "larger; W2, error 50.0% larger and 2 more)."
    )
    assert make_verdict(bad).accuracy.text.startswith(
        "Worse than the naive forecast on all 5 markets: the errors are 50.0%"
    )


def test_bands_are_honest_or_named() -> None:
    """A band may be 5 points off, and outside a wide one may be twice as many prices as promised."""
    honest = make_score(0.7, share=[0.11, 0.15, 0.24, 0.25, 0.15, 0.1])
    assert [(each.promised, round(each.held, 6)) for each in measure_bands(honest)] == [(0.8, 0.79), (0.5, 0.49)]
    assert make_verdict([honest]).bands.tone == "good"
    assert "to within 1.0 percentage points" in make_verdict([honest]).bands.text
    narrow = make_score(0.7, share=[0.2, 0.1, 0.2, 0.2, 0.1, 0.2], name="VIC1")
    said = make_verdict([narrow]).bands
    assert (said.tone, said.text) == (
        "bad",
        "The bands are not honest: the band that promises 80% of the prices holds 60.0%, it is too narrow.",
    )
    wide = make_score(0.7, share=[0.01, 0.1, 0.39, 0.39, 0.1, 0.01])
    assert "it is too wide" in make_verdict([wide]).bands.text
    both = make_verdict([honest, narrow]).bands
    assert (both.tone, both.text[:60]) == ("bad", "The bands are not honest on 1 of 2 markets. Farthest off is ")
    assert "VIC1" in both.text
    assert make_verdict([honest, honest]).bands.text.startswith("The bands are honest on all 2 markets")
    outer = Calibration([0, 0.01, 0.99, 1], [0.025, 0.95, 0.025], [0.01, 0.98, 0.01])
    assert make_verdict([replace(honest, calibration=outer)]).bands.tone == "bad", "5% outside where 2% are promised"


def test_no_band_is_no_verdict() -> None:
    """One level makes no band, and nothing observed holds nothing."""
    single = Calibration([0, 0.5, 1], [0.4, 0.6], [0.5, 0.5])
    for calibration in (single, Calibration(list(EDGES), [nan] * 6, list(RIGHT))):
        bands = make_verdict([replace(make_score(0.7), calibration=calibration)]).bands
        assert (bands.tone, bands.text) == ("plain", "There are no bands to check.")
