"""CSV files become evenly spaced series, or an error that names the line."""

import gzip
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from handlers.training.time_series import Series, SeriesInvalid, read_csv

START = datetime.fromisoformat("2024-01-01")  # without zone: wall-clock time
HEAD = "hour,NSW1,VIC1,load_NSW1\n"
LINES = ["2024-01-01 00:00,1.5,,10", "2024-01-01 01:00,,-2,11", "2024-01-01 02:00,3,4,12"]


def write(folder: Path, text: str) -> Path:
    """The text as a CSV file."""
    path = folder / "prices.csv"
    path.write_text(text)
    return path


def test_a_gzipped_file_becomes_one_series_a_target(tmp_path: Path) -> None:
    """Values, missing cells, stamps, frequency and each target's own covariates arrive as written."""
    path = tmp_path / "prices.csv.gz"
    path.write_bytes(gzip.compress((HEAD + "\n".join(LINES)).encode()))
    (nsw,) = read_csv(path, "hour", ["NSW1"], ["load_{target}"])
    (vic,) = read_csv(path, "hour", ["VIC1"])
    np.testing.assert_array_equal(nsw.values, [1.5, np.nan, 3])
    np.testing.assert_array_equal(vic.values, [np.nan, -2, 4])
    np.testing.assert_array_equal(nsw.known, [[10, 11, 12]])
    assert (nsw.start, nsw.frequency, nsw.known_names) == (START, "1h", ("load_NSW1",))
    assert nsw.instance(0, 2, 1) == {
        "start": "2024-01-01 00:00:00",
        "target": [1.5, None],
        "dynamic_feat": [[10.0, 11.0, 12.0]],
    }


def test_stamps_with_an_offset_become_utc(tmp_path: Path) -> None:
    """A local clock's repeated hour is told apart by its offset."""
    lines = ["2024-10-27T02:00+02:00,1", "2024-10-27T02:00+01:00,2", "2024-10-27T03:00+01:00,3"]
    (series,) = read_csv(write(tmp_path, "t,p\n" + "\n".join(lines)), "t", ["p"])
    assert series.start == datetime.fromisoformat("2024-10-27")
    assert series.frequency == "1h"


@pytest.mark.parametrize(
    ("step", "frequency"),
    [(timedelta(minutes=5), "5min"), (timedelta(minutes=90), "90min"), (timedelta(days=1), "1D"),
     (timedelta(days=14), "2W"), (timedelta(seconds=4), "4s")],
)  # fmt: skip
def test_the_step_names_the_frequency(step: timedelta, frequency: str) -> None:
    """The largest unit that divides the step."""
    assert Series("p", START, step, np.zeros(3), np.zeros((0, 3))).frequency == frequency


def test_before_cuts_at_the_moment() -> None:
    """The first step at or after the moment is the first one left out; far moments leave nothing, or everything."""
    series = Series("p", START, timedelta(hours=1), np.arange(5.0), np.zeros((1, 5)), ("load",))
    for moment, length in (("2023-06-01", 0), ("2024-01-01", 0), ("2024-01-01 01:30", 2), ("2024-01-01 02", 2)):
        assert len(series.before(datetime.fromisoformat(moment)).values) == length
    everything = series.before(datetime.fromisoformat("2030-01-01"))
    assert (len(everything.values), everything.known.shape) == (5, (1, 5))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["2024-01-01 03:00,x,5,13"], "line 5, column 'NSW1': 'x' is not a finite number"),
        (["2024-01-01 03:00,inf,5,13"], "line 5, column 'NSW1': 'inf' is not a finite number"),
        (["01.01.2024 3 Uhr,4,5,13"], "line 5, column 'hour': expected a time such as"),
        (["2024-01-01 02:00,4,5,13"], "line 5: 2024-01-01 02:00:00 appears twice"),
        (["2024-01-01 05:00,4,5,13"], "line 5: 2024-01-01 05:00:00 comes 3:00:00 after"),
        (["2024-01-01 01:00,4,5,13"], "sort the rows by time"),
        (["2024-01-01 03:00,4,5"], "line 5: 3 cells, but the header has 4"),
        (["2024-01-01 03:00,4,5,"], "line 5, column 'load_NSW1': a known-future value is missing"),
        (
            ["2024-01-01 03:00+00:00,4,5,1"],
            "line 5: 2024-01-01 03:00:00+00:00 has an offset, but the first row has none",
        ),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, lines: list[str], said: str) -> None:
    """Bad cells and uneven stamps are refused with file, line and column."""
    path = write(tmp_path, HEAD + "\n".join(LINES + lines))
    with pytest.raises(SeriesInvalid) as error:
        read_csv(path, "hour", ["NSW1"], ["load_NSW1"])
    assert str(error.value).startswith("prices.csv, line ")
    assert said in str(error.value)


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    """Blank lines are let through and still counted."""
    with pytest.raises(SeriesInvalid, match="line 6, column 'NSW1'"):
        read_csv(write(tmp_path, HEAD + "\n\n".join([*LINES[:2], "2024-01-01 02:00,x,4,12"])), "hour", ["NSW1"])


def test_a_file_that_cannot_be_a_series_says_why(tmp_path: Path) -> None:
    """A missing column lists those there are; one row has no frequency; a gzip name needs gzip bytes."""
    with pytest.raises(SeriesInvalid, match="there is no column 'SA1'; the columns are hour, NSW1, VIC1, load_NSW1"):
        read_csv(write(tmp_path, HEAD), "hour", ["SA1"])
    with pytest.raises(SeriesInvalid, match="1 rows of data"):
        read_csv(write(tmp_path, HEAD + LINES[0]), "hour", ["NSW1"])
    broken = tmp_path / "prices.csv.gz"
    broken.write_text("no gzip")
    with pytest.raises(SeriesInvalid, match="not a CSV file"):
        read_csv(broken, "hour", ["NSW1"])
