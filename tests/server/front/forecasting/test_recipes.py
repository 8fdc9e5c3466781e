"""The rules that hold for all clients which send series: frequencies, levels, times."""

import pytest

from server.front.forecasting.recipes import level_quantiles, normalize_frequency, shift_start


@pytest.mark.parametrize(
    "same", [("H", "h", "1h", "60min", "hour", "3600s"), ("T", "min", "minute"), ("MS", "M", "month"), ("30T", "30min")]
)
def test_names_of_one_frequency_are_one(same: tuple[str, ...]) -> None:
    """Old and new aliases of pandas and KServe's words; `M` is a month and `min` a minute."""
    assert len({normalize_frequency(text) for text in same}) == 1


def test_names_of_different_frequencies_are_different() -> None:
    """Among them those that differ in case alone."""
    names = ("s", "min", "30min", "h", "D", "W", "M", "Q", "Y", "5min", "weird!")
    assert len({normalize_frequency(text) for text in names}) == len(names)


def test_levels_become_decimals() -> None:
    """Without the noise of binary fractions, since an answer repeats the text."""
    assert level_quantiles(80) == ("0.1", "0.9")
    assert level_quantiles(97.5) == ("0.0125", "0.9875")
    assert level_quantiles(0) == ("0.5", "0.5")
    assert level_quantiles(80.0) == ("0.1", "0.9")


def test_a_start_moves_by_steps() -> None:
    """By instants where it has an offset; where steps are months nothing moves."""
    assert shift_start("2026-01-01", 5, "1h") == "2026-01-01 05:00:00"
    assert shift_start("2026-01-01T23:30+10:00", 1, "30min") == "2026-01-02 00:00:00+10:00"
    assert shift_start("2026-01-01", 5, "MS") is None
    assert shift_start("never", 5, "1h") is None
    assert shift_start("9999-12-31", 500, "D") is None
