"""Answers as a .npy table: numpy reads of it what an Arrow table says, errors in their rows; bounded beforehand."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.columns.answered_table import read_runs, write_arrow
from server.front.columns.npy_writer import MOST_ERROR, write_npy
from server.front.exchange import Limit
from server.front.fan_out import Prediction
from server.front.inference import InferStats
from server.front.slices import finish_slices
from server.ipc.packed import NumbersBlock

START = "2026-01-01 00:00:00"
LIMIT = Limit(1_000_000, "max_forecasts_bytes")
STATS = InferStats("hit", 0, None, 0)
SHARED = ("item", "model", "start", "step")


def make_predictions(
    count: int, steps: int, levels: list[str], *, has_mean: bool = True, start: str = START
) -> list[Prediction]:
    """Predictions of one block, with numbers of their own."""
    size = count * steps
    columns = [np.arange(size, dtype=np.float32) + 1000 * i for i in range(len(levels) + has_mean)]
    block = NumbersBlock(start, steps, has_mean, levels, [each.tobytes() for each in columns])
    return [Prediction(block, STATS)] * count


def read_answer(models: list[str], found: list[Any], limit: Limit = LIMIT) -> Any:
    """The table as numpy reads it with its own limits."""
    body = bytes(finish_slices(write_npy(finish_slices(read_runs(models, found)), limit)))
    return np.load(io.BytesIO(body), allow_pickle=False)


def test_forecasts_and_errors_are_rows() -> None:
    """A row for each step, one for a failure; NaN, NaT and -1 where an Arrow table has nulls."""
    found = [
        *make_predictions(2, 2, ["0.5"]),
        Refused(Situation.NOT_FOUND, "no ü", field="model"),
        *make_predictions(1, 1, ["0.9"], has_mean=False, start="some day"),
    ]
    table = read_answer(["a", "bb", "c", "d"], found)
    assert table.dtype.names == (*SHARED, "mean", "0.5", "0.9", "error")
    assert table["item"].tolist() == [0, 0, 1, 1, 2, 3]
    assert table["model"].tolist() == ["a", "a", "bb", "bb", "c", "d"]
    assert table["step"].tolist() == [0, 1, 0, 1, -1, 0]
    assert table["start"].astype("U").tolist() == ["2026-01-01T00:00:00"] * 4 + ["NaT"] * 2
    assert table["error"].tolist() == [""] * 4 + ["not_found: model: no ü", ""]
    nan = np.nan
    assert np.array_equal(table["mean"], np.array([0, 1, 2, 3, nan, nan], np.float32), equal_nan=True)
    assert np.array_equal(table["0.5"], np.array([1000, 1001, 1002, 1003, nan, nan], np.float32), equal_nan=True)
    assert np.array_equal(table["0.9"], np.array([nan, nan, nan, nan, nan, 0], np.float32), equal_nan=True)


def test_a_call_of_which_all_fail() -> None:
    """There are no columns of numbers, and a long error is cut: each row is as wide as the longest."""
    table = read_answer(["a", ""], [Refused(Situation.OVERLOADED, "full " * 100), Refused(Situation.BAD_NAME, "none")])
    assert table.dtype.names == (*SHARED, "error")
    assert table["model"].tolist() == ["a", ""]
    assert [len(each) for each in table["error"]] == [MOST_ERROR, len("bad_name: none")]
    assert table["error"][0].startswith("overloaded: full full")


def test_a_large_table_is_refused_before_it_is_built() -> None:
    """Long names on many steps, or more levels than np.load reads the names of: 413 with what to do."""
    with pytest.raises(Refused, match="max_forecasts_bytes"):
        read_answer(["m" * 500], make_predictions(1, 300, ["0.5"]), Limit(100_000, "max_forecasts_bytes"))
    with pytest.raises(Refused, match=r"np\.load reads"):
        read_answer(["m"], make_predictions(1, 1, [f"0.{i}" for i in range(1000)]))
    assert len(read_answer(["m"], make_predictions(1, 1, [f"0.{i}" for i in range(500)]))) == 1


PARTS = st.lists(
    st.one_of(
        st.builds(
            make_predictions,
            st.integers(1, 3),
            st.integers(1, 4),
            st.lists(st.sampled_from(["0.1", "0.5", "0.9"]), min_size=1, max_size=3, unique=True),
            has_mean=st.booleans(),
        ),
        st.builds(lambda words: [Refused(Situation.NOT_FOUND, words)], st.text("abü ", min_size=1, max_size=9)),
    ),
    min_size=1,
    max_size=5,
)


@given(PARTS, st.data())
def test_arrow_and_npy_say_the_same(parts: list[list[Any]], data: st.DataObject) -> None:
    """Whatever was answered in whatever runs: every value of every row, where Arrow has one."""
    pa: Any = pytest.importorskip("pyarrow")
    found = [each for part in parts for each in part]
    size = len(found)
    models = data.draw(st.lists(st.text("abcü/.", min_size=1, max_size=6), min_size=size, max_size=size))
    runs = finish_slices(read_runs(models, found))
    arrow = pa.ipc.open_stream(bytes(finish_slices(write_arrow(runs, LIMIT)))).read_all()
    table = read_answer(models, found)
    assert (arrow.column_names, arrow.num_rows) == (list(table.dtype.names), len(table))
    missing = {"start": "NaT", "step": -1, "error": ""}
    for name in arrow.column_names:
        said = table[name].astype("U") if name == "start" else table[name]
        for expected, value in zip(arrow[name].to_pylist(), said.tolist(), strict=True):
            if expected is None:
                assert value == missing[name] if name in missing else np.isnan(value)
            else:
                assert value == (expected.replace(" ", "T") if name == "start" else expected)
