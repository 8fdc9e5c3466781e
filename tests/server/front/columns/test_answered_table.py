"""Answers as a table: pyarrow reads of it what was answered, errors in their rows; bounded before it is built."""

from array import array
from typing import Any

import pytest

from server.errors import Refused, Situation
from server.front.columns.answered_table import BLOCK, MOST_CUT, MOST_LEVELS, read_runs, write_arrow
from server.front.exchange import Limit
from server.front.fan_out import Prediction
from server.front.inference import InferStats
from server.front.slices import finish_slices
from server.ipc.packed import NumbersBlock, read_json_prediction
from tests.server.front.columns.tables import START, pa
from tests.server.front.counted import count_work

LIMIT = Limit(100_000, "max_forecasts_bytes")
STATS = InferStats("hit", 0, None, 0)


def make_prediction(levels: list[str], *rows: list[float], has_mean: bool = True) -> Prediction:
    """A prediction that is a block of its own."""
    columns = [array("f", row).tobytes() for row in rows]
    return Prediction(NumbersBlock(START, len(rows[0]), has_mean, levels, columns), STATS)


def read_answer(models: list[str], found: list[Prediction | Refused], limit: Limit = LIMIT) -> list[dict[str, Any]]:
    """The table as a client reads it, fully validated."""
    body = bytes(finish_slices(write_arrow(finish_slices(read_runs(models, found)), limit)))
    table = pa.ipc.open_stream(body).read_all()
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_forecasts_and_errors_are_rows() -> None:
    """A row for each step, one for a failure; a level that only some models have is null in the rows of others."""
    found: list[Prediction | Refused] = [
        make_prediction(["0.5"], [1.0, 2.0], [3.0, 4.0]),
        Refused(Situation.NOT_FOUND, "no ü", field="model"),
        make_prediction(["0.9"], [5.0], has_mean=False),
        Prediction(read_json_prediction(b'{"start":"s","time_zone":"UTC","mean":[7],"quantiles":{"0.5":[8]}}'), STATS),
    ]
    empty = {"start": None, "step": None, "mean": None, "0.5": None, "0.9": None}
    no_error = {"0.5": None, "0.9": None, "error": None}
    assert read_answer(["a", "b", "c", "d"], found) == [
        {"item": 0, "model": "a", "start": START, "step": 0, "mean": 1.0, **no_error, "0.5": 3.0},
        {"item": 0, "model": "a", "start": START, "step": 1, "mean": 2.0, **no_error, "0.5": 4.0},
        {"item": 1, "model": "b", **empty, "error": "not_found: model: no ü"},
        {"item": 2, "model": "c", "start": START, "step": 0, "mean": None, **no_error, "0.9": 5.0},
        {"item": 3, "model": "d", "start": "s", "step": 0, "mean": 7.0, **no_error, "0.5": 8.0},
    ]


@pytest.mark.parametrize("steps", [BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_texts_of_many_rows_lie_where_they_are_said_to(steps: int) -> None:
    """Names of several lengths, a long error and none: pyarrow reads each row's texts, whatever block it falls into."""
    long = "x" * 20_000
    found: list[Prediction | Refused] = [
        make_prediction(["0.5"], [0.0] * steps, [1.0] * steps),
        make_prediction(["0.5"], [0.0], [1.0]),
        Refused(Situation.OVERLOADED, long),
        make_prediction(["0.5"], [0.0] * steps, [1.0] * steps),
    ]
    names = ["a.mar", "bb.mar", "c.mar", "ü" * 20]
    rows = read_answer(names, found, Limit(10_000_000, "max_forecasts_bytes"))
    wanted: list[tuple[Any, ...]] = [(names[0], START, step, None) for step in range(steps)]
    wanted += [(names[1], START, 0, None), (names[2], None, None, f"overloaded: {long}")]
    wanted += [(names[3], START, step, None) for step in range(steps)]
    assert [(row["model"], row["start"], row["step"], row["error"]) for row in rows] == wanted


def test_a_call_of_which_all_fail() -> None:
    """There are no columns of numbers, and all rows are errors."""
    (row,) = read_answer(["a"], [Refused(Situation.OVERLOADED, "full")])
    assert row == {"item": 0, "model": "a", "start": None, "step": None, "error": "overloaded: full"}


def test_a_large_table_is_refused_before_it_is_built() -> None:
    """Long names on many steps, or too many different levels: 413 with the numbers."""
    with pytest.raises(Refused, match="max_forecasts_bytes"):
        read_answer(["m" * 500], [make_prediction(["0.5"], [0.0] * 300, [0.0] * 300)])
    many = [make_prediction([f"0.{i}"], [0.0], has_mean=False) for i in range(MOST_LEVELS + 1)]
    with pytest.raises(Refused, match="different levels"):
        read_answer(["m"] * len(many), [*many])


@pytest.mark.parametrize("text", [b"{", b"{}", b'{"mean":[[1.0]]}', b'{"mean":[1],"quantiles":{"0.5":[1,2]}}'])
def test_answers_without_a_place_in_a_table(text: bytes) -> None:
    """Answers of several products, or no forecast at all."""
    with pytest.raises(Exception, match=r"JSON|series|truncated|Expected|expected"):
        read_json_prediction(text)


@pytest.mark.parametrize("count", [7, MOST_CUT + 7])
def test_answers_of_several_workers_are_one_run(count: int) -> None:
    """Items whose blocks take turns, of which one has other levels: the rows of each block come in their order, in as
    few runs as there are heads, and are not joined more than so many at once.
    """
    levels = [["0.5"], ["0.5"], ["0.9"]]
    turns = [i % 2 if i < count - 2 else 2 for i in range(count)]
    numbers = [array("f", [i for i, of in enumerate(turns) if of == k]) for k in range(3)]
    blocks = [NumbersBlock(START, 1, False, levels[k], [numbers[k].tobytes()]) for k in range(3)]
    found: list[Prediction | Refused] = [Prediction(blocks[of], STATS) for of in turns]
    models = [f"m{i}" for i in range(count)]
    runs, works = count_work(read_runs(models, found))
    assert [[*run.numbers] for run in runs] == [["0.5"]] * -(-(count - 2) // (MOST_CUT + 1)) + [["0.9"]]
    assert len(works) == len(runs)
    rows = read_answer(models, found, Limit(10**6, "max_forecasts_bytes"))
    assert [(row["item"], row["model"]) for row in rows] == [*enumerate(models)]
    assert [row["0.5"] if row["0.9"] is None else row["0.9"] for row in rows] == [*range(count)]
