"""Stamps as people have them: offsets, local clocks, intervals' ends, changed steps, notations; or an error by line."""

import gzip
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from handlers.training.time_series import FileRules, Series, SeriesInvalid, read_csv

BERLIN = FileRules(zone="Europe/Berlin")
ZONE = ZoneInfo("Europe/Berlin")
FORWARD, BACK = datetime(2024, 3, 31, tzinfo=UTC), datetime(2024, 10, 27, tzinfo=UTC)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Series]:
    """Reads rows of a stamp and a number, as a file has them."""

    def reader(stamps: Sequence[str], values: Sequence[object] = (), rules: FileRules = BERLIN, **more: Any) -> Series:
        numbers = values or range(len(stamps))
        path = tmp_path / "p.csv"
        rows = [f"{stamp},{number},{number}" for stamp, number in zip(stamps, numbers, strict=True)]
        path.write_text("\n".join(["time,price,load", *rows]))
        (series,) = read_csv(path, "time", ["price"], ["load"], rules, **more)
        return series

    return reader


def instants(start: datetime, count: int, step: timedelta = timedelta(hours=1)) -> list[datetime]:
    """Real steps."""
    return [start + i * step for i in range(count)]


def local(moments: Sequence[datetime]) -> list[str]:
    """What a clock on a wall in Berlin shows."""
    return [f"{each.astimezone(ZONE):%Y-%m-%d %H:%M:%S}" for each in moments]


def with_offset(moments: Sequence[datetime]) -> list[str]:
    """The same with its offset."""
    return [each.astimezone(ZONE).isoformat(sep=" ") for each in moments]


@pytest.mark.parametrize("notation", [local, with_offset, lambda moments: [each.isoformat() for each in moments]])
def test_the_night_when_the_clock_goes_forward_skips_a_slot(
    read: Callable[..., Series], notation: Callable[..., list[str]]
) -> None:
    """Stamps of a local clock, with its offset, or of UTC: 02:00 is missing, a covariate lies between neighbours."""
    series = read(notation(instants(FORWARD - timedelta(hours=1), 5)))
    assert (series.stamp(0), series.frequency, series.zone) == ("2024-03-31 00:00:00", "1h", "Europe/Berlin")
    np.testing.assert_array_equal(series.values, [0, 1, np.nan, 2, 3, 4])
    assert series.known.tolist() == [[0, 1, 1.5, 2, 3, 4]]
    assert series.notes == ()


@pytest.mark.parametrize("notation", [local, with_offset])
def test_the_night_when_the_clock_goes_back_is_a_mean(
    read: Callable[..., Series], notation: Callable[..., list[str]]
) -> None:
    """Both hours from 02:00 are one slot; that is noted. A missing one of the two leaves the other."""
    stamps = notation(instants(BACK - timedelta(hours=2), 7))
    series = read(stamps)
    assert series.stamp(0) == "2024-10-27 00:00:00"
    assert series.values.tolist() == [0, 1, 2.5, 4, 5, 6]
    assert series.known.tolist() == [[0, 1, 2.5, 4, 5, 6]]
    assert series.notes == ("hours that the clock of Europe/Berlin repeats are read as the mean of both",)


def test_days_of_24_hours_by_the_fields_convention_are_taken_as_they_are(read: Callable[..., Series]) -> None:
    """A file that has 02:00 on the day when there is none, and once where there are two."""
    for night in (FORWARD, BACK):
        stamps = [f"{night + timedelta(hours=i):%Y-%m-%d %H:%M}" for i in range(24)]
        assert read(stamps).values.tolist() == list(range(24))


def test_quarter_hours_and_days_change_their_clock_too(read: Callable[..., Series]) -> None:
    """Four slots are skipped or shared by quarter-hours; days are days of the calendar."""
    quarter = timedelta(minutes=15)
    assert np.isnan(read(with_offset(instants(FORWARD, 12, quarter))).values).sum() == 4
    assert read(local(instants(BACK, 12, quarter))).values.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]
    days = ["2024-03-30 00:00+01:00", "2024-03-31 00:00+01:00", "2024-04-01 00:00+02:00"]
    series = read(days)
    assert (series.stamp(0), series.frequency, series.values.tolist()) == ("2024-03-30 00:00:00", "1D", [0, 1, 2])


