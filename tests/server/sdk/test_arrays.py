"""Arrays with fields in the client: one file that a front reads, with the same numbers; without pyarrow."""

import io
import sys
from typing import Any

import numpy as np
import pytest

from server.contract import NPY
from server.front.call_items import Item
from server.front.columns.table_calls import read_table_call
from server.front.exchange import Limit
from server.front.slices import finish_slices
from server.ipc.packed import TableRow, cast_numbers
from server.sdk.arrays import has_fields, read_fields, write_fields
from server.sdk.errors import Unreachable
from server.sdk.forecasts import ForecastOptions

START = "2026-01-01 00:00:00"
FIELDS: list[Any] = [("model", "U5"), ("target", "f8", (2,)), ("start", "M8[s]")]
ROWS = np.array([("a.mar", [1.0, 2.5], START), ("b.mar", [3.0, 4.0], START)], FIELDS)


def read_rows(body: bytes) -> list[tuple[str, str, list[float]]]:
    """What a front reads: model, start and target of each row."""
    call = finish_slices(read_table_call(body, Limit(10**6, "max_body_bytes"), NPY))
    assert call.configuration == b'{"quantiles": ["0.1"]}'
    found = list[tuple[str, str, list[float]]]()
    for item in call.items:
        assert isinstance(item, Item)
        assert isinstance(item.instance, TableRow)
        target = cast_numbers(memoryview(item.instance.series[0]), item.instance.code).tolist()
        found.append((item.model, item.instance.start, list(map(float, target))))
    return found


def recast_fields(fields: Any) -> Any:
    """The rows with those fields."""
    rows = np.zeros(len(ROWS), fields)
    for name in rows.dtype.names or ():
        rows[name] = ROWS[name]
    return rows


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        (ROWS, None),
        (ROWS.view(np.recarray), None),
        (ROWS[::-1][::-1], None),
        (recast_fields(FIELDS[:2]), START),
        (recast_fields([("model", "S5"), ("target", "f4", (2,)), ("start", "M8[ns]")]), None),
        (recast_fields([("model", ">U5"), ("target", ">f8", (2,)), ("start", ">M8[h]")]), None),
        (recast_fields(np.dtype(FIELDS, align=True)), None),
    ],
)
def test_rows_with_fields_are_a_call(rows: Any, start: str | None) -> None:
    """Of any layout and byte order; what a server does not take is cast before it is sent."""
    assert has_fields(rows)
    expected = [("a.mar", START, [1.0, 2.5]), ("b.mar", START, [3.0, 4.0])]
    assert read_rows(write_fields(rows, start, ForecastOptions(quantiles=[0.1]))) == expected


def test_a_column_may_be_called_as_an_argument_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`file` and `allow_pickle` are arguments of numpy.savez, and names of covariates here; pyarrow is not needed."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    rows = np.zeros(1, [*FIELDS, ("file", "i4", (3,)), ("allow_pickle", "i2")])
    rows["model"] = "a.mar"
    call = finish_slices(read_table_call(write_fields(rows, None, ForecastOptions()), Limit(10**6, "x"), NPY))
    (item,) = call.items
    assert isinstance(item, Item)
    assert isinstance(item.instance, TableRow)
    assert item.instance.names == ["file", "allow_pickle"]


@pytest.mark.parametrize(
    ("rows", "start", "message"),
    [
        (ROWS[["model", "start"]], None, "no column 'target'"),
        (ROWS[["model", "target"]], None, "no column 'start'"),
        (ROWS, START, "give one of them"),
        (ROWS.reshape(1, 2), None, r"a table is \[rows\]"),
        (np.zeros(1, [*FIELDS[:1], ("target", "O"), FIELDS[2]]), None, "objects are none"),
    ],
)
def test_what_is_no_call_is_said_before_it_is_sent(rows: Any, start: str | None, message: str) -> None:
    """With the column, or with what to give."""
    with pytest.raises(ValueError, match=message):
        write_fields(rows, start, ForecastOptions())
    with pytest.raises(ValueError, match="forecast_many"):
        write_fields(ROWS, None, ForecastOptions(num_samples=3))


def test_answers_are_read_without_pickles() -> None:
    """A table as it is; anything else is no answer of a server."""
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    for body in (b"", b"no", file.getvalue()):
        with pytest.raises(Unreachable, match="not a table"):
            read_fields(body, "http://host")
    assert not has_fields(np.zeros(3))
    assert not has_fields({"model": []})
