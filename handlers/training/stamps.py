"""The time axis of a price file: stamps as people have them become evenly spaced slots of a wall clock. No torch.

docs/clocks.md states the rule for days when a clock changes; `handlers.codecs.clock` applies it to requests alike.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np

from handlers.codecs.clock import (
    DAY,
    EPOCH,
    Float64,
    Int64,
    ZoneUnknown,
    average_slots,
    compute_offsets,
    fill_skipped,
    find_zone,
    resolve_wall_clock,
)
from handlers.codecs.features import parse_step_seconds
from model_store.archives.manifest import ForecastSpec

UNITS = (("W", 604_800), ("D", 86_400), ("h", 3600), ("min", 60), ("s", 1))
MINUTE = 60
SHORT_DAY = 22 * 3600  #: the shortest day of the calendar is longer, and no step lies between this and a day
JITTER_S = 5  #: most seconds that a stamp may be off its minute
SEVERAL = 3  #: least number of rows of another step that make it a change of the step
LOCAL = "on a local clock whose hours change, name its zone: --time-zone Europe/Berlin"


class SeriesInvalid(ValueError):
    """The data cannot be used; the message names the file, line and column, and what to do."""


@dataclass(frozen=True, slots=True)
class FileRules:
    """How the rows of a price file are read.

    The slots are those of `zone`, whose clock stamps without an offset show too, unless they show that of
    `stamps_zone`. `ending`: a stamp names the end of its interval. `step_s`: rows of a longer step, before the step of
    the file changed, are repeated to this one; 0: the step must not change. `time_format` is that of `strptime`; empty:
    ISO 8601 and its common variants. `item` (column, value): only these rows are read.
    """

    zone: str = "UTC"
    stamps_zone: str = ""
    ending: bool = False
    step_s: int = 0
    time_format: str = ""
    item: tuple[str, str] = ("", "")

    def for_archive(self, forecast: ForecastSpec) -> "FileRules":
        """Return these rules for the clock and the step of an archive."""
        return replace(self, zone=forecast.time_zone, step_s=parse_step_seconds(forecast.frequency))


PLAIN = FileRules()


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Evenly spaced slots from `start` on, and which rows of the file belong to which slot."""

    start: datetime
    step_s: int
    count: int  #: of slots
    rows: Int64  #: one for each pair of row and slot
    slots: Int64
    plain: bool  #: every row is a slot
    notes: tuple[str, ...]

    def place(self, values: Float64, *, complete: bool = False) -> Float64:
        """Return the value of each slot: the mean of its rows, NaN without one, or interpolated if `complete`."""
        if self.plain:
            return values
        found = average_slots(values[self.rows], self.slots, self.count)
        return fill_skipped(found) if complete else found


def find_axis(stamps: Sequence[datetime], lines: Sequence[int], rules: FileRules) -> TimeAxis:
    """Find the time axis of rows with these stamps. Raises SeriesInvalid that names the line."""
    if len(stamps) < 2:  # noqa: PLR2004 - a distance needs two
        raise SeriesInvalid(f"{len(stamps)} rows of data, which is too few")
    seconds, real, notes = _read_clock(stamps, lines, rules)
    lengths = _find_lengths(seconds, stamps, lines, rules, notes)
    begins = seconds - lengths if rules.ending else seconds
    step = int(lengths.min())
    copies = lengths // step
    rows = np.repeat(np.arange(len(seconds)), copies)
    moments = int(begins[0]) + step * np.arange(len(rows))
    if real and step < DAY:
        moments = moments + compute_offsets(_find_zone(rules.zone), moments)
    slots = (moments - moments[0]) // step
    lowest = int(slots.min())
    slots -= lowest
    plain = len(rows) == len(seconds) and bool((np.diff(slots) == 1).all())
    if not plain and len(np.unique(slots)) != len(slots):
        notes.append(f"hours that the clock of {rules.zone} repeats are read as the mean of both")
    start = EPOCH + timedelta(seconds=int(moments[0]) + lowest * step)
    return TimeAxis(start, step, int(slots.max()) + 1, rows, slots, plain, tuple(notes))


