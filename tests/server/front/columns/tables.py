"""Tables as clients write and read them, by pyarrow."""

import io
from collections.abc import Mapping
from typing import Any, cast

import pytest

from server.errors import Refused
from server.front.call_items import Item
from server.front.columns.arrow_reader import read_arrow
from server.front.columns.asked_table import AskedTable, check_columns, cut_rows
from server.front.slices import finish_slices
from server.ipc.packed import TableRow, measure_instance, write_instance

pa = pytest.importorskip("pyarrow")
START = "2026-01-01 00:00:00"
TABLE: Mapping[str, Any] = {
    "model": ["a.mar", "b.mar", "c.mar"],
    "start": [START] * 3,
    "target": [[1.0, 2.5], [3.0], []],
}


def write_table(columns: Mapping[str, Any] = TABLE, shared: Mapping[str, str] | None = None, **options: Any) -> bytes:
    """A table as an IPC stream. `options`: of the batches and of the stream."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    if shared is not None:
        table = table.replace_schema_metadata(dict(shared))
    rows = options.pop("rows", None)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return stream.getvalue()


def read_table(body: bytes) -> AskedTable:
    """The call in a stream. Raises Refused."""
    table = finish_slices(read_arrow(body))
    check_columns(table)
    return table


def read_items(body: bytes, limit: int = 10**6) -> list[Any]:
    """Each row as (model, instance in JSON), or its refusal."""
    found = finish_slices(cut_rows(read_table(body), limit, "max_body_bytes"))
    assert all(each.size == measure_instance(each.instance) for each in found if isinstance(each, Item))
    return [
        (each.model, write_instance(cast("TableRow", each.instance))) if isinstance(each, Item) else each
        for each in found
    ]


def describe(found: Any) -> str:
    """What is wrong with a row."""
    assert isinstance(found, Refused)
    return f"{found.detail.field}: {found}"
