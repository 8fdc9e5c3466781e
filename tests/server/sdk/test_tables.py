"""Tables of forecasts in the client: whatever holds columns is one stream that a front reads, with the same numbers."""

import datetime as dt
import sys
from typing import Any

import numpy as np
import polars as pl
import pytest

from server.front.call_items import Item
from server.front.columns.table_calls import read_table_call
from server.front.exchange import Limit
from server.front.slices import finish_slices
from server.ipc.packed import TableRow, cast_numbers
from server.sdk.forecasts import ForecastOptions
from server.sdk.tables import write_table

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
MODELS = ["a.mar", "b.mar"]
TARGET = [[1.0, 2.5], [3.0, 4.0]]
START = "2026-01-01 00:00:00"


def read_rows(body: bytes) -> list[tuple[str, str, list[float]]]:
    """What a front reads: model, start and target of each row."""
    call = finish_slices(read_table_call(body, Limit(10**6, "max_body_bytes")))
    found = list[tuple[str, str, list[float]]]()
    for item in call.items:
        assert isinstance(item, Item)
        assert isinstance(item.instance, TableRow)
        target = cast_numbers(memoryview(item.instance.series[0]), item.instance.code).tolist()
        found.append((item.model, item.instance.start, list(map(float, target))))
    return found


@pytest.mark.parametrize(
    "table",
    [
        {"model": MODELS, "target": TARGET},
        {"model": MODELS, "target": np.array(TARGET)},
        {"model": MODELS, "target": np.array(TARGET, np.float32)},
        {"model": MODELS, "target": [np.array(row) for row in TARGET]},
        pa.table({"model": pa.array(MODELS).dictionary_encode(), "target": TARGET}),
        pd.DataFrame({"model": MODELS, "target": TARGET}, index=[7, 9]),
        pl.DataFrame({"model": MODELS, "target": TARGET}),
        pl.DataFrame({"model": MODELS, "target": TARGET}, schema_overrides={"model": pl.Categorical}),
    ],
)
def test_whatever_has_columns_is_a_call(table: Any) -> None:
    """Mappings, arrays, and frames of three libraries, with strings and numbers of their own types."""
    expected = [(model, START, row) for model, row in zip(MODELS, TARGET, strict=True)]
    assert read_rows(write_table(table, START, ForecastOptions(quantiles=[0.1]))) == expected


def test_starts_may_be_a_column_of_time() -> None:
    """Time stamps are written to the second, as requests have them."""
    moments = [dt.datetime(2026, 1, 1, 5), dt.datetime(2026, 1, 2)]  # noqa: DTZ001 -- without an offset
    for table in ({"model": MODELS, "target": TARGET, "start": moments},
                  pd.DataFrame({"model": MODELS, "target": TARGET, "start": moments})):  # fmt: skip
        found = read_rows(write_table(table, None, ForecastOptions()))
        assert [start for _, start, _ in found] == ["2026-01-01 05:00:00", "2026-01-02 00:00:00"]


@pytest.mark.parametrize(
    ("table", "start", "message"),
    [
        ({"model": MODELS}, START, "no column 'target'"),
        ({"model": MODELS, "target": TARGET}, None, "no column 'start'"),
        ({"model": MODELS, "target": TARGET, "start": [START] * 2}, START, "give one of them"),
        ({"model": MODELS, "target": TARGET[:1]}, START, "make no table"),
        ({"model": MODELS, "target": [["x"], ["y"]]}, START, "no type that a server takes"),
        (3, START, "not a int"),
    ],
)
def test_what_is_no_call_is_said_before_it_is_sent(table: Any, start: str | None, message: str) -> None:
    """With the column, or with what to give."""
    with pytest.raises(ValueError, match=message):
        write_table(table, start, ForecastOptions())


def test_samples_have_no_place_in_a_table() -> None:
    """Which says what to use instead."""
    with pytest.raises(ValueError, match="forecast_many"):
        write_table({"model": MODELS, "target": TARGET}, START, ForecastOptions(num_samples=3))


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tables need it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        write_table({"model": MODELS, "target": TARGET}, START, ForecastOptions())
