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
from server.ipc.packed import InstanceHead, pack_instance

MOST_COLUMNS = 64
MOST_NAME = 100  #: characters of a column's name
TEXTS = ("model", "start", "item_id")
TARGET = "target"
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
        message = "the table has no such column; have one, or say it once in the schema's metadata under this name"
        raise Refused(Situation.BAD_REQUEST, message, field="start")


def cut_rows(table: AskedTable, limit: int, setting: str) -> Slices[list[Item | Refused]]:
    """An item for each row, or why it is refused alone. `limit`: bytes of a request to one model, of that `setting`."""
    found: list[Item | Refused] = []
    for row in range(table.rows):
        try:
            item: Item | Refused = _cut_row(table, row)
        except Refused as refused:
            item = refused
        size = len(memoryview(item.instance)) if isinstance(item, Item) else 0
        if size > limit:
            message = f"the row has {size} bytes, the limit of a request to one model is {limit} ({setting})"
            item = Refused(Situation.TOO_LARGE, message)
        found.append(item)
        yield ITEM + size
    return found


def _cut_row(table: AskedTable, row: int) -> Item:
    """One row. Raises Refused."""
    texts = {name: values[row] for name, values in table.texts.items()}
    try:
        model = parse_model_name(texts["model"] or "")
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error), field="model") from None
    start = texts.get("start") or table.shared.get("start")
    if start is None:
        raise Refused(Situation.BAD_REQUEST, "it is null in this row", field="start")
    names = [TARGET, *(name for name in table.series if name != TARGET)]
    series = [_cut_series(table.series[name], name, row) for name in names]
    if len({each.code for each in series}) > 1:
        raise Refused(Situation.BAD_REQUEST, "target and covariates have numbers of two types; send one", field=TARGET)
    categories = {name: values[row] for name, values in table.categories.items()}
    missing = next((name for name, value in categories.items() if value is None), None)
    if missing is not None:
        raise Refused(Situation.BAD_REQUEST, "it is null in this row", field=missing)
    width = 4 if series[0].code == "f" else 8
    sizes = [len(each.values) // width for each in series]
    cat = [value for value in categories.values() if value is not None]
    head = InstanceHead(start, texts.get("item_id"), series[0].code, sizes, [*names[1:], *categories], cat)
    return Item(model, pack_instance(head, [each.values for each in series]))


def _cut_series(series: Series, name: str, row: int) -> Numbers:
    found = series(row)
    if found is None:
        raise Refused(Situation.BAD_REQUEST, "it is null in this row", field=name)
    return found
