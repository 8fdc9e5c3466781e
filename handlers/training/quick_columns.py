"""Reads columns of a price file as arrays, by Apache Arrow where that is installed (the extra `parquet`). No torch.

Arrow reads what files mostly have. Whatever else there is, a decimal comma or a fault, `handlers.training.time_series`
reads cell by cell, in the same way but for the time it takes, and names the line of a fault.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from handlers.codecs.clock import Float64, Int64
from handlers.training.stamps import SeriesInvalid, parse_stamp

MISSING = {"", "-", "nan", "null", "none", "na", "n/a", "n/e"}  #: in small letters
BLOCK_BYTES = 2**22  #: bytes of the file that are taken apart at a time
Table = tuple[list[datetime], list[int], dict[str, Float64]]  #: stamps, their lines, and columns by name


class _NotQuick(Exception):
    """The file has something that only the other reader understands, or can explain."""


def read_columns_quickly(
    path: Path, time: int, wanted: dict[str, int], width: int, item: tuple[int | None, str], time_format: str
) -> Table | None:
    """Read stamps, their line numbers and the wanted columns, by their places in a header of one line.

    `width`: how many columns there are. `item`: the place of the column of items, and which item is read; empty: the
    only one. Returns None where the other reader has to look.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 -- an extra, and a tenth of a second
    except ModuleNotFoundError:
        return None
    batches = _Batches(time, wanted, item, time_format)
    try:
        text = [time] if item[0] is None else [time, item[0]]
        for batch in _open_batches(path, text, list(wanted.values()), width):
            batches.add(batch)
    except (_NotQuick, SeriesInvalid, pa.ArrowException, OSError, UnicodeDecodeError):
        return None
    return batches.make_table()


def _open_batches(path: Path, text: Sequence[int], numbers: Sequence[int], width: int) -> Iterable[Any]:
    """Open the rows after the header in batches, whose columns are named by their places; gzip by the file's name."""
    import pyarrow as pa  # noqa: PLC0415 -- an extra
    from pyarrow import csv  # noqa: PLC0415

    names = [str(place) for place in range(width)]
    kinds = {str(place): pa.float64() for place in numbers} | {str(place): pa.string() for place in text}
    options = csv.ConvertOptions(
        column_types=kinds, include_columns=list(kinds), null_values=_list_missing(), strings_can_be_null=False
    )
    return csv.open_csv(  # type: ignore[no-any-return]
        str(path),
        read_options=csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False, block_size=BLOCK_BYTES),
        parse_options=csv.ParseOptions(ignore_empty_lines=False),
        convert_options=options,
    )


class _Batches:
    """Collects the rows of one item from batches of columns."""

    def __init__(self, time: int, wanted: dict[str, int], item: tuple[int | None, str], time_format: str) -> None:
        self._time, self._wanted, self._item, self._time_format = time, wanted, item, time_format
        self._rows = 0
        self._only = ""  #: the only item, where none is asked for
        self._stamps = list[datetime]()
        self._lines = list[int]()
        self._parts: dict[str, list[Float64]] = {name: [] for name in wanted}

    def __repr__(self) -> str:
        return f"<_Batches of {len(self._wanted)} columns, {self._rows} rows>"

    def add(self, batch: Any) -> None:
        """Add a batch. Raises _NotQuick and SeriesInvalid for what the other reader has to look at."""
        kept = self._choose_rows(batch)
        first = self._rows + 2  # the header is line 1
        self._rows += batch.num_rows
        texts = batch.column(str(self._time)).to_pylist()
        for row in kept.tolist():
            self._stamps.append(parse_stamp(texts[row], first + row, "", self._time_format))
        self._lines += (first + kept).tolist()
        for name, place in self._wanted.items():
            values = batch.column(str(place)).to_numpy(zero_copy_only=False)
            if np.isinf(values).any():
                raise _NotQuick
            self._parts[name].append(values[kept].astype(np.float64))

    def _choose_rows(self, batch: Any) -> Int64:
        """Return the rows of the item. Raises _NotQuick if it is not said which of several items is read."""
        place, value = self._item
        if place is None:
            return np.arange(batch.num_rows)
        items = [text.strip() for text in batch.column(str(place)).to_pylist()]
        self._only = self._only or (items[0] if items else "")
        if not value and any(text != self._only for text in items):
            raise _NotQuick
        return np.flatnonzero([text == (value or self._only) for text in items])

    def make_table(self) -> Table:
        """Join the batches; the parts of a column are freed before the next is joined."""
        columns = {}
        for name in self._wanted:
            parts = self._parts.pop(name)
            columns[name] = np.concatenate(parts) if parts else np.empty(0)
        return self._stamps, self._lines, columns


def _list_missing() -> list[str]:
    """List the spellings of a missing value: small, large, and as a word begins a sentence."""
    return sorted({spelt for word in MISSING for spelt in (word, word.upper(), word.capitalize(), "NaN", "N/a")})