def name_step(seconds: int) -> str:
    """Name a step by a pandas offset alias: `1h`, `30min`, `1D`."""
    unit, size = next((unit, size) for unit, size in UNITS if seconds % size == 0)
    return f"{seconds // size}{unit}"


def parse_stamp(text: str, line: int, column: str, time_format: str) -> datetime:
    """Parse a stamp. Raises SeriesInvalid that names line and column.

    Without a format: ISO 8601, also with slashes, 24:00 for the end of a day, and seconds or milliseconds since 1970.
    Of a range `from - to` the first is taken.
    """
    text = text.strip()
    try:
        if time_format:
            return datetime.strptime(text.partition(" - ")[0], time_format)  # noqa: DTZ007 -- the zone is given apart
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            return _parse_variant(text.partition(" - ")[0])
    except (ValueError, OverflowError):
        expected = f"a time by --time-format {time_format}" if time_format else "a time such as 2024-01-31 13:00"
        hint = "" if time_format else "; --time-format names another notation, such as '%d/%m/%Y %H:%M'"
        what = f"line {line}, column {column!r}: expected {expected}, not {text[:40]!r}{hint}"
        raise SeriesInvalid(what) from None


def _parse_variant(text: str) -> datetime:
    if re.fullmatch(r"\d{10}|\d{13}", text):
        return datetime.fromtimestamp(int(text[:10]), UTC)
    if re.match(r"\d{4}/\d\d/\d\d", text):
        return datetime.fromisoformat(text.replace("/", "-"))
    if re.fullmatch(r"\d{4}-\d\d-\d\d[ T]24:00(:00)?", text):
        return datetime.fromisoformat(text[:10]) + timedelta(days=1)
    raise ValueError


def _read_clock(stamps: Sequence[datetime], lines: Sequence[int], rules: FileRules) -> tuple[Int64, bool, list[str]]:
    """Return the seconds of the stamps, whether they are instants (else they are wall-clock times), and notes."""
    real = stamps[0].tzinfo is not None
    for stamp, line in zip(stamps, lines, strict=True):
        if (stamp.tzinfo is not None) != real:
            here, there = ("no offset", "one") if real else ("an offset", "none")
            raise SeriesInvalid(f"line {line}: {stamp} has {here}, but the first row has {there}; use one notation")
    origin = EPOCH.replace(tzinfo=UTC) if real else EPOCH
    seconds, notes = _round_to_minutes(np.array([(stamp - origin).total_seconds() for stamp in stamps]))
    step = _find_mode(np.diff(seconds))
    if real:
        if step >= SHORT_DAY and rules.zone != "UTC":  # days are counted on the calendar
            return seconds + compute_offsets(_find_zone(rules.zone), seconds), False, notes
        return seconds, True, notes
    clock = rules.stamps_zone or rules.zone
    if (rules.stamps_zone or (np.diff(seconds) != step).any()) and step < DAY and clock != "UTC":
        instants = _resolve_local(seconds, step, clock, wanted=bool(rules.stamps_zone))
        if instants is not None:
            return instants, True, notes
        if rules.stamps_zone:
            raise SeriesInvalid(f"the stamps are not those of a clock of {clock}; give the zone that they are in")
    return seconds, rules.stamps_zone == "UTC" and step < DAY, notes


def _resolve_local(seconds: Int64, step: int, clock: str, *, wanted: bool) -> Int64 | None:
    """Return the instants of a local clock that skips and repeats hours, if `wanted` or more even than its stamps."""
    zone = _find_zone(clock)
    found = resolve_wall_clock(zone, [EPOCH + timedelta(seconds=each) for each in seconds.tolist()], step)
    if found is None or wanted or (np.diff(found) != step).sum() < (np.diff(seconds) != step).sum():
        return found
    return None


