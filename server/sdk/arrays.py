"""Calls for many models as arrays of numpy whose rows have fields: to an .npz file, and from a .npy file.

numpy is imported when the first such array is given, and pyarrow is not needed.
"""

import io
import json
import zipfile
from importlib import import_module
from typing import Any

from server.sdk.errors import Unreachable
from server.sdk.forecasts import ForecastOptions
from server.sdk.tables import NO_SAMPLES, check_columns


def has_fields(table: Any) -> bool:
    """Whether it is an array of numpy whose rows have fields."""
    return getattr(getattr(table, "dtype", None), "names", None) is not None


def write_fields(table: Any, start: str | None, options: ForecastOptions) -> bytes:
    """A call as an .npz file, of an array [rows] with fields. Raises ValueError for what is no call."""
    numpy: Any = import_module("numpy")
    configuration = options.to_configuration()
    if "samples" in configuration.get("output_types", ()):
        raise ValueError(NO_SAMPLES)
    if table.ndim != 1:
        raise ValueError(f"the array is {list(table.shape)}; a table is [rows]")
    check_columns(list(table.dtype.names), start)
    members = {name: _make_plain(numpy, name, table[name]) for name in table.dtype.names}
    members["configuration"] = numpy.array(json.dumps(configuration))
    if start is not None:
        members["start"] = numpy.array(start)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # numpy.savez has arguments of its own, which columns may be named as
        for name, values in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                numpy.lib.format.write_array(member, values, allow_pickle=False)
    return file.getvalue()


def read_fields(body: bytes, url: str) -> Any:
    """The answers as an array with fields. Raises Unreachable for a body that is none."""
    numpy: Any = import_module("numpy")
    try:
        return numpy.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Unreachable(f"{url}: the answer is not a table of forecasts: {error}") from error


def _make_plain(numpy: Any, name: str, values: Any) -> Any:
    """The column with a type that a server takes. Raises ValueError for one that has none."""
    kind = values.dtype.kind
    if kind == "M":
        return values.astype("<M8[s]")
    if kind in "US":
        return numpy.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if kind not in "fiu":
        message = f"the column {name!r} is of {values.dtype}, no type that a server takes"
        raise ValueError(f"{message}; texts, datetime64, and numbers are, and objects are none of them")
    if values.ndim == 1 and kind in "iu":
        return values.astype("<i8")
    return numpy.ascontiguousarray(values, "<f4" if values.dtype.itemsize == 4 and kind == "f" else "<f8")  # noqa: PLR2004
