"""The answers to a call for many models as one .npy file: a table whose rows have fields, without numpy. Pure.

Fields are the columns of `answered_table`: `item`, `model`, `start` (datetime64[s]), `step`, `mean`, one for each level
under its name, and `error`. numpy has no nulls: a row with an error has no time (NaT), step -1 and NaN; where there is
a forecast the error is empty. All texts of a column have the width of the longest, so that errors are cut.
"""

from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from struct import pack
from typing import cast

from server.errors import Refused, Situation
from server.front.columns.answered_table import AnsweredRun, list_names, refuse_too_large
from server.front.columns.npy_header import MOST_HEADER, write_header
from server.front.columns.npy_reader import NOT_A_TIME
from server.front.exchange import Limit
from server.front.slices import PART, UNIT, Slices
from server.ipc.packed import cast_numbers

MOST_ERROR = 120  #: characters of an error; every row is as long as the longest
CHARACTER, ITEM_BYTES, TIME_BYTES = 4, 4, 8  #: of a character, a number, and a time
NO_STEP = -1
NAN = pack("<f", float("nan"))
_EPOCH, _SECOND = datetime(1970, 1, 1), timedelta(seconds=1)  # noqa: DTZ001 -- starts have no zone


def write_npy(runs: Sequence[AnsweredRun], limit: Limit) -> Slices[bytes]:
    """The table as a .npy file. Raises Refused for one of more bytes than `limit`."""
    names, total = list_names(runs), sum(run.rows for run in runs)
    longest = max((len(model) for run in runs for model in run.models), default=0) or 1
    error = min(max((len(run.error) for run in runs if run.error), default=0) or 1, MOST_ERROR)
    fields = [("item", "<i4"), ("model", f"<U{longest}"), ("start", "<M8[s]"), ("step", "<i4")]
    fields += [*((name, "<f4") for name in names), ("error", f"<U{error}")]
    header = write_header(fields, total)
    if len(header) > MOST_HEADER:
        message = f"{len(names)} columns of levels are more than np.load reads of a header; name `quantiles`"
        raise Refused(Situation.TOO_LARGE, f"{message}, or ask for an Arrow table")
    step_at = ITEM_BYTES + CHARACTER * longest + TIME_BYTES
    row_bytes = step_at + ITEM_BYTES * (1 + len(names)) + CHARACTER * error
    refuse_too_large(len(header) + total * row_bytes, limit)
    yield total
    body = bytearray(header)
    yield from _lay_rows(body, runs, longest, error, NAN * len(names))
    with memoryview(body)[len(header) :].cast("i") as table:
        yield from _put_numbers(table, runs, names, row_bytes // ITEM_BYTES, step_at // ITEM_BYTES)
    return cast("bytes", body)  # not copied: all that read it take any buffer


def _lay_rows(body: bytearray, runs: Sequence[AnsweredRun], longest: int, error: int, nothing: bytes) -> Slices[None]:
    """Append all rows with what the steps of an item share, and with neither steps nor numbers."""
    item, work = 0, 0
    for run in runs:
        end = pack("<qi", _count_seconds(run.start), NO_STEP) + nothing + _pad(run.error or "", error)
        for model in _pad_all(run.models, longest):
            rows = (item.to_bytes(ITEM_BYTES, "little") + model + end) * run.steps
            body += rows
            item += 1
            work += PART + len(rows)
            if work >= UNIT:
                yield work
                work = 0


def _put_numbers(
    table: "memoryview[int]", runs: Sequence[AnsweredRun], names: Sequence[str], wide: int, step_at: int
) -> Slices[None]:
    """Put steps and numbers into the rows, of `wide` numbers each, column by column."""
    first = 0
    for run in runs:
        last = first + run.rows * wide
        if run.error is None:
            table[first + step_at : last : wide] = memoryview(array("i", range(run.steps)) * len(run.models))
            for at, name in enumerate(names, first + step_at + 1):
                if name in run.numbers:
                    table[at:last:wide] = cast_numbers(run.numbers[name], "i")
                    yield run.rows * ITEM_BYTES
        first = last
        yield PART


def _pad_all(texts: Sequence[str], width: int) -> Iterator[bytes]:
    """Texts of one width, of which many are encoded at once."""
    at_once, size = max(1, UNIT // (CHARACTER * width)), CHARACTER * width
    for first in range(0, len(texts), at_once):
        padded = [text.ljust(width, "\0") for text in texts[first : first + at_once]]
        encoded = "".join(padded).encode("utf-32-le")
        yield from (encoded[at : at + size] for at in range(0, len(encoded), size))


def _pad(text: str, width: int) -> bytes:
    return text[:width].encode("utf-32-le").ljust(CHARACTER * width, b"\0")


def _count_seconds(start: str) -> int:
    """Seconds since 1970 of a time without a zone; NaT for what is none, which only code archives answer."""
    try:
        return (datetime.fromisoformat(start) - _EPOCH) // _SECOND
    except (ValueError, TypeError):
        return NOT_A_TIME
