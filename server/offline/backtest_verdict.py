"""The verdict on a backtest: better than naive by how much, and whether bands hold what they promise. Pure.

A sentence counts and names markets. It never averages what has a unit: ratios and shares have none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Literal

from server.bands.adaptive_offsets import list_bands
from server.offline.evaluation import MarketScore

Tone = Literal["good", "bad", "plain"]
Standing = Literal["better", "worse", "equal", "unknown"]

EQUAL = 0.005  #: errors that differ by a smaller share are called equal
CHANCE = 0.05  #: a difference is beyond chance where the test of Diebold and Mariano gives a smaller probability
FAR = 0.05  #: a band that holds so much less or more than it promises is not honest; the page /accuracy marks the same
NAMED = 3  #: most markets that a sentence names


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence for the top of the page, and whether it is good news."""

    tone: Tone
    text: str


@dataclass(frozen=True, slots=True)
class BandHeld:
    """One band: the indices of its levels, and the shares of prices that it promises and has held."""

    low: int
    high: int
    promised: float
    held: float

    @property
    def off(self) -> float:
        """How much more than promised the band has held: below 0 is too narrow."""
        return self.held - self.promised

    @property
    def is_honest(self) -> bool:
        """At most FAR off, and at most twice as many prices outside as promised. A rounding error is forgiven."""
        return abs(self.off) <= min(FAR, 1 - self.promised) + 1e-9


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a backtest: one sentence on its errors, and one on its bands."""

    accuracy: Sentence
    bands: Sentence


def make_verdict(markets: Sequence[MarketScore]) -> Verdict:
    """Sum up at least one market; one is described, more are counted."""
    return Verdict(_sum_up_accuracy(markets), _sum_up_bands(markets))


def measure_bands(market: MarketScore) -> list[BandHeld]:
    """The symmetric bands of a market, the widest first; none where nothing was observed or there is but one level."""
    shares, levels = market.calibration.share, market.calibration.edges[1:-1]
    found = [
        BandHeld(each.low, each.high, each.nominal, sum(shares[each.low + 1 : each.high + 1]))
        for each in list_bands(levels)
    ]
    return [each for each in found if not isnan(each.held)]


def judge_market(market: MarketScore) -> Standing:
    """Compare a market's errors with those of the naive forecast."""
    ratio = market.scores.rmae
    if not isfinite(ratio):
        return "unknown"
    if abs(ratio - 1) < EQUAL:
        return "equal"
    return "better" if ratio < 1 else "worse"


def _sum_up_accuracy(markets: Sequence[MarketScore]) -> Sentence:
    by: dict[Standing, list[MarketScore]] = {"better": [], "worse": [], "equal": [], "unknown": []}
    for each in markets:
        by[judge_market(each)].append(each)
    if len(markets) == 1:
        return _compare_with_naive(markets[0])
    if len(by["better"]) == len(markets):
        return Sentence("good", _say_of_all("Better", markets))
    if len(by["worse"]) == len(markets):
        return Sentence("bad", _say_of_all("Worse", markets))
    if len(by["unknown"]) == len(markets):
        return Sentence("plain", "No market has a naive forecast to compare with.")
    told: dict[Standing, str] = {
        "better": f"better than the naive forecast on {len(by['better'])} of {len(markets)} markets",
        "worse": f"worse on {len(by['worse'])} ({_name_markets(by['worse'])})",
        "equal": f"as good on {len(by['equal'])} ({_name_markets(by['equal'])})",
        "unknown": f"not comparable on {len(by['unknown'])} ({_name_markets(by['unknown'])})",
    }
    text = ", ".join(part for standing, part in told.items() if standing == "better" or by[standing])
    tone: Tone = "bad" if len(by["worse"]) > len(by["better"]) else "plain"
    return Sentence(tone, f"{text[0].upper()}{text[1:]}.")


