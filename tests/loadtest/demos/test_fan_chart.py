"""The terminal's fan chart."""

from loadtest.demos.fan_chart import HEIGHT, WIDTH, draw_fan_chart


def test_bands_median_and_actual_values_lie_where_their_numbers_say() -> None:
    """The lowest and highest value are in the outermost rows, the median between, an actual value is a dot."""
    levels = {"0.1": [0.0, 0.0], "0.25": [3.0, 3.0], "0.5": [7.0, 7.0], "0.75": [11.0, 11.0], "0.9": [14.0, 14.0]}
    lines = draw_fan_chart(levels, [14.0]).splitlines()
    assert len(lines) == HEIGHT + 2
    columns = [line.partition("│")[2] for line in lines[:HEIGHT]]
    first, second = ("".join(column[at] for column in columns) for at in (1, WIDTH + 1))
    assert first[0] == "●"
    assert second[0] == "░"
    assert second[-1] == "░"
    assert second.index("━") == HEIGHT - 1 - 7
    assert set(second[1:-1]) <= {"░", "▒", "━"}
    assert lines[-1].split() == ["+1"]


def test_a_flat_forecast_is_still_a_line() -> None:
    """All values equal: no division by zero, one row."""
    lines = draw_fan_chart({"0.5": [5.0] * 4}).splitlines()
    assert sum("━" in line for line in lines) == 1
