"""The wall clock of a time zone: real instants become the slots of evenly spaced days, and slots real steps. No torch.

Networks read a clock without jumps: every day has 24 hours, as in requests without an offset. Where a zone moves its
clock, real steps and slots differ. The rule (docs/clocks.md): a real step belongs to the slot in which its wall-clock
time lies. So an hour that the clock skips is a slot without a value, and an hour that it repeats is one slot, whose
value is the mean of both. Of an answer in real steps, a skipped slot has none and a repeated one appears twice.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

DAY = 86_400
BLOCK = 512 * DAY  #: seconds of a zone's clock that are looked at together, and remembered
EPOCH = datetime.fromisoformat("1970-01-01")  # without zone: of a wall clock


class ZoneUnknown(ValueError):
    """The name is not one of the IANA database; the message names similar ones."""


class SlotPlan(NamedTuple):
    """How the real steps of a series, and of a forecast that follows it, lie on the slots of a wall clock."""

    start: int  #: wall-clock seconds of slot 0
    slots: Int64  #: the slot of each real step, of the series and then of the forecast
    history: int  #: slots before the forecast
    steps: Int64  #: the step of the forecast, in slots, of each real step that it answers


@lru_cache(maxsize=256)
def find_zone(name: str) -> ZoneInfo:
    """Return the zone of an IANA name. Raises ZoneUnknown."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # a name can also be a path, or that of a folder
        raise ZoneUnknown(f"{name[:40]!r} is not an IANA time zone, such as Europe/Berlin") from None


def check_zone_name(name: str) -> str:
    """Return the name if it is one of the IANA database. Raises ZoneUnknown with similar names."""
    if name in available_timezones():
        return name
    similar = " or ".join(get_close_matches(name, sorted(available_timezones()), 2))
    hint = f"; did you mean {similar}?" if similar else ""
    raise ZoneUnknown(f"{name[:40]!r} is not an IANA time zone, such as Europe/Berlin{hint}")


