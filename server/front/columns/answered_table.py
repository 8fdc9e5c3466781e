"""The answers to a call for many models as one table: a row for each step, and one for each item that failed. Pure.

Columns: `item` (its place in the call), `model`, `start` (of the forecast's first step), `step` (from 0), `mean`, one
for each level under its name, and `error` (a code and what was wrong), which is null where there is a forecast.

Forecasts that a worker computed together are columns already (`NumbersBlock`); those of them that follow each other in
the call are one run, whose bytes are copied as they lie.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from server.errors import Refused, Situation
from server.front.columns.arrow_metadata import FLOAT, INT, UTF8
from server.front.columns.arrow_writer import Column, write_stream
from server.front.exchange import Limit
from server.front.fan_out import Prediction
from server.front.slices import ITEM, Slices, join_few
from server.ipc.packed import NumbersBlock

MEAN = "mean"
MOST_LEVELS = 2000  #: columns of levels, of all archives together
ROW_BYTES = 24  #: of a row beside its texts and numbers
OFFSET = 4  #: bytes of an offset or a number
MOST_CUT = 2048  #: parts of columns that are joined at once
READ = ITEM // 16  #: what it counts to look at an answer
FEW = 256  #: int32 numbers that are written one by one
BLOCK = 4096  #: int32 numbers that are written at once
RAMP = int.from_bytes(array("i", range(BLOCK)).tobytes(), "little")  #: 0, 1, 2 and so on, side by side
ONES = int.from_bytes(array("i", (1,)).tobytes() * BLOCK, "little")


class AnsweredRun(NamedTuple):
    """The rows of items that follow each other, of `steps` each: their float32 bytes by name, or why there are none."""

    models: Sequence[str]
    start: str
    steps: int
    numbers: dict[str, memoryview]
    error: str | None

    @property
    def rows(self) -> int:
        """The rows of all its items."""
        return len(self.models) * self.steps


def read_runs(models: Sequence[str], found: Sequence[Prediction | Refused]) -> Slices[list[AnsweredRun]]:
    """The runs of a call's items. Raises Refused for columns of too many levels."""
    runs, names, at = list[AnsweredRun](), dict[str, None](), 0
    read: dict[int, int] = {}  # rows of a block that came before; its rows are in the order of the items
    while at < len(found):
        each, first = found[at], at
        if isinstance(each, Refused):
            at += 1
            error = f"{each.situation.name.lower()}: {each.detail.say('rows')}"
            runs.append(AnsweredRun(models[first:at], "", 1, {}, error))
        else:
            pieces = _find_pieces(found, at, read)
            at += sum(piece.rows for piece in pieces)
            runs.append(_join_pieces(models[first:at], pieces))
        names.update(dict.fromkeys(runs[-1].numbers))
        if len(names) > MOST_LEVELS:
            message = f"the models answer {len(names)} different levels, {MOST_LEVELS} are the most; name `quantiles`"
            raise Refused(Situation.TOO_LARGE, message)
        yield ITEM + (at - first) * READ
    return runs


class _Piece(NamedTuple):
    """Rows of a block that follow each other."""

    block: NumbersBlock
    first: int
    rows: int


def _find_pieces(found: Sequence[Prediction | Refused], first: int, read: dict[int, int]) -> list[_Piece]:
    """The forecasts from this place on that have one start, length and levels; `read` counts the rows of blocks.

    Workers answer in blocks of their own, so that the items of several workers take turns.
    """
    pieces, at, head = list[_Piece](), first, _get_block(found[first])
    while at < len(found) and len(pieces) * len(head.columns) <= MOST_CUT and _is_alike(found[at], head):
        each, begins, block = found[at], at, _get_block(found[at])
        while at < len(found) and (found[at] is each or _is_of(found[at], block)):
            at += 1
        row = read.get(id(block), 0)
        read[id(block)] = row + at - begins
        pieces.append(_Piece(block, row, at - begins))
    return pieces


def _get_block(found: Prediction | Refused) -> NumbersBlock:
    assert isinstance(found, Prediction), "no refusal is a row of a block"
    assert isinstance(found.body, NumbersBlock), "a table of answers was asked for"
    return found.body


def _is_of(found: Prediction | Refused, block: NumbersBlock) -> bool:
    return isinstance(found, Prediction) and found.body is block


def _is_alike(found: Prediction | Refused, head: NumbersBlock) -> bool:
    """Whether it is a forecast whose rows can stand in one run with those of another block."""
    if isinstance(found, Refused):
        return False
    block = _get_block(found)
    return block is head or (
        (block.start, block.steps, block.has_mean) == (head.start, head.steps, head.has_mean)
        and list(block.levels) == list(head.levels)
    )


