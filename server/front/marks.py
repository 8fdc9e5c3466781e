"""Sums the marks of several answers: the values of `X-Fleetcast-Quality` and `X-Fleetcast-Warning`. In a front; pure.

A worker writes them (`handlers.codecs.marks`), so that their form is ours: `missing=2, flat=1`.
"""

from collections import Counter
from collections.abc import Iterable


def add_marks(marks: Iterable[str]) -> str:
    """Return one value for several: the counts of each code together."""
    counts = Counter[str]()
    for each in marks:
        for part in filter(None, each.split(", ")):
            code, _, count = part.rpartition("=")
            counts[code] += int(count)
    return ", ".join(f"{code}={count}" for code, count in counts.items())
