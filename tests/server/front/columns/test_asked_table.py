"""Rows of a table that stay columns: the same items as rows that are cut, wherever no row has a fault."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.call_items import Item, TableItems, select_instances, select_rows
from server.front.columns.asked_table import Numbers, WholeSeries, cut_rows
from server.front.columns.npy_reader import read_npy
from server.front.slices import finish_slices
from server.ipc.packed import measure_instance, write_instance
from server.ipc.together import AskedTogether, RowColumns, read_asked, write_asked
from tests.server.front.columns.tables import START, TABLE, pa, read_table, write_table

LIMIT = 10**6


class CutSeries:
    """A column of lists that is only ever cut."""

    def __init__(self, series: Any) -> None:
        self._series = series

    def cut(self, row: int) -> Numbers | None:
        """The row's numbers."""
        found: Numbers | None = self._series.cut(row)
        return found

    def take_whole(self) -> WholeSeries | None:
        """Not to be had."""
        return None


def read_both(table: Any, limit: int = LIMIT) -> tuple[Any, list[Any]]:
    """The items of a table as they are read, and as they are where each row is cut."""
    found = finish_slices(cut_rows(table, limit, "max_body_bytes"))
    table.series = {name: CutSeries(each) for name, each in table.series.items()}
    cut = finish_slices(cut_rows(table, limit, "max_body_bytes"))
    assert isinstance(cut, list)
    return found, cut


def show_item(item: Any) -> Any:
    """An item, or why it is refused."""
    if isinstance(item, Refused):
        return str(item), item.detail
    return item.model, write_instance(item.instance), item.size


def make_columns(rows: int, draw: Any) -> Mapping[str, Any]:
    """Columns of any kind that a call may have."""
    numbers = st.lists(st.floats(-1e6, 1e6, width=32), max_size=4)
    columns: dict[str, Any] = {"model": [f"au/m{i}.mar" for i in range(rows)]}
    for name in ("target", "load"):
        if name == "target" or draw(st.booleans()):
            values = draw(st.lists(numbers, min_size=rows, max_size=rows))
            kind = draw(st.sampled_from([pa.float32(), pa.float64()]))
            columns[name] = pa.array(values, pa.list_(kind))
    if draw(st.booleans()):
        columns["item_id"] = draw(st.lists(st.none() | st.text("aü", max_size=2), min_size=rows, max_size=rows))
        columns["item_id"] = pa.array(columns["item_id"], pa.string())
    if draw(st.booleans()):
        columns["region"] = pa.array(range(rows), pa.int64())
    starts = st.lists(st.sampled_from([START, "2026-01-02"]), min_size=rows, max_size=rows)
    columns["start"] = pa.array(draw(starts), pa.string())
    return columns


@given(st.integers(1, 6), st.data())
def test_rows_of_columns_are_the_rows_that_are_cut(rows: int, data: st.DataObject) -> None:
    """Of Arrow tables of any columns; and what goes to a worker of any of the rows is the same for both."""
    found, cut = read_both(read_table(write_table(make_columns(rows, data.draw))))
    assert [*map(show_item, found)] == [*map(show_item, cut)]
    if any(isinstance(each, Refused) for each in cut):
        assert not isinstance(found, TableItems)
        return
    assert isinstance(found, TableItems)
    assert found.rows.measure_all(range(rows)) == [measure_instance(each.instance) for each in cut]
    places = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    models = [f"m{i}" for i in places]
    asked = [
        read_asked(write_asked(AskedTogether(models, [], b"{}", 9), select_instances(each, places)))
        for each in (found, cut)
    ]
    for at, place in enumerate(places):
        rows_asked = [each.columns.cut(at) for each in asked if each.columns is not None]
        assert [*map(write_instance, rows_asked)] == [write_instance(cut[place].instance)] * 2
    assert asked[0].head == asked[1].head


@pytest.mark.parametrize(
    "change",
    [
        {"model": ["a.mar", "b//c", "c.mar"]},
        {"model": ["a.mar", None, "c.mar"]},
        {"start": [START, None, START]},
        {"target": [[1.0], None, [2.0]]},
        {"load": [[1.0], [2.0], None]},
        {"region": pa.array([1, None, 3], pa.int64())},
    ],
)
def test_a_fault_is_its_rows_own(change: Mapping[str, Any]) -> None:
    """The row is refused as it always was, and the others are items."""
    found, cut = read_both(read_table(write_table({**TABLE, **change})))
    assert not isinstance(found, TableItems)
    assert [*map(show_item, found)] == [*map(show_item, cut)]
    assert sum(isinstance(each, Refused) for each in found) == 1


def test_a_row_that_is_too_large_is_refused_alone() -> None:
    """Just as large as the limit is not: then no row is looked at by itself."""
    body = write_table({**TABLE, "target": [[1.0] * 10, [2.0], [3.0]]})
    found, _ = read_both(read_table(body), 10 * 8 + 64)
    assert isinstance(found, TableItems)
    found, _ = read_both(read_table(body), 10 * 8 + 63)
    assert [isinstance(each, Refused) and each.situation is Situation.TOO_LARGE for each in found] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("order", "is_whole"), [("C", True), ("F", False)])
def test_members_of_a_file_stay_columns(order: Any, is_whole: bool) -> None:
    """An .npz file whose rows lie one behind the other; others are cut, and say the same."""
    file = io.BytesIO()
    target = np.asarray(np.arange(12.0).reshape(3, 4), order=order)
    np.savez(file, model=np.array(["a", "b", "c"]), start=np.array(START), target=target, load=target.astype("f8"))
    found, cut = read_both(finish_slices(read_npy(file.getvalue())))
    assert isinstance(found, TableItems) is is_whole
    assert [*map(show_item, found)] == [*map(show_item, cut)]


def test_items_are_a_sequence() -> None:
    """As a list of them would be, from both ends; what is wanted by itself is cut then."""
    found, cut = read_both(read_table(write_table()))
    assert isinstance(found, TableItems)
    assert (len(found), repr(found)) == (3, "<TableItems of <RowColumns of 3 rows, 1 series>>")
    assert show_item(found[-1]) == show_item(cut[2])
    assert [*map(show_item, found[1:])] == [*map(show_item, cut[1:])]
    with pytest.raises(IndexError):
        found[3]
    whole, part = (select_rows(found.rows, places) for places in (range(3), [0, 2]))
    assert whole is found.rows
    assert isinstance(part, RowColumns)
    assert [*map(write_instance, map(part.cut, range(2)))] == [write_instance(cut[i].instance) for i in (0, 2)]
    item = found[0]
    assert isinstance(item, Item)
    assert item.size == measure_instance(item.instance)
