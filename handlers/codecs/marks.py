"""What an answer says of itself beside its numbers: of what quality its histories are, and what it is warned of. Pure.

A mark is a short code, listed here and documented in `docs/quality.md`. A prediction carries its own codes, and the
headers of an answer how many predictions carry each, as `missing=2, flat=1`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NARROW_LEVELS = "narrow-levels"  #: samples of an archive whose outer levels lie inside 0.05 and 0.95


class Marks(NamedTuple):
    """The values of the headers `X-Fleetcast-Quality` and `X-Fleetcast-Warning`; empty where there is nothing."""

    quality: str = ""
    warnings: str = ""


NO_MARKS = Marks()


def count_marks(codes: Iterable[Sequence[str]]) -> str:
    """Return how many of the predictions carry each code, in words; `codes` are those of each prediction."""
    counts = Counter(code for each in codes for code in each)
    return ", ".join(f"{code}={count}" for code, count in counts.items())
