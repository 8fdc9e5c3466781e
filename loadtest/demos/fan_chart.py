"""Draws a forecast in the terminal: the range of the quantiles by hour, and the actual values. Pure text."""

from collections.abc import Mapping, Sequence

HEIGHT = 14
WIDTH = 3  #: characters per hour


def draw_fan_chart(levels: Mapping[str, Sequence[float]], actual: Sequence[float] = ()) -> str:
    """Quantile level -> values [hours], levels ascending -> lines of text: the outer range light, the inner one dark,
    the median as a line, actual values as dots. Prices on the left, hours below.
    """
    bands = [levels[key] for key in sorted(levels, key=float)]
    hours = len(bands[0])
    every = [value for band in (*bands, actual) for value in band]
    low, high = min(every), max(every)
    size = (high - low) / HEIGHT or 1.0

    def row(value: float) -> int:
        return min(HEIGHT - 1, int((value - low) / size))

    canvas = [[" "] * hours for _ in range(HEIGHT)]
    for hour in range(hours):
        column = [row(band[hour]) for band in bands]
        for depth, mark in enumerate("░▒"[: len(bands) // 2]):
            for at in range(column[depth], column[-1 - depth] + 1):
                canvas[at][hour] = mark
        canvas[column[len(column) // 2]][hour] = "━"
    for hour, value in enumerate(actual[:hours]):
        canvas[row(value)][hour] = "●"
    lines = []
    for at in reversed(range(HEIGHT)):
        cells = "".join(f" {cell} " if cell == "●" else cell * WIDTH for cell in canvas[at])
        lines.append(f"{low + (at + 0.5) * size:8.1f} │{cells}")
    ticks = "".join(f"{f'+{hour + 1}':<{4 * WIDTH}}" for hour in range(0, hours, 4))
    return "\n".join([*lines, " " * 9 + "└" + "─" * (hours * WIDTH), " " * 10 + ticks])