def _join_pieces(models: Sequence[str], pieces: Sequence[_Piece]) -> AnsweredRun:
    """The run of these rows. Those of one piece are not copied."""
    head = pieces[0].block
    names, size = [*([MEAN] if head.has_mean else []), *head.levels], head.steps * OFFSET
    numbers = dict[str, memoryview]()
    for k, name in enumerate(names):
        parts = [memoryview(block.columns[k])[at * size : (at + rows) * size] for block, at, rows in pieces]
        numbers[name] = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    return AnsweredRun(models, head.start, head.steps, numbers, None)


def write_arrow(runs: Sequence[AnsweredRun], limit: Limit) -> Slices[bytes]:
    """The table as an Arrow IPC stream. Raises Refused for one of more bytes than `limit`."""
    names = list_names(runs)
    total = sum(run.rows for run in runs)
    size = sum(run.steps * sum(map(len, run.models)) for run in runs)
    size += sum(run.rows * (len(run.start) + len(run.error or "")) for run in runs)
    size += total * (ROW_BYTES + OFFSET * len(names))
    refuse_too_large(size, limit)
    yield total
    columns = [Column("item", INT, 0, [b"", _number_items(runs)])]
    models = [(run.models, run.steps) for run in runs]
    columns.append(_write_texts("model", models, [(run.rows, False) for run in runs]))
    yield total * 4
    failed = [(run.rows, run.error is not None) for run in runs]
    columns.append(_write_texts("start", [((run.start,), run.rows) for run in runs], failed))
    steps = b"".join(array("i", range(run.steps)).tobytes() * len(run.models) for run in runs)
    columns.append(Column("step", INT, _count_nulls(failed), [_write_bits(failed), steps]))
    yield total * 2
    for name in names:
        missing = [(run.rows, name not in run.numbers) for run in runs]
        parts = [run.numbers[name] if name in run.numbers else bytes(OFFSET * run.rows) for run in runs]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        columns.append(Column(name, FLOAT, _count_nulls(missing), [_write_bits(missing), data]))
        yield (len(data) if len(parts) > 1 else 0) + len(runs) * 64
    errors = [((run.error or "",), run.rows) for run in runs]
    columns.append(_write_texts("error", errors, [(run.rows, run.error is None) for run in runs]))
    yield total
    return (yield from join_few(write_stream(columns, total)))


def refuse_too_large(size: int, limit: Limit) -> None:
    """Raises Refused for a table of more bytes than `limit`."""
    if size > limit.bytes:
        message = f"the table of answers would have {size} bytes, the limit is {limit.bytes} ({limit.setting})"
        raise Refused(Situation.TOO_LARGE, f"{message}; ask for less in one call")


def list_names(runs: Iterable[AnsweredRun]) -> list[str]:
    """The columns of numbers: the mean, then the levels in the order in which they were first answered."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    return [*([MEAN] if names.pop(MEAN, 0) is None else []), *names]


def _number_items(runs: Sequence[AnsweredRun]) -> bytes:
    parts, item = list[bytes](), 0
    for run in runs:
        parts += [number.to_bytes(OFFSET, "little") * run.steps for number in range(item, item + len(run.models))]
        item += len(run.models)
    return b"".join(parts)


def _write_texts(name: str, runs: Sequence[tuple[Sequence[str], int]], missing: Sequence[tuple[int, bool]]) -> Column:
    """A column of runs of texts, each text for so many rows, null where it is missing."""
    parts, sizes = list[bytes](), list[tuple[int, int]]()
    for texts, rows in runs:
        encoded = [text.encode() for text in texts]
        parts += [text * rows for text in encoded]
        sizes += [(size, rows * len(list(alike))) for size, alike in groupby(map(len, encoded))]
    borders, at = [bytes(OFFSET)], 0
    for size, each in groupby(sizes, itemgetter(0)):
        rows = sum(count for _, count in each)
        borders += _count_up(at + size, size, rows)
        at += size * rows
    return Column(name, UTF8, _count_nulls(missing), [_write_bits(missing), b"".join(borders), b"".join(parts)])


def _count_up(first: int, step: int, count: int) -> Iterator[bytes]:
    """So many numbers, each `step` more than the one before, as int32, in blocks.

    A block is one product of long integers, which hold its numbers side by side. None of those that are wanted reaches
    into the next; what a later one has too much goes to those behind it, which are cut off.
    """
    if count <= FEW:
        yield array("i", range(first, first + step * count, step) if step else (first,) * count).tobytes()
        return
    for at in range(0, count, BLOCK):
        block = (step * RAMP + (first + step * at) * ONES).to_bytes((BLOCK + 1) * OFFSET, "little")
        yield block[: OFFSET * min(BLOCK, count - at)]


def _count_nulls(missing: Sequence[tuple[int, bool]]) -> int:
    return sum(rows for rows, is_missing in missing if is_missing)


def _write_bits(missing: Sequence[tuple[int, bool]]) -> bytes:
    """Which rows have a value, a bit for each; nothing where all have."""
    if not any(is_missing for _, is_missing in missing):
        return b""
    bits = "".join(["01"[not is_missing] * rows for rows, is_missing in missing])
    return int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little")