def test_a_stamp_may_name_the_end_of_its_interval(read: Callable[..., Series]) -> None:
    """AEMO's five minutes, and `hour ending` on a local clock in the night when it goes forward, and back."""
    ends = FileRules(zone="Australia/Brisbane", ending=True)
    series = read(["2024/01/01 00:05:00", "2024/01/01 00:10:00", "2024/01/01 00:15:00"], rules=ends)
    assert (series.stamp(0), series.frequency) == ("2024-01-01 00:00:00", "5min")
    ends = FileRules(zone="Europe/Berlin", ending=True)
    forward, back = (instants(night - timedelta(hours=1), 6) for night in (FORWARD, BACK))
    np.testing.assert_array_equal(read(local(forward), rules=ends).values, [0, 1, 2, np.nan, 3, 4, 5])
    assert read(local(back), rules=ends).values.tolist() == [0, 1, 2.5, 4, 5]
    assert read(local(back), rules=ends).stamp(0) == "2024-10-27 00:00:00"


def test_rows_before_the_step_changed_are_repeated(read: Callable[..., Series]) -> None:
    """Hours before 1 October 2025, quarter-hours after: by the archive's step, else the change is named."""
    start = datetime(2025, 9, 30, 18, tzinfo=UTC)
    moments = [*instants(start, 4), *instants(start + timedelta(hours=4), 8, timedelta(minutes=15))]
    quarters = FileRules(zone="Europe/Berlin", step_s=900)
    for stamps in (local(moments), with_offset(moments)):
        series = read(stamps, rules=quarters)
        assert series.values.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + list(range(4, 12))
        assert (series.stamp(0), series.frequency) == ("2025-09-30 20:00:00", "15min")
        assert series.notes == ("rows before line 6 have steps of 1h, and are repeated",)
        with pytest.raises(
            SeriesInvalid, match="line 7: the step changes here from 1h to 15min; --frequency 15min rep"
        ):
            read(stamps)
    ends = FileRules(zone="Europe/Berlin", step_s=900, ending=True)
    ended = np.repeat(np.arange(12), [4] * 5 + [1] * 7)
    assert read(local(moments), rules=ends).values.tolist() == ended.tolist()
    back = [*instants(start, 8, timedelta(minutes=15)), *instants(start + timedelta(hours=2), 4)]
    with pytest.raises(SeriesInvalid, match="the step changes here from 15min to 1h; give rows of one step"):
        read(local(back))


@pytest.mark.parametrize(
    ("stamps", "rules"),
    [
        (["2024-01-01 22:00", "2024-01-01 23:00", "2024-01-01 24:00"], BERLIN),
        (["2024/01/01 22:00", "2024/01/01 23:00", "2024/01/02 00:00"], BERLIN),
        (["2024-01-01 22:00:01", "2024-01-01 23:00:02", "2024-01-01 23:59:59"], BERLIN),
        (["1704142800", "1704146400", "1704150000"], BERLIN),
        (["1704142800000", "1704146400000", "1704150000000"], BERLIN),
        (["2024-01-01T21:00:00-00:00", "2024-01-01T22:00:00Z", "2024-01-02T00:00:00+01:00"], BERLIN),
        (["01.01.2024 22:00 - 01.01.2024 23:00", "01.01.2024 23:00 - x", "02.01.2024 00:00 - x"],
         FileRules(zone="Europe/Berlin", time_format="%d.%m.%Y %H:%M")),
        (["01/01/2024 21:00", "01/01/2024 22:00", "01/01/2024 23:00"],
         FileRules(zone="Europe/Berlin", stamps_zone="UTC", time_format="%d/%m/%Y %H:%M")),
    ],
)  # fmt: skip
def test_stamps_are_read_in_the_notations_of_operators(
    read: Callable[..., Series], stamps: list[str], rules: FileRules
) -> None:
    """All of these are 22:00, 23:00 and midnight in Berlin."""
    series = read(stamps, rules=rules)
    assert (series.stamp(0), series.stamp(2)) == ("2024-01-01 22:00:00", "2024-01-02 00:00:00")
    assert any("2 s off" in note for note in series.notes) == stamps[0].endswith(":01")


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (["00:00", "03:00", "04:00", "05:00"], "line 3: 2024-06-01 03:00:00 comes 3:00:00 after .*; steps are 1:00"),
        (["00:00", "01:00", "01:20", "02:00", "03:00"], "line 4: 2024-06-01 01:20:00 lies between two steps of 1h"),
        (["00:00", "01:00", "01:00", "02:00"], r"line 4: 2024-06-01 01:00:00 appears twice; .*--time-zone .*--item"),
        (["00:00", "01:00", "02:00", "2 o'clock"], "line 5, column 'time': .*--time-format names another notation"),
    ],
)  # fmt: skip
def test_the_row_that_is_wrong_is_named(read: Callable[..., Series], hours: list[str], said: str) -> None:
    """A gap before the first two rows have shown the step, an extra row, a row twice, an unknown notation."""
    with pytest.raises(SeriesInvalid, match=said):
        read([f"2024-06-01 {hour}" for hour in hours])