def _find_zone(name: str) -> ZoneInfo:
    try:
        return find_zone(name)
    except ZoneUnknown as error:
        raise SeriesInvalid(f"the time zone {error}") from None


def _round_to_minutes(seconds: Float64) -> tuple[Int64, list[str]]:
    """Return whole seconds; stamps that are a few seconds off their minutes are read as on them, which is noted."""
    whole = np.round(seconds).astype(np.int64)
    if len(np.unique(np.diff(seconds))) == 1 and (whole == seconds).all():
        return whole, []
    minutes = np.round(seconds / MINUTE).astype(np.int64) * MINUTE
    off = np.abs(seconds - minutes).max()
    if 0 < off <= JITTER_S and _find_mode(np.diff(minutes)) >= MINUTE:
        return minutes, [f"stamps are up to {off:g} s off their minutes, and are read as on them"]
    if (whole != seconds).any():
        raise SeriesInvalid("stamps with fractions of a second are not evenly spaced; round them")
    return whole, []


def _find_mode(distances: Int64) -> int:
    """Return the most frequent distance."""
    values, counts = np.unique(distances, return_counts=True)
    return int(values[counts.argmax()])


def _find_lengths(
    seconds: Int64, stamps: Sequence[datetime], lines: Sequence[int], rules: FileRules, notes: list[str]
) -> Int64:
    """Return the seconds of each row's interval. Raises SeriesInvalid for uneven rows."""
    distances = np.diff(seconds)
    step = _find_mode(distances)
    fine = np.flatnonzero(distances == rules.step_s)
    expected = np.full(len(distances), step)
    if rules.step_s and len(fine) and fine[0] >= SEVERAL:
        coarse = _find_mode(distances[: fine[0]])
        if coarse > rules.step_s and coarse % rules.step_s == 0:
            expected[: fine[0]], expected[fine[0] :] = coarse, rules.step_s
            line = lines[int(fine[0]) + (1 if rules.ending else 0)]
            notes.append(f"rows before line {line} have steps of {name_step(coarse)}, and are repeated")
    wrong = np.flatnonzero((distances != expected) | (distances <= 0))
    if len(wrong):
        raise SeriesInvalid(_explain_row(int(wrong[0]), distances, stamps, lines, step))
    # a row lasts until the next, or since the one before
    return np.concatenate([distances[:1], distances] if rules.ending else [distances, distances[-1:]])


def _explain_row(at: int, distances: Int64, stamps: Sequence[datetime], lines: Sequence[int], step: int) -> str:
    """Say what is wrong with the row after the distance `at`."""
    line, stamp, found = lines[at + 1], stamps[at + 1], int(distances[at])
    if found == 0:
        return f"line {line}: {stamp} appears twice; keep one row a step ({LOCAL}; several items in one file: --item)"
    if found < 0:
        return f"line {line}: {stamp} comes {timedelta(seconds=found)} after the row before; sort the rows by time"
    changed = int(np.flatnonzero(distances != distances[0])[0])
    before, after = distances[0], distances[changed]
    if SEVERAL <= changed <= len(distances) - SEVERAL and (distances[changed:] == after).all() and before > 0 < after:
        line, coarse, fine = lines[changed + 1], name_step(int(before)), name_step(int(after))
        what = f"line {line}: the step changes here from {coarse} to {fine}"
        if after < before and before % after == 0:
            return f"{what}; --frequency {fine} repeats the rows before it, which hold for their whole interval"
        return f"{what}; give rows of one step, or only those from {stamps[changed]} on"
    if found < step and at + 1 < len(distances) and found + distances[at + 1] == step:
        return f"line {line}: {stamp} lies between two steps of {name_step(step)}; remove this row"
    what = f"line {line}: {stamp} comes {timedelta(seconds=found)} after the row before"
    return f"{what}; steps are {timedelta(seconds=step)}: add the missing rows with empty cells ({LOCAL})"