def _compare_with_naive(market: MarketScore) -> Sentence:
    standing = judge_market(market)
    if standing == "unknown":
        return Sentence("plain", "There is no naive forecast to compare with.")
    if standing == "equal":
        return Sentence("plain", "As good as the naive forecast, no better.")
    text = f"{standing.capitalize()} than the naive forecast: the error is {_format_difference(market.scores.rmae)}, "
    return Sentence("good" if standing == "better" else "bad", f"{text}{_explain_chance(market)}.")


def _say_of_all(standing: str, markets: Sequence[MarketScore]) -> str:
    """One verdict for all markets: the mean of their ratios, the span, and how many may be chance."""
    ratios = sorted(each.scores.rmae for each in markets)
    span = sorted(abs(1 - ratio) for ratio in ratios)
    mean = _format_difference(sum(ratios) / len(ratios))
    lucky = sum(not _is_beyond_chance(each) for each in markets)
    chance = f" On {lucky} of them the difference may be chance." if lucky else ""
    return (
        f"{standing} than the naive forecast on all {len(markets)} markets: the errors are {mean} on "
        f"average (from {span[0]:.1%} to {span[-1]:.1%}).{chance}"
    )


def _format_difference(ratio: float) -> str:
    return f"{abs(1 - ratio):.1%} {'smaller' if ratio < 1 else 'larger'}"


def _is_beyond_chance(market: MarketScore) -> bool:
    found = market.beside_naive
    if found is None or isnan(found.p_value):
        return False
    return min(found.p_value, 1 - found.p_value) < CHANCE


def _explain_chance(market: MarketScore) -> str:
    found = market.beside_naive
    if found is None or isnan(found.p_value):
        return "and there are too few windows to rule out chance"
    p_value = min(found.p_value, 1 - found.p_value)
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"  # noqa: PLR2004 -- as papers write it
    return f"more than chance explains ({shown})" if p_value < CHANCE else f"which may be chance ({shown})"


def _sum_up_bands(markets: Sequence[MarketScore]) -> Sentence:
    """Say on how many markets all bands are honest, and name the one that is farthest off."""
    measured = [(each, bands) for each in markets if (bands := measure_bands(each))]
    if not measured:
        return Sentence("plain", "There are no bands to check.")
    if len(markets) == 1:
        return _describe_bands(measured[0][1])
    wrong = [(each, _find_worst_band(bands)) for each, bands in measured if not all(one.is_honest for one in bands)]
    if not wrong:
        off = max(abs(band.off) for _, bands in measured for band in bands)
        held = f"every band holds what it promises to within {100 * off:.1f} percentage points"
        return Sentence("good", f"The bands are honest on all {len(measured)} markets: {held}.")
    market, band = max(wrong, key=lambda pair: abs(pair[1].off))
    rest = f" on {len(wrong)} of {len(measured)} markets" if len(wrong) < len(measured) else " on any market"
    return Sentence("bad", f"The bands are not honest{rest}. Farthest off is {market.target}: {_describe_band(band)}.")


def _describe_bands(bands: Sequence[BandHeld]) -> Sentence:
    worst = _find_worst_band(bands)
    if worst.is_honest:
        most = f"to within {100 * abs(worst.off):.1f} percentage points"
        return Sentence("good", f"The bands are honest: each holds what it promises, {most}.")
    return Sentence("bad", f"The bands are not honest: {_describe_band(worst)}.")


def _find_worst_band(bands: Sequence[BandHeld]) -> BandHeld:
    """The band that is farthest off, of those that are not honest if there are any."""
    return max(bands, key=lambda each: (not each.is_honest, abs(each.off)))


def _describe_band(band: BandHeld) -> str:
    width = "too narrow" if band.off < 0 else "too wide"
    return f"the band that promises {band.promised:.0%} of the prices holds {band.held:.1%}, it is {width}"


def _name_markets(markets: Sequence[MarketScore]) -> str:
    def name() -> Iterator[str]:
        for each in markets[:NAMED]:
            ratio = each.scores.rmae
            known = isfinite(ratio) and abs(ratio - 1) >= EQUAL
            yield f"{each.target}, error {_format_difference(ratio)}" if known else each.target

    more = f" and {len(markets) - NAMED} more" if len(markets) > NAMED else ""
    return "; ".join(name()) + more