def test_several_items_in_one_file_are_not_joined(tmp_path: Path) -> None:
    """One after another they would be one series without a gap: refused, or one is read; with a byte order mark."""
    path = tmp_path / "long.csv"
    rows = [*(f"DE,2024-01-0{day},{day},x" for day in (1, 2, 3)), *(f"FR,2024-01-0{day},1{day},x" for day in (4, 5, 6))]
    path.write_text("\ufeff" + "\n".join(["unique_id,ds,y,currency", *rows]), encoding="utf-8")
    with pytest.raises(SeriesInvalid, match=r"line 5: column 'unique_id' has several items, .*--item unique_id=DE"):
        read_csv(path, "ds", ["y"])
    (series,) = read_csv(path, "ds", ["y"], (), FileRules(item=("unique_id", "FR")))
    assert (series.stamp(0), series.values.tolist()) == ("2024-01-04 00:00:00", [14, 15, 16])


def test_numbers_with_a_decimal_comma_and_missing_ones(read: Callable[..., Series], tmp_path: Path) -> None:
    """A comma before one or two digits is a decimal point, before three it may be a thousand; n/e is ENTSO-E's."""
    path = tmp_path / "comma.csv"
    path.write_text('t,p\n2024-01-01,"-34,97"\n2024-01-02,n/e\n2024-01-03,-\n')
    np.testing.assert_array_equal(read_csv(path, "t", ["p"])[0].values, [-34.97, np.nan, np.nan])
    path.write_text('t,p\n2024-01-01,"1,234"\n2024-01-02,3\n')
    with pytest.raises(SeriesInvalid, match="line 2, column 'p': '1,234' is not a finite number"):
        read_csv(path, "t", ["p"])


def test_a_damaged_gzip_is_an_error_in_one_line(tmp_path: Path) -> None:
    """Bytes changed in the middle, as after a bad copy."""
    whole = gzip.compress("\n".join(["t,p", *(f"2024-01-01,{i * 7919 % 10007}" for i in range(20_000))]).encode())
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(whole[:2000] + b"\xff" * 200 + whole[2200:])
    with pytest.raises(SeriesInvalid, match=r"bad.csv.gz: not a CSV file|bad.csv.gz, line"):
        read_csv(path, "t", ["p"])


def test_what_a_zone_cannot_be(read: Callable[..., Series]) -> None:
    """An unknown zone is named where it is needed, and stamps that the given zone's clock does not show."""
    with pytest.raises(SeriesInvalid, match="the time zone 'NEM' is not an IANA time zone"):
        read(with_offset(instants(FORWARD, 5)), rules=FileRules(zone="NEM"))
    skipped = [f"2024-03-31 0{hour}:00" for hour in range(5)]
    with pytest.raises(SeriesInvalid, match="the stamps are not those of a clock of Europe/Berlin"):
        read(skipped, rules=FileRules(stamps_zone="Europe/Berlin"))


def test_moments_with_an_offset_are_taken_to_the_zone(read: Callable[..., Series]) -> None:
    """A date on the command line may have one."""
    series = read(with_offset(instants(FORWARD - timedelta(hours=1), 8)))
    assert series.first_at(datetime.fromisoformat("2024-03-31T03:00+02:00")) == 3
    assert series.first_at(datetime.fromisoformat("2024-03-31T03:00")) == 3
