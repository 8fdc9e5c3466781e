"""Series out of tables, and the time stamps of a forecast: pandas, polars, or a mapping of columns. Imports neither.

A table is anything whose columns are had by `table["name"]` and are lists, or have `to_list` or `tolist`.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

DAY = timedelta(days=1)
MISSING_BY_NAME = ("NAType", "NaTType")  #: pandas' missing values, which are neither None nor NaN


class FrameSeries(NamedTuple):
    """What a table says: the first time stamp, the step, history [T] or [D][T], covariates [K][T + ahead]."""

    start: datetime
    step: timedelta
    target: list[Any]
    dynamic_feat: list[list[float | None]] | None


def read_frame(
    frame: Any,
    *,
    target: str | Sequence[str],
    time: str | None = None,
    dynamic_feat: Sequence[str] = (),
    steps_ahead: int = 0,
) -> FrameSeries:
    """Read evenly spaced rows, the oldest first; see `ForecastRequest.from_frame`. Raises ValueError with the place."""
    stamps = _read_stamps(frame, time)
    rows = len(stamps)
    if not 0 <= steps_ahead < rows:
        raise ValueError(f"steps_ahead is {steps_ahead}, but the table has {rows} rows, of which some must be history")
    step = _find_step(stamps)
    names = [target] if isinstance(target, str) else list(target)
    history = [_read_numbers(frame, name, rows)[: rows - steps_ahead] for name in names]
    covariates = [_read_numbers(frame, name, rows) for name in dynamic_feat]
    return FrameSeries(stamps[0], step, history[0] if isinstance(target, str) else history, covariates or None)


def list_times(start: str, time_zone: str | None, step: timedelta, count: int) -> list[datetime]:
    """The stamps of `count` steps from `start` on, as the answer gives both.

    With an offset the steps are of real time, on the clock of the zone; days and longer are counted on the calendar.
    """
    first = datetime.fromisoformat(start)
    if first.tzinfo is None:
        return [first + i * step for i in range(count)]
    zone = ZoneInfo(time_zone) if time_zone else first.tzinfo
    if step >= DAY:
        wall = first.astimezone(zone)
        return [wall + i * step for i in range(count)]
    instant = first.astimezone(UTC)
    return [(instant + i * step).astimezone(zone) for i in range(count)]


def _read_column(frame: Any, name: str) -> list[Any]:
    """The values of a column. Raises ValueError that says which columns there are."""
    try:
        column = frame[name]
    except Exception as error:  # KeyError of pandas and mappings, an exception of polars' own
        known = ", ".join(str(each) for each in list(getattr(frame, "columns", frame))[:20])
        raise ValueError(f"the table has no column {name!r}; it has {known}") from error
    return _to_list(column)


def _to_list(values: Any) -> list[Any]:
    for method in ("to_list", "tolist"):
        if hasattr(values, method):
            found: list[Any] = getattr(values, method)()
            return found
    return list(values)


def _read_stamps(frame: Any, time: str | None) -> list[datetime]:
    """The time column, or pandas' index. Raises ValueError that names the row."""
    if time is None and not hasattr(frame, "index"):
        raise ValueError("say by `time` which column holds the time stamps: the table has no index")
    column = _to_list(frame.index) if time is None else _read_column(frame, time)
    where = "the index" if time is None else f"column {time!r}"
    return [_read_stamp(value, where, row) for row, value in enumerate(column)]


def _read_stamp(value: Any, where: str, row: int) -> datetime:
    try:
        if isinstance(value, str):
            return datetime.fromisoformat(value)
        if isinstance(value, date) and not isinstance(value, datetime):
            return datetime(value.year, value.month, value.day)  # noqa: DTZ001 -- a day of the archive's own clock
    except ValueError:
        pass
    if not isinstance(value, datetime) or type(value).__name__ in MISSING_BY_NAME:
        raise ValueError(f"{where}, row {row}: {str(value)[:40]!r} is not a time stamp such as 2026-01-01 00:00:00")
    return value


def _find_step(stamps: Sequence[datetime]) -> timedelta:
    """The distance of the rows. Raises ValueError where two are not one step apart: a request has only the first stamp.

    Stamps with offsets are instants; those without are counted on a clock without jumps, as servers do.
    """
    if len(stamps) < 2:  # noqa: PLR2004 -- a step lies between two
        raise ValueError("a table needs two rows or more, from whose time stamps the step is known")
    if len({stamp.tzinfo is None for stamp in stamps}) > 1:
        raise ValueError("some time stamps have an offset and some have none; give all of them one, or none")
    moments = [stamp if stamp.tzinfo is None else stamp.astimezone(UTC) for stamp in stamps]
    steps = [later - earlier for earlier, later in pairwise(moments)]
    step = min(steps)
    calendar = [later.replace(tzinfo=None) - earlier.replace(tzinfo=None) for earlier, later in pairwise(stamps)]
    if min(calendar) >= DAY and len(set(calendar)) == 1:  # days of 23 and 25 hours are whole days
        return calendar[0]
    for row, found in enumerate(steps, start=1):
        if found != step or found <= timedelta(0):
            what = f"row {row} is {found} after the row before it, and others {step}"
            raise ValueError(f"{what}: sort the rows, and add those that are missing, with an empty target")
    return step


def _read_numbers(frame: Any, name: str, rows: int) -> list[float | None]:
    """A column of numbers, missing ones None. Raises ValueError that names column and row."""
    values = _read_column(frame, name)
    if len(values) != rows:
        raise ValueError(f"column {name!r} has {len(values)} values, but there are {rows} time stamps")
    return [_read_number(value, name, row) for row, value in enumerate(values)]


def _read_number(value: Any, name: str, row: int) -> float | None:
    if value is None or type(value).__name__ in MISSING_BY_NAME:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"column {name!r}, row {row}: {str(value)[:40]!r} is not a number") from None
    return None if number != number else number  # noqa: PLR0124 -- NaN
