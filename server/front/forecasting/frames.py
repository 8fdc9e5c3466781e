"""Frames of MLflow's clients and the DeepAR instances that they hold (CONTRACTS 9). Pure.

A wide frame has an instance a row: its column `target` has lists. A long frame has a row a step: a time, a value,
perhaps an id, and the model's covariates by name. The rows of an id after its last value are the forecast's.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from server.errors import Refused, Situation
from server.front.forecasting.bodies import require_few
from server.front.forecasting.calls import Forecast
from server.front.forecasting.recipes import NO_CLOCK, Recipe, shift_start

TIMES, VALUES, IDS = ("timestamp", "ds"), ("target", "y"), ("item_id", "unique_id")
MAX_COLUMNS = 1000
WIDE = ("start", "target", "cat", "dynamic_feat", "item_id")
Cell = Any
Frame = Mapping[str, Sequence[Cell]]  #: columns by name, all of one length


@dataclass(frozen=True, slots=True)
class SeriesAsked:
    """One instance of a frame. `later`: the times of its rows that follow the history."""

    instance: dict[str, Any]
    item: Cell = None
    later: Sequence[Cell] = ()


def read_csv(body: bytes) -> Frame:
    """The columns of CSV with a header; an empty cell is missing. Raises Refused."""
    require_few(body.count(b",") + body.count(b"\n") + 1, "the body")
    try:
        rows = list(csv.reader(io.StringIO(body.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused(Situation.BAD_REQUEST, f"not CSV in UTF-8: {error}") from None
    if not rows or not rows[0]:
        raise Refused(Situation.BAD_REQUEST, "the CSV has no columns: its first line names them")
    return make_frame(rows[0], [[_read_cell(cell) for cell in row] for row in rows[1:] if row], "the CSV's line")


def make_frame(columns: Sequence[str], rows: Sequence[Sequence[Cell]], what: str) -> Frame:
    """Columns of rows. Raises Refused for a row of another length."""
    if len(set(columns)) < len(columns) or len(columns) > MAX_COLUMNS:
        message = f"a frame has 1 to {MAX_COLUMNS} columns of different names, not {len(columns)}"
        raise Refused(Situation.BAD_REQUEST, message, field="columns")
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise Refused(Situation.BAD_REQUEST, f"{what} has {len(row)} cells for {len(columns)} columns", i)
    return {name: [row[i] for row in rows] for i, name in enumerate(columns)}


def gather_records(records: Sequence[Mapping[str, Cell]]) -> Frame:
    """Columns of records; what a record lacks is missing."""
    names = list(dict.fromkeys(name for record in records for name in record))
    require_few(len(names) * len(records), "the frame")
    return make_frame(names, [[record.get(name) for name in names] for record in records], "the record")


def is_wide(frame: Frame) -> bool:
    """Whether its rows are instances."""
    target = frame.get("target", ())
    return bool(target) and all(isinstance(cell, list) for cell in target)


def list_series(frame: Frame, recipe: Recipe) -> list[SeriesAsked]:
    """The instances of a frame. Raises Refused that names the row or the column."""
    if is_wide(frame):
        return _list_wide(frame)
    time, value, item = (_find_column(frame, names) for names in (TIMES, VALUES, IDS))
    if value is None or time is None:
        message = "a frame has a column target of lists, or the columns timestamp (or ds) and target (or y)"
        raise Refused(Situation.BAD_REQUEST, f"{message}, not {', '.join(islice(frame, 10))}", field="columns")
    known = {time, value, item, *recipe.dynamic_feat}
    strange = [name for name in frame if name not in known]
    missing = [name for name in recipe.dynamic_feat if name not in frame]
    if strange or missing:
        message = f"the model's covariates are {', '.join(recipe.dynamic_feat[:10]) or 'none'}: "
        message += f"{missing[0]!r} is missing" if missing else f"{strange[0][:80]!r} is none of them"
        raise Refused(Situation.BAD_REQUEST, message, field="columns")
    rows: dict[Cell, list[int]] = {}
    for i in range(len(frame[value])):
        key = None if item is None else frame[item][i]
        if isinstance(key, (list, dict)):
            raise Refused(Situation.BAD_REQUEST, "an id is text or a number", i, item)
        rows.setdefault(key, []).append(i)
    return [_make_long(frame, recipe, (time, value), key, places) for key, places in rows.items()]


def write_records(asked: SeriesAsked, forecast: Forecast, recipe: Recipe, horizon: int) -> list[dict[str, Any]]:
    """A record for each step of a long frame's series, flat: `get_predictions()` makes a frame of them."""
    records = list[dict[str, Any]]()
    for step in range(horizon):
        record: dict[str, Any] = {} if asked.item is None else {"item_id": asked.item}
        at = asked.later[step] if step < len(asked.later) else shift_start(forecast.start or "", step, recipe.frequency)
        record["timestamp"] = at or forecast.start
        if forecast.mean is not None:
            record["mean"] = forecast.mean[step]
        for level, values in forecast.quantiles.items():
            record[level] = values[step]
        records.append(record)
    return records


def _list_wide(frame: Frame) -> list[SeriesAsked]:
    count = len(frame["target"])
    present = [name for name in WIDE if name in frame]
    rows = [{name: frame[name][i] for name in present if frame[name][i] is not None} for i in range(count)]
    return [SeriesAsked({"start": NO_CLOCK, **row}) for row in rows]


def _make_long(frame: Frame, recipe: Recipe, names: tuple[str, str], item: Cell, places: Sequence[int]) -> SeriesAsked:
    time, value = names
    values = [frame[value][i] for i in places]
    length = max((i + 1 for i, each in enumerate(values) if each is not None), default=0)
    if not length:
        raise Refused(Situation.BAD_REQUEST, f"the series {str(item)[:80]!r} has no value", places[0], value)
    start, later = frame[time][places[0]], [frame[time][i] for i in places[length:]]
    instance: dict[str, Any] = {"start": start, "target": values[:length]}
    if recipe.dynamic_feat:
        until = length + recipe.prediction_length
        instance["dynamic_feat"] = [[frame[name][i] for i in places[:until]] for name in recipe.dynamic_feat]
    return SeriesAsked(instance, item, later)


def _find_column(frame: Frame, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in frame), None)


def _read_cell(text: str) -> str | float | None:
    """An empty cell is missing, a number a number, and all else text."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text
