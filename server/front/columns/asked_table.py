"""A call for many models as a table: what its columns mean. Pure.

`model` names the models. `target` has their histories, lists of numbers. `start`, `item_id` are texts; each further
column of lists is a covariate, and each of whole numbers a category, under the names that the archives give them. What
all rows share may be said once, in the table's own texts: `start`, and `configuration` (JSON, as in a JSON call).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

from model_store.names import InvalidModelName, parse_model_name, parse_model_names
from server.errors import Refused, Situation
from server.front.call_items import Item, Items, TableItems
from server.front.raw_json import MAX_ITEMS
from server.front.slices import ITEM, Slices
from server.ipc.packed import ITEM_BYTES, ROW_BYTES, TableRow
from server.ipc.together import AskedColumns, RowColumns, say_once

MOST_COLUMNS = 64
MOST_NAME = 100  #: characters of a column's name
TEXTS = ("model", "start", "item_id")
TARGET = "target"
NULL = "it is null in this row"
WHOLE = 64  #: what it counts to look at a row that stays in its columns
CUT = ITEM // 4  #: what it counts to cut a row, whose numbers are not copied
LEFT_OUT = "__index_level_"  #: the beginning of what pandas calls an index without a name


class Numbers(NamedTuple):
    """The numbers of one row: their bytes, little-endian, NaN where missing. None instead: the row has none."""

    code: str  #: `f` or `d`
    values: bytes | memoryview


class WholeSeries(NamedTuple):
    """The numbers of all rows, side by side, and how many each row has; one count where all have as many."""

    code: str
    values: memoryview
    sizes: list[int]


class Series(Protocol):
    """A column of lists of numbers."""

    def cut(self, row: int) -> Numbers | None:
        """The numbers of a row. Raises Refused."""

    def take_whole(self) -> WholeSeries | None:
        """All numbers as they lie; None where a row has none, is faulty, or does not lie beside the one before."""


@dataclass
class AskedTable:
    """The rows of a call. Numbers are cut only where they are asked for."""

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


def cut_rows(table: AskedTable, limit: int, setting: str) -> Slices[Items]:
    """An item for each row, or why it is refused alone. `limit`: bytes of a request to one model, of that `setting`."""
    whole = yield from _take_whole(table, limit)
    if whole is not None:
        return whole
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


def _take_whole(table: AskedTable, limit: int) -> Slices[TableItems | None]:
    """All rows as columns; None where a row has a fault or may be too large, which only a look at each can tell."""
    models, starts = parse_model_names(table.texts["model"]), _take_starts(table)
    ids, cats = table.texts.get("item_id", ()), list(table.categories.values())
    yield table.rows * WHOLE
    if models is None or starts is None or any(None in each for each in cats):
        return None
    names, series = _order_series(table)
    found = list[WholeSeries]()
    for each in series:
        whole = each.take_whole()
        yield table.rows * WHOLE
        if whole is None or whole.code != (found or [whole])[0].code:
            return None
        found.append(whole)
    code = found[0].code
    if sum(max(each.sizes) for each in found) * ITEM_BYTES[code] + ROW_BYTES > limit:
        return None
    item_ids = [] if ids.count(None) == len(ids) else list(ids)
    categories = [[cast("int", value) for value in row] for row in zip(*cats, strict=True)]
    yield table.rows * WHOLE * len(cats)
    head = AskedColumns(code, names, starts, item_ids, categories, [say_once(each.sizes) for each in found])
    return TableItems(models, RowColumns(head, [each.values for each in found], table.rows))


def _take_starts(table: AskedTable) -> list[str] | None:
    """The start of each row, or the one of all; None where a row has none."""
    shared = table.shared.get("start")
    if "start" not in table.texts:
        return None if shared is None else [shared]
    starts = [each or shared for each in table.texts["start"]]
    return None if None in starts else say_once(cast("list[str]", starts))


def _order_series(table: AskedTable) -> tuple[list[str], list[Series]]:
    """The names of what comes after the target, of series and then of categories; and all series, the target first."""
    others = [name for name in table.series if name != TARGET]
    return [*others, *table.categories], [table.series[TARGET], *(table.series[name] for name in others)]


class _RowCutter:
    """Cuts rows; what all have in common is found once."""

    def __init__(self, table: AskedTable) -> None:
        self._models = table.texts["model"]
        nothing = [None] * table.rows
        self._starts, self._shared_start = table.texts.get("start", nothing), table.shared.get("start")
        self._item_ids = table.texts.get("item_id", nothing)
        self._categories = list(table.categories.items())
        self._names, series = _order_series(table)
        self._series = list(zip((TARGET, *self._names), series, strict=False))

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
            numbers = series.cut(row)
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
