"""What the book says of each market's forecasts, as programs and the page show it. Pure.

All scores are of the last SHOWN_DAYS days that have prices.
"""

from collections.abc import Sequence
from datetime import date, timedelta

from msgspec import Struct

from server.bands.adaptive_offsets import BOUND
from server.bands.book import Book
from server.bands.market import DayScores, MarketRecord, find_bands

SHOWN_DAYS = 28
ALARM_DAYS = 14  #: days with prices for which an alarm is shown
_EPOCH = date.fromisoformat("1970-01-01")


class BandReport(Struct, frozen=True):
    """One band: the share of prices that it promises, and the share that it held."""

    promised: float
    covered: float


class DayReport(Struct, frozen=True):
    """One day: how many prices came, the share inside each band, and the pinball loss beside the naive forecast's."""

    day: str
    prices: int
    covered: list[float]
    pinball: float
    pinball_to_naive: float | None


class MarketReport(Struct, frozen=True):
    """One market. `model`: the name of its archive, or that and the product, such as `lu.mar#energy`.

    `pinball` is in the unit of its prices; `drift_since`: the day of the last alarm. `largest_offset`: of its levels,
    in widths of the band of 80 %; at `bound` the bands cannot follow any further.
    """

    model: str
    version: str
    prices: int
    waiting: int
    bands: list[BandReport]
    pinball: float | None
    pinball_to_naive: float | None
    drifts: bool
    drift_since: str | None
    drift_alarms: int
    largest_offset: float
    bound: float
    days: list[DayReport]


def choose_record(records: Sequence[MarketRecord]) -> MarketRecord:
    """Choose the record that is shown of a market: that of its newest shape."""
    return max(records, key=lambda record: record.used_at)


def report_market(model: str, record: MarketRecord, *, whole: bool = True) -> MarketReport:
    """Report on one market; days only if `whole`."""
    days = [day for day in record.days if day.count][-SHOWN_DAYS:]
    count = sum(day.count for day in days)
    bands = [
        BandReport(band.nominal, _divide(sum(day.inside[i] for day in days), count) or 0.0)
        for i, band in enumerate(find_bands(record.shape))
        if count
    ]
    since = record.drift.since
    return MarketReport(
        model=model,
        version=record.forecasts[-1].version if record.forecasts else "",
        prices=record.total,
        waiting=sum(not all(each.paired) for each in record.forecasts),
        bands=bands,
        pinball=_divide(sum(day.pinball for day in days), count),
        pinball_to_naive=_divide(sum(day.beside for day in days), sum(day.naive for day in days)),
        drifts=drifts_now(record),
        drift_since=_format_day(since) if since else None,
        drift_alarms=record.drift.alarms,
        largest_offset=max(map(abs, record.offsets)),
        bound=BOUND,
        days=[_report_day(day) for day in days] if whole else [],
    )


def drifts_now(record: MarketRecord) -> bool:
    """Whether the last alarm is at most ALARM_DAYS days with prices old."""
    later = [day for day in record.days if day.day > record.drift.since]
    return bool(record.drift.alarms) and len(later) <= ALARM_DAYS


def list_reports(book: Book, prefix: str, after: str, limit: int, *, whole: bool) -> tuple[list[MarketReport], bool]:
    """Report on the first `limit` markets, by name, with this prefix and after a name; and whether there are more."""
    names = sorted(name for name in book.records if name.startswith(prefix) and name > after)
    reports = [report_market(name, choose_record(book.records[name]), whole=whole) for name in names[:limit]]
    return reports, len(names) > limit


def _report_day(day: DayScores) -> DayReport:
    covered = [each / day.count for each in day.inside]
    return DayReport(_format_day(day.day), day.count, covered, day.pinball / day.count, _divide(day.beside, day.naive))


def _format_day(day: int) -> str:
    try:
        return (_EPOCH + timedelta(days=day)).isoformat()
    except OverflowError:  # a client may forecast any year
        return f"day {day}"


def _divide(total: float, count: float) -> float | None:
    return total / count if count else None
