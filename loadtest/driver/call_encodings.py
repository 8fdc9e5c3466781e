"""Calls for many models as JSON, as an Arrow table or as a file of numpy, and the check of their answers. Pure.

pyarrow is imported for Arrow alone.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.driver.dialects import find_call_fault
from server.contract import FORECASTS_END_BYTES, JSON, NPY, count_failed_forecasts

ARROW = "application/vnd.apache.arrow.stream"
SHARED = ("item", "model", "start", "step", "error")  #: columns of an answer that are no numbers of a forecast
NO_PYARROW = "calls as Arrow tables need pyarrow: pip install pyarrow, or --encoding npy"
Instance = Mapping[str, Any]


class Encoding(StrEnum):
    """How a call for many models and its answer are written."""

    JSON = "json"
    ARROW = "arrow"  #: one stream each way
    NPY = "npy"  #: an .npz file, and rows with fields

    @property
    def media(self) -> str:
        """The content type."""
        return {Encoding.JSON: JSON, Encoding.ARROW: ARROW, Encoding.NPY: NPY}[self]

    def check(self) -> None:
        """Import what it needs, which is not to be done while answers are timed. Raises ValueError without it."""
        if self is Encoding.ARROW:
            if find_spec("pyarrow") is None:
                raise ValueError(NO_PYARROW)
            import_module("pyarrow.ipc")


def encode_call(
    requests: Sequence[Instance], configuration: Instance, encoding: Encoding, names: Sequence[str] = ()
) -> bytes:
    """Write a call of instances of DeepAR that each have a `target_model`. Raises ValueError for what is no table.

    `names`: those that the archives give covariates and then categories, which JSON has in order and a table by name.
    """
    if encoding is Encoding.JSON:
        return json.dumps({"requests": requests, "configuration": configuration}).encode()
    columns = _make_columns(requests, names)
    shared = {"configuration": json.dumps(configuration)}
    if len(set(columns["start"])) == 1:
        shared["start"] = str(columns.pop("start")[0])
    if encoding is Encoding.NPY:
        return _write_npz({**columns, **{name: np.array(text) for name, text in shared.items()}})
    pa: Any = import_module("pyarrow")
    arrays = {name: pa.array(list(values) if values.ndim > 1 else values) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(shared)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def count_failed(answer: bytes, encoding: Encoding) -> int | None:
    """How many forecasts of a call failed by its answer, or by the end of one in JSON; None where it does not say."""
    if encoding is Encoding.JSON:
        return count_failed_forecasts(answer[-FORECASTS_END_BYTES:])
    try:
        return int(_read_answer(answer, encoding).failed.sum())
    except ValueError:
        return None


def find_answer_fault(answer: bytes, encoding: Encoding, forecasts: int, steps: int | None = None) -> str | None:
    """Return what is wrong with the answer to a call for so many forecasts; each has its steps, or one error.

    `steps`: of each forecast in a table; None where models have different ones.
    """
    if encoding is Encoding.JSON:
        return find_call_fault(answer, forecasts)
    try:
        found = _read_answer(answer, encoding)
    except ValueError as error:
        return f"no table of forecasts: {error}"
    first = np.searchsorted(found.item, np.arange(forecasts))
    sizes = np.diff(np.append(first, len(found.item)))
    if np.any(np.diff(found.item) < 0) or np.any(sizes < 1) or len(found.item) != sizes.sum() or found.item[0] != 0:
        return f"no rows of {forecasts} forecasts in their order, but {len(found.item)} of {np.unique(found.item).size}"
    if found.item[-1] != forecasts - 1:
        return f"rows of forecast {found.item[-1]}, and {forecasts} were asked"
    alone = found.failed[first]
    if np.any(sizes[alone] != 1) or found.failed.sum() != alone.sum():
        return "an error beside rows of the same forecast"
    if steps is not None and np.any(sizes[~alone] != steps):
        return f"forecasts of other than {steps} steps"
    counted = np.arange(len(found.item)) - np.repeat(first, sizes)
    if np.any(found.step[~found.failed] != counted[~found.failed]):
        return "steps that are not in their order"
    return _find_number_fault(found, first, sizes, alone)


@dataclass(frozen=True, slots=True, eq=False)
class _AnsweredRows:
    """The rows of an answer [n]: the forecast of each, its step, whether it is an error, and its numbers by column."""

    item: npt.NDArray[np.int64]
    step: npt.NDArray[np.float64]
    failed: npt.NDArray[np.bool_]
    numbers: Mapping[str, npt.NDArray[np.float32]]


def _read_answer(answer: bytes, encoding: Encoding) -> _AnsweredRows:
    """Raises ValueError for what is no answer."""
    if encoding is Encoding.NPY:
        try:
            rows: Any = np.load(io.BytesIO(answer), allow_pickle=False)
        except EOFError as error:
            raise ValueError(str(error)) from None
        names: Sequence[str] = getattr(rows.dtype, "names", None) or ()
        columns = {name: rows[name] for name in names}
    else:
        pa: Any = import_module("pyarrow")
        try:
            table = pa.ipc.open_stream(answer).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from None
        columns = {
            name: table[name].to_numpy() for name in table.column_names if name not in ("error", "model", "start")
        }
        columns |= {"error": table["error"].is_valid().to_numpy()} if "error" in table.column_names else {}
    if not {"item", "step", "error"} <= columns.keys() or not len(columns["item"]):
        raise ValueError(f"it has the columns {', '.join(columns)}")
    failed = columns["error"] if encoding is Encoding.ARROW else columns["step"] < 0
    numbers = {name: values for name, values in columns.items() if name not in SHARED}
    return _AnsweredRows(columns["item"].astype(np.int64), columns["step"].astype(np.float64), failed, numbers)


def _find_number_fault(
    found: _AnsweredRows, first: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], alone: npt.NDArray[np.bool_]
) -> str | None:
    """A forecast has all numbers of a column or none, because others are of levels that other models have."""
    whole = np.zeros(len(first), np.int64)
    for name, values in found.numbers.items():
        finite = np.add.reduceat(np.isfinite(values), first, dtype=np.int64)
        if np.any((finite != 0) & (finite != sizes)) or np.any(np.isinf(values)):
            return f"a number that is not finite in the column {name}"
        whole += finite == sizes
    missing = np.flatnonzero((whole == 0) & ~alone)
    return f"no numbers of forecast {missing[0]}" if missing.size else None


def _make_columns(requests: Sequence[Instance], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The columns of a table: [rows], or [rows, numbers]."""
    features, categories = (len(requests[0].get(key, ())) for key in ("dynamic_feat", "cat"))
    if features + categories > len(names):
        raise ValueError("a table has covariates and categories by name, and a --request does not say them: use JSON")
    columns = {
        "model": np.array([each["target_model"] for each in requests]),
        "start": np.array([each["start"] for each in requests]),
        "target": _stack([each["target"] for each in requests], "target"),
    }
    for i, name in enumerate(names[:features]):
        columns[name] = _stack([each["dynamic_feat"][i] for each in requests], name)
    for i, name in enumerate(names[features : features + categories]):
        columns[name] = np.array([each["cat"][i] for each in requests], np.int64)
    return columns


def _stack(rows: Sequence[Sequence[object]], name: str) -> npt.NDArray[np.float64]:
    try:
        found = np.array(rows, np.float64)
    except ValueError:
        lengths = sorted({len(row) for row in rows})
        message = f"series of {lengths[0]} to {lengths[-1]} numbers in {name!r}, and here a table has one length"
        raise ValueError(f"{message}: use JSON, or --per-call 1") from None
    if found.ndim != 2:  # noqa: PLR2004 -- [rows, numbers]
        raise ValueError("a model of several products has no place in a table: use JSON")
    return found


def _write_npz(members: Mapping[str, npt.NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # numpy.savez has arguments of its own, which columns may be named as
        for name, values in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    return file.getvalue()
