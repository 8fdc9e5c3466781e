"""Calls for many models as tables: columns to an Arrow stream, and an Arrow stream to rows, errors in their rows.

pyarrow is imported when the first table is written; whoever asks for single forecasts needs none.
"""

import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from server.sdk.errors import Unreachable
from server.sdk.forecasts import ForecastOptions

ARROW = "application/vnd.apache.arrow.stream"
REQUIRED = ("model", "target")
NO_PYARROW = (
    "tables of forecasts need pyarrow, which is not installed: pip install pyarrow "
    "(or give an array of numpy whose rows have fields, or use forecast_many)"
)
NO_SAMPLES = "a table has no place for samples: leave num_samples and `samples` out, or use forecast_many"


def import_pyarrow() -> Any:
    """The module pyarrow. Raises ImportError that says what to install."""
    try:
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError(NO_PYARROW) from error


def write_table(table: Any, start: str | None, options: ForecastOptions) -> bytes:
    """A call as an Arrow stream, of a pyarrow table, a frame of pandas or polars, or a mapping of columns.

    `start` is that of all rows that have none of their own. Raises ImportError without pyarrow, ValueError for what is
    no call.
    """
    pa = import_pyarrow()
    configuration = options.to_configuration()
    if "samples" in configuration.get("output_types", ()):
        raise ValueError(NO_SAMPLES)
    found = _make_table(pa, table)
    check_columns(found.column_names, start)
    said = {"configuration": json.dumps(configuration), **({} if start is None else {"start": start})}
    found = _cast_columns(pa, found, {name.encode(): value.encode() for name, value in said.items()})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, found.schema) as writer:
        writer.write_table(found.combine_chunks())
    return stream.getvalue()


def check_columns(names: Sequence[str], start: str | None) -> None:
    """Raises ValueError for a table that lacks a column, or has `start` twice."""
    for name in REQUIRED:
        if name not in names:
            raise ValueError(f"the table has no column {name!r}; it has {', '.join(names) or 'none'}")
    if start is None and "start" not in names:
        raise ValueError("the table has no column 'start'; have one, or give `start` for all rows")
    if start is not None and "start" in names:
        raise ValueError("the table has a column 'start', and `start` is given as well: give one of them")


def read_table(body: bytes, url: str) -> Any:
    """The answers as a pyarrow table. Raises Unreachable for a body that is none."""
    pa = import_pyarrow()
    try:
        return pa.ipc.open_stream(body).read_all()
    except (pa.ArrowException, OSError) as error:
        raise Unreachable(f"{url}: the answer is not a table of forecasts: {error}") from error


def _make_table(pa: Any, table: Any) -> Any:
    """The columns as a pyarrow table. Raises ValueError for what has none."""
    if isinstance(table, pa.Table):
        return table
    try:
        if isinstance(table, Mapping):
            return pa.table({name: _make_column(pa, values) for name, values in table.items()})
        if hasattr(table, "to_arrow"):  # polars
            return table.to_arrow()
        if hasattr(table, "columns") and hasattr(table, "iloc"):  # pandas
            return pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"the columns make no table: {error}") from error
    message = f"a table is one of pyarrow, pandas or polars, or a mapping of columns, not a {type(table).__name__}"
    raise ValueError(message)


def _make_column(pa: Any, values: Any) -> Any:
    """A column; an array of two dimensions is one of lists of equal length, without an object for each number."""
    if getattr(values, "ndim", 1) == 2:  # noqa: PLR2004 -- [rows, steps]
        rows, steps = values.shape
        flat = pa.array(values.reshape(-1))
        return (
            pa.FixedSizeListArray.from_arrays(flat, steps) if steps else pa.array([[]] * rows, pa.list_(pa.float64()))
        )
    return pa.array(values)


def _cast_columns(pa: Any, table: Any, metadata: Mapping[bytes, bytes]) -> Any:
    """The table with the types that a server takes. Raises ValueError for a column that has no such type."""
    for i, each in enumerate(table.schema):
        if pa.types.is_timestamp(each.type):  # to seconds, so that its text has no fractions
            seconds = table[each.name].cast(pa.timestamp("s", each.type.tz))
            table = table.set_column(i, each.name, seconds.cast(pa.large_utf8()))
    try:
        return table.cast(pa.schema([_plain_field(pa, each) for each in table.schema], metadata=metadata))
    except pa.ArrowException as error:
        raise ValueError(f"a column has no type that a server takes: {error}") from error


def _plain_field(pa: Any, field: Any) -> Any:
    """The type that a server takes for a column: plain strings, lists of float64 or float32, and int64."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, _has(pa, "is_string_view"))):
        return pa.field(field.name, pa.large_utf8())
    if any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        number = kind.value_type if pa.types.is_float32(kind.value_type) else pa.float64()
        fixed = pa.types.is_fixed_size_list(kind)
        return pa.field(field.name, pa.list_(number, kind.list_size) if fixed else pa.large_list(number))
    return pa.field(field.name, pa.int64() if pa.types.is_integer(kind) else kind)


def _has(pa: Any, name: str) -> Any:
    """A test of types that older releases of pyarrow do not have."""
    return getattr(pa.types, name, lambda _: False)
