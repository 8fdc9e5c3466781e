"""Requests out of tables, and answers as tables: plain columns, pandas and polars say the same."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from server.sdk.forecasts import ForecastRequest, ForecastResult

HOUR = timedelta(hours=1)
BEGIN = datetime(2026, 1, 1)  # noqa: DTZ001 -- on the archive's clock
PRICES = [1.0, None, 3.0, float("nan"), 5.0]


def make_columns(step: timedelta = HOUR, begin: datetime = BEGIN) -> dict[str, list[Any]]:
    """Five rows with two targets and a covariate."""
    return {
        "time": [begin + i * step for i in range(5)],
        "NSW1": PRICES,
        "VIC1": [2.0] * 5,
        "load": [float(i) for i in range(5)],
    }


def read(frame: Any, **others: Any) -> ForecastRequest:
    """A request of NSW1."""
    return ForecastRequest.from_frame(frame, **{"model": "m", "target": "NSW1", "time": "time", **others})


def test_plain_columns() -> None:
    """The first stamp, the step, missing values as None; products by row; covariates reach beyond the history."""
    found = read(make_columns())
    assert (found.start, found.step, found.target) == (BEGIN, HOUR, [1.0, None, 3.0, None, 5.0])
    assert found.to_instance() == {"start": "2026-01-01 00:00:00", "target": [1.0, None, 3.0, None, 5.0]}
    found = read(make_columns(), target=["NSW1", "VIC1"], dynamic_feat=["load"], steps_ahead=2)
    assert found.target == [[1.0, None, 3.0], [2.0, 2.0, 2.0]]
    assert found.dynamic_feat == [[0.0, 1.0, 2.0, 3.0, 4.0]]
    assert read({**make_columns(), "time": [f"2026-01-0{i}" for i in range(1, 6)]}).step == timedelta(days=1)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_of_libraries(library: str) -> None:
    """A frame says what its columns say; an answer becomes a frame."""
    frames = pytest.importorskip(library, reason=f"{library} is not installed: `make venv` brings it")
    assert read(frames.DataFrame(make_columns())).to_instance() == read(make_columns()).to_instance()
    if library == "pandas":
        indexed = frames.DataFrame(make_columns()).set_index("time")
        assert read(indexed, time=None) == read(make_columns())
        nullable = frames.DataFrame(make_columns()).convert_dtypes()
        assert read(nullable).target == [1.0, None, 3.0, None, 5.0]
    result = ForecastResult(start="2026-01-02 00:00:00", mean=[1.0, 2.0], quantiles={"0.5": [1.0, 2.0]}, step=HOUR)
    frame = result.to_pandas() if library == "pandas" else result.to_polars()
    assert list(frame.columns) == ["time", "mean", "0.5"]
    assert frame["time"].to_list()[1] == datetime(2026, 1, 2, 1)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NSW1": [1.0, 2.0, "x", 4.0, 5.0]}, r"column 'NSW1', row 2: 'x' is not a number"),
        ({"NSW1": [1.0]}, r"column 'NSW1' has 1 values, but there are 5 time stamps"),
        (
            {"time": [BEGIN, BEGIN + HOUR, BEGIN + 3 * HOUR, BEGIN + 4 * HOUR, BEGIN + 5 * HOUR]},
            r"row 2 is 2:00:00 aft",
        ),
        ({"time": [BEGIN + i * HOUR for i in (1, 0, 2, 3, 4)]}, r"sort the rows"),
        ({"time": [BEGIN] * 5}, r"sort the rows"),
        ({"time": ["soon"] * 5}, r"column 'time', row 0: 'soon' is not a time stamp"),
        ({"time": [BEGIN.replace(tzinfo=UTC), *[BEGIN] * 4]}, r"give all of them one, or none"),
        ({"time": [BEGIN], "NSW1": [1.0]}, r"two rows or more"),
    ],
)
def test_wrong_tables_are_refused(change: dict[str, list[Any]], said: str) -> None:
    """The message names column and row; nothing is sent."""
    with pytest.raises(ValueError, match=said):
        read({**make_columns(), **change})


def test_wrong_arguments_are_refused() -> None:
    """A column that is not there, an index that is none, no history."""
    with pytest.raises(ValueError, match=r"no column 'SA1'; it has time, NSW1, VIC1, load"):
        read(make_columns(), target="SA1")
    with pytest.raises(ValueError, match=r"say by `time`"):
        read(make_columns(), time=None)
    with pytest.raises(ValueError, match=r"some must be history"):
        read(make_columns(), steps_ahead=5)


def test_days_of_a_zone_are_days() -> None:
    """Stamps with offsets are instants: midnights of a zone are a day apart, also where the clock changes."""
    zone = ZoneInfo("Europe/Berlin")
    days = [datetime(2026, 3, day, tzinfo=zone) for day in range(27, 32)]
    assert read({**make_columns(), "time": days}).step == timedelta(days=1)
    hours = [(datetime(2026, 3, 28, 23, tzinfo=UTC) + i * HOUR).astimezone(zone) for i in range(5)]
    assert read({**make_columns(), "time": hours}).step == HOUR


def test_times_of_an_answer() -> None:
    """Without an offset they are those of a clock without jumps; with one they are real, on the clock of the zone."""
    plain = ForecastResult(start="2026-03-29 01:00:00", time_zone="Europe/Berlin", mean=[1.0, 2.0], step=HOUR)
    assert [str(time) for time in plain.to_columns()["time"]] == ["2026-03-29 01:00:00", "2026-03-29 02:00:00"]
    real = ForecastResult(start="2026-03-29 01:00:00+01:00", time_zone="Europe/Berlin", mean=[1.0, 2.0], step=HOUR)
    assert [str(time)[11:] for time in real.to_columns()["time"]] == ["01:00:00+01:00", "03:00:00+02:00"]
    fixed = ForecastResult(start="2026-03-29 01:00:00+05:00", mean=[1.0], step=HOUR)
    assert fixed.to_columns()["time"] == [datetime(2026, 3, 29, 1, tzinfo=timezone(timedelta(hours=5)))]


def test_columns_of_an_answer() -> None:
    """Each level, sample and product has a column; a step is needed; a level is found by its number."""
    result = ForecastResult(
        start="2026-01-01",
        mean=[[1.0, 2.0], [3.0, 4.0]],
        quantiles={"0.10": [[0.0, 0.0], [1.0, 1.0]]},
        samples=[[[5.0, 6.0], [7.0, 8.0]]],
    )
    columns = result.to_columns(HOUR)
    assert list(columns) == ["time", "mean[0]", "mean[1]", "0.10[0]", "0.10[1]", "sample_0[0]", "sample_0[1]"]
    assert (columns["mean[1]"], len(columns["time"])) == ([3.0, 4.0], 2)
    assert result.quantile(0.1) == [[0.0, 0.0], [1.0, 1.0]]
    with pytest.raises(KeyError, match=r"no quantile 0\.5; the forecast has 0\.10"):
        result.quantile(0.5)
    with pytest.raises(ValueError, match="step=timedelta"):
        result.to_columns()
