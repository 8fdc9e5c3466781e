"""The answers to a call for many models as one table: a row for each step, and one for each item that failed. Pure.

Columns: `item` (its place in the call), `model`, `start` (of the forecast's first step), `step` (from 0), `mean`, one
for each level under its name, and `error` (a code and what was wrong), which is null where there is a forecast.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from server.errors import Refused, Situation
from server.front.columns.arrow_metadata import FLOAT, INT, UTF8
from server.front.columns.arrow_writer import Column, write_stream
from server.front.exchange import Limit
from server.front.fan_out import Prediction
from server.front.slices import ITEM, Slices, join_parts
from server.ipc.packed import read_prediction

MEAN = "mean"
MOST_LEVELS = 2000  #: columns of levels, of all archives together
ROW_BYTES = 24  #: of a row beside its texts and numbers
ZERO = b"\0\0\0\0"


class AnsweredRow(NamedTuple):
    """The rows of one item: its columns' float32 bytes by name, or why there are none."""

    model: str
    start: str
    steps: int
    numbers: dict[str, memoryview]
    error: str | None


def read_rows(models: Sequence[str], found: Sequence[Prediction | Refused]) -> Slices[list[AnsweredRow]]:
    """The rows of each item of a call. Raises Refused for columns of too many levels."""
    rows, names = list[AnsweredRow](), dict[str, None]()
    for model, each in zip(models, found, strict=True):
        rows.append(_read_row(model, each))
        names.update(dict.fromkeys(rows[-1].numbers))
        if len(names) > MOST_LEVELS:
            message = f"the models answer {len(names)} different levels, {MOST_LEVELS} are the most; name `quantiles`"
            raise Refused(Situation.TOO_LARGE, message)
        yield ITEM
    return rows


def _read_row(model: str, found: Prediction | Refused) -> AnsweredRow:
    if isinstance(found, Refused):
        error = f"{found.situation.name.lower()}: {found.detail.say('rows')}"
        return AnsweredRow(model, "", 1, {}, error)
    head, columns = read_prediction(found.body)
    names = [*([MEAN] if head.has_mean else []), *head.levels]
    return AnsweredRow(model, head.start, head.steps, dict(zip(names, columns, strict=True)), None)


def write_arrow(rows: Sequence[AnsweredRow], limit: Limit) -> Slices[bytes]:
    """The table as an Arrow IPC stream. Raises Refused for one of more bytes than `limit`."""
    names = list_names(rows)
    total = sum(row.steps for row in rows)
    size = sum(row.steps * (len(row.model) + len(row.start) + len(row.error or "")) for row in rows)
    size += total * (ROW_BYTES + 4 * len(names))
    if size > limit.bytes:
        message = f"the table of answers would have {size} bytes, the limit is {limit.bytes} ({limit.setting})"
        raise Refused(Situation.TOO_LARGE, f"{message}; ask for less in one call")
    texts = (
        ("model", [row.model for row in rows]),
        ("start", [None if row.error else row.start for row in rows]),
    )
    columns = [Column("item", INT, 0, [b"", b"".join(_repeat(i, row.steps) for i, row in enumerate(rows))])]
    yield total
    for name, values in texts:
        columns.append(_write_texts(name, values, rows))
        yield total * 4
    failed = [row.error is not None for row in rows]
    steps = b"".join(ZERO if row.error else _count_steps(row.steps) for row in rows)
    columns.append(Column("step", INT, sum(failed), [_write_bits(failed, rows), steps]))
    for name in names:
        missing = [name not in row.numbers for row in rows]
        data = b"".join(row.numbers.get(name) or bytes(4 * row.steps) for row in rows)
        nulls = sum(row.steps for row, is_missing in zip(rows, missing, strict=True) if is_missing)
        columns.append(Column(name, FLOAT, nulls, [_write_bits(missing, rows), data]))
        yield len(data) + len(rows) * 64
    columns.append(_write_texts("error", [row.error for row in rows], rows))
    yield total * 4
    return (yield from join_parts(write_stream(columns, total)))  # type: ignore[arg-type]  # it takes any buffer


def list_names(rows: Iterable[AnsweredRow]) -> list[str]:
    """The columns of numbers: the mean, then the levels in the order in which they were first answered."""
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    return [*([MEAN] if names.pop(MEAN, 0) is None else []), *names]


def _count_steps(count: int) -> bytes:
    return array("i", range(count)).tobytes()


def _repeat(value: int, count: int) -> bytes:
    return value.to_bytes(4, "little") * count


def _write_texts(name: str, values: Sequence[str | None], rows: Sequence[AnsweredRow]) -> Column:
    """A column of one text for all rows of an item, null where there is none."""
    borders, parts, at = array("i", (0,)), list[bytes](), 0
    for value, row in zip(values, rows, strict=True):
        raw = b"" if value is None else value.encode()
        parts.append(raw * row.steps)
        if raw:
            borders.extend(range(at + len(raw), at + len(raw) * row.steps + 1, len(raw)))
        else:
            borders.extend([at] * row.steps)
        at += len(raw) * row.steps
    missing = [value is None for value in values]
    nulls = sum(row.steps for row, is_missing in zip(rows, missing, strict=True) if is_missing)
    return Column(name, UTF8, nulls, [_write_bits(missing, rows), borders.tobytes(), b"".join(parts)])


def _write_bits(missing: Sequence[bool], rows: Sequence[AnsweredRow]) -> bytes:
    """Which rows have a value, a bit for each; nothing where all have."""
    if not any(missing):
        return b""
    bits = "".join(("0" if is_missing else "1") * row.steps for is_missing, row in zip(missing, rows, strict=True))
    return int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little")