def compute_offsets(zone: ZoneInfo, instants: Int64) -> Int64:
    """Compute the seconds that the zone's wall clock is ahead of UTC at rising instants, in seconds since 1970.

    Raises OverflowError for instants outside the years 1 to 9999.
    """
    first, last = int(instants[0]), int(instants[-1])
    blocks = range(first // BLOCK, last // BLOCK + 1)
    try:
        found = [_scan_clock(zone, block * BLOCK, (block + 1) * BLOCK) for block in blocks]
    except OverflowError:  # a block at an end of the calendar, of which the instants may use what there is
        found = [_scan_clock(zone, first, last)]
    changes = [change for block in found for change, _ in block[1:]]
    after = [found[0][0][1], *(offset for block in found for _, offset in block[1:])]
    return np.array(after, np.int64)[np.searchsorted(np.array(changes, np.int64), instants, side="right")]


@lru_cache(maxsize=4096)
def _scan_clock(zone: ZoneInfo, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """List the offset at `first`, and each change in (first, last] with the offset after it.

    A day takes 3 us, and a request of a megabyte can span centuries: so each block of time is looked at once.
    """
    marks = [*range(first, last, DAY), last]
    offsets = [_find_offset(zone, mark) for mark in marks]
    changed = [i for i in range(1, len(marks)) if offsets[i] != offsets[i - 1]]
    return (first, offsets[0]), *((_find_change(zone, marks[i - 1], marks[i]), offsets[i]) for i in changed)


def plan_slots(
    zone: ZoneInfo, start: datetime, step_s: int, steps: int, horizon: int, *, skipped_first: bool = False
) -> SlotPlan:
    """Place `steps` real steps from an instant on, and the next `horizon` slots, on the slots of the zone's wall clock.

    A slot is forecast if a real step of it is yet to come within the forecast, even if another one is known. A forecast
    begins with the next real step; with `skipped_first` slots that the clock skips just before it are forecast too, and
    answered by no step: an archive of an origin may begin its day with them. Steps of a day and longer are counted on
    the calendar, where every one is a slot. Raises OverflowError beyond the years 1 to 9999.
    """
    if step_s >= DAY:
        every = np.arange(steps + horizon)
        return SlotPlan(_count_seconds(start.astimezone(zone)), every, steps, np.arange(horizon))
    first = round((start - datetime.fromtimestamp(0, UTC)).total_seconds())
    instants = first + step_s * np.arange(steps + horizon + 1)
    offsets = compute_offsets(zone, instants)
    most = int(np.ptp(offsets))
    if not most:  # no change of the clock: every step is a slot
        every = np.arange(steps + horizon)
        return SlotPlan(first + int(offsets[0]), every, steps, every[:horizon])
    instants = first + step_s * np.arange(len(instants) + 2 * -(-most // step_s))
    wall = instants + compute_offsets(zone, instants)
    slots = (wall - wall[0]) // step_s
    lowest = int(slots.min())
    slots -= lowest
    ahead = slots[steps:]
    history = int(ahead.min())
    if skipped_first and steps:
        history = min(int(slots[steps - 1]) + 1, history)
    count = int(np.argmax(ahead >= history + horizon))
    return SlotPlan(int(wall[0]) + lowest * step_s, slots[: steps + count], history, ahead[:count] - history)


def average_slots(values: Float64, slots: Int64, count: int) -> Float64:
    """Return the mean of the values [T] of each of the slots 0 to `count` - 1, NaN where none is known."""
    known = ~np.isnan(values) & (slots >= 0) & (slots < count)
    sums = np.bincount(slots[known], values[known], count)
    counts = np.bincount(slots[known], minlength=count)
    with np.errstate(invalid="ignore"):
        found: Float64 = sums / counts
    return found


def fill_skipped(values: Float64) -> Float64:
    """Interpolate missing values between their neighbours; the ends take the nearest value."""
    missing = np.isnan(values)
    if not missing.any() or missing.all():
        return values
    places = np.arange(len(values))
    return np.interp(places, places[~missing], values[~missing])


def format_wall(seconds: int) -> str:
    """Format wall-clock seconds as in requests, such as `2024-03-31 02:00:00`."""
    return (EPOCH + timedelta(seconds=seconds)).isoformat(sep=" ", timespec="seconds")


def format_instant(seconds: int, zone: ZoneInfo) -> str:
    """Format an instant on the zone's wall clock, with its offset."""
    return datetime.fromtimestamp(seconds, UTC).astimezone(zone).isoformat(sep=" ", timespec="seconds")


def add_offset(stamp: str, zone: str) -> str:
    """Return a stamp with the offset of its zone if it has none; an unknown zone is taken as UTC."""
    moment = datetime.fromisoformat(stamp)
    if moment.tzinfo is None:
        try:
            moment = moment.replace(tzinfo=find_zone(zone))
        except ZoneUnknown:
            moment = moment.replace(tzinfo=UTC)
    return moment.isoformat(sep=" ", timespec="seconds")


def find_jumps(stamp: str, zone: str, step_s: int, steps: int) -> tuple[tuple[int, int], ...]:
    """Find where the zone's clock changes within a forecast in slots: the step, and by how many seconds it jumps.

    From there on the slots lie at other instants than as many real steps. A stamp with an offset, a forecast of days
    or an unknown zone has no jumps.
    """
    moment = datetime.fromisoformat(stamp)
    if moment.tzinfo is not None or step_s >= DAY:
        return ()
    try:
        return _keep_jumps(find_zone(zone), moment, step_s, steps)
    except (ValueError, OverflowError):  # ZoneUnknown, or a moment at an end of the calendar
        return ()


@lru_cache(maxsize=256)  # a market's models forecast from one start
def _keep_jumps(clock: ZoneInfo, moment: datetime, step_s: int, steps: int) -> tuple[tuple[int, int], ...]:
    first = round(moment.replace(tzinfo=clock).timestamp())
    jumps = np.diff(compute_offsets(clock, first + step_s * np.arange(steps)))
    return tuple((int(at) + 1, int(jumps[at])) for at in jumps.nonzero()[0])


def resolve_wall_clock(zone: ZoneInfo, stamps: Sequence[datetime], step_s: int) -> Int64 | None:
    """Return the rising instants of a local clock's stamps, which may skip and repeat an hour; None if there are none.

    Of the two instants of a repeated stamp, the one `step_s` after the stamp before it is taken, else the first later.
    """
    found: list[int] = []
    for i, stamp in enumerate(stamps):
        possible = _list_instants(zone, stamp)
        if found:
            possible = [each for each in possible if each > found[-1]]
            expected = [found[-1] + step_s]
        else:
            expected = [each - step_s for each in _list_instants(zone, stamps[i + 1])] if len(stamps) > 1 else []
        if not possible:
            return None
        found.append(next((each for each in possible if each in expected), possible[0]))
    return np.array(found, np.int64)


def _list_instants(zone: ZoneInfo, stamp: datetime) -> list[int]:
    """List the instants at which the zone's clock shows the stamp: none of a skipped time, two of a repeated one."""
    early, late = (_find_utcoffset(zone, stamp.replace(fold=fold)) for fold in (0, 1))
    wall = _count_seconds(stamp)
    return [] if early < late else [wall - early] if early == late else [wall - early, wall - late]


def _find_utcoffset(zone: ZoneInfo, stamp: datetime) -> int:
    found = zone.utcoffset(stamp)
    assert found is not None, "a zone has an offset"
    return round(found.total_seconds())


def _count_seconds(moment: datetime) -> int:
    """Count the seconds of a wall-clock time since 1970."""
    return round((moment.replace(tzinfo=None) - EPOCH).total_seconds())


def _find_offset(zone: ZoneInfo, instant: int) -> int:
    return _find_utcoffset(zone, zone.fromutc((EPOCH + timedelta(seconds=instant)).replace(tzinfo=zone)))


def _find_change(zone: ZoneInfo, low: int, high: int) -> int:
    """Find the instant in (low, high] at which the clock is first what it is at `high`, by bisection."""
    after = _find_offset(zone, high)
    while high - low > 1:
        middle = (low + high) // 2
        if _find_offset(zone, middle) == after:
            high = middle
        else:
            low = middle
    return high
