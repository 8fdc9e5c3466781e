"""A call for many models as a table: what its columns mean. Pure.

`model` names the models. `target` has their histories, lists of numbers. `start`, `item_id` are texts; each further
column of lists is a covariate, and each of whole numbers a category, under the names that the archives give them. What
all rows share may be said once, in the table's own texts: `start`, and `configuration` (JSON, as in a JSON call).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model_store.names import InvalidModelName, parse_model_name
from server.errors import Refused, Situation
from server.front.fan_out import Item
from server.front.raw_json import MAX_ITEMS
from server.front.slices import ITEM, Slices
from server.ipc.packed import ROW_BYTES, TableRow

MOST_COLUMNS = 64
MOST_NAME = 100  #: characters of a column's name
TEXTS = ("model", "start", "item_id")
TARGET = "target"
NULL = "it is null in this row"
CUT = ITEM // 4  #: what it counts to cut a row, whose numbers are not copied
LEFT_OUT = "__index_level_"  #: the beginning of what pandas calls an index without a name


class Numbers(NamedTuple):
    """The numbers of one row: their bytes, little-endian, NaN where missing. None instead: the row has none."""

    code: str  #: `f` or `d`
    values: bytes | memoryview


Series = Callable[[int], Numbers | None]


@dataclass
class AskedTable:
    """The rows of a call. A function of a row gives its numbers, so that only what is asked for is cut."""

    rows: int
    texts: Mapping[str, Sequence[str | None]]
    series: Mapping[str, Series]
    categories: Mapping[str, Sequence[int | None]]
    shared: Mapping[str, str] = field(default_factory=dict)  #: the table's own texts


def check_columns(table: AskedTable) -> None:
    """Check that a table is a call. Raises Refused."""
    if not 1 <= table.rows <= MAX_ITEMS:
        raise Refused(Situation.BAD_REQUEST, f"a call has 1 to {MAX_ITEMS} rows, not {table.rows}")
    for name, found, what in (("model", table.texts, "names of models"), (TARGET, table.series, "lists of numbers")):
        if name not in found:
            raise Refused(Situation.BAD_REQUEST, f"the table has no such column of {what}", field=name)
    if "start" not in table.texts and "start" not in table.shared:
        message = (
            "the table has no such column; have one, or say it once under this name: in the schema's metadata of an "
            "Arrow table, as a member of an .npz file"
        )
        raise Refused(Situation.BAD_REQUEST, message, field="start")


def cut_rows(table: AskedTable, limit: int, setting: str) -> Slices[list[Item | Refused]]:
    """An item for each row, or why it is refused alone. `limit`: bytes of a request to one model, of that `setting`."""
    cutter = _RowCutter(table)
    found: list[Item | Refused] = []
    for row in range(table.rows):
        try:
            item: Item | Refused = cutter.cut(row)
        except Refused as refused:
            item = refused
        if isinstance(item, Item) and item.size > limit:
            message = f"the row has {item.size} bytes, the limit of a request to one model is {limit} ({setting})"
            item = Refused(Situation.TOO_LARGE, message)
        found.append(item)
        yield CUT
    return found


class _RowCutter:
    """Cuts rows; what all have in common is found once."""

    def __init__(self, table: AskedTable) -> None:
        self._models = table.texts["model"]
        nothing = [None] * table.rows
        self._starts, self._shared_start = table.texts.get("start", nothing), table.shared.get("start")
        self._item_ids = table.texts.get("item_id", nothing)
        self._series = [(TARGET, table.series[TARGET])]
        self._series += [each for each in table.series.items() if each[0] != TARGET]
        self._categories = list(table.categories.items())
        self._names = [name for name, _ in (*self._series[1:], *self._categories)]

    def cut(self, row: int) -> Item:
        """One row. Raises Refused."""
        try:
            model = parse_model_name(self._models[row] or "")
        except InvalidModelName as error:
            raise Refused(Situation.BAD_NAME, str(error), field="model") from None
        start = self._starts[row] or self._shared_start
        if start is None:
            raise Refused(Situation.BAD_REQUEST, NULL, field="start")
        code, values, size = "", list[bytes | memoryview](), ROW_BYTES
        for name, series in self._series:
            numbers = series(row)
            if numbers is None:
                raise Refused(Situation.BAD_REQUEST, NULL, field=name)
            if code and numbers.code != code:
                message = "target and covariates have numbers of two types; send one"
                raise Refused(Situation.BAD_REQUEST, message, field=TARGET)
            code = numbers.code
            values.append(numbers.values)
            size += len(numbers.values)
        cat = self._cut_categories(row) if self._categories else ()
        return Item(model, TableRow(start, self._item_ids[row], code, self._names, values, cat), size)

    def _cut_categories(self, row: int) -> Sequence[int]:
        found = list[int]()
        for name, values in self._categories:
            value = values[row]
            if value is None:
                raise Refused(Situation.BAD_REQUEST, NULL, field=name)
            found.append(value)
        return found
