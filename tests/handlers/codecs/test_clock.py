"""Clock changes: the slots of real steps in every IANA zone, and requests whose `start` has an offset."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import msgspec
import numpy as np
import pytest

from handlers.base import Float32
from handlers.codecs.clock import (
    DAY,
    EPOCH,
    ZoneUnknown,
    _scan_clock,
    average_slots,
    check_zone_name,
    compute_offsets,
    fill_skipped,
    find_zone,
    format_wall,
    plan_slots,
    resolve_wall_clock,
)
from handlers.codecs.codec import FamilyCodec
from handlers.codecs.joint import Lists, MarginalForecast, pair_starts
from handlers.errors import RequestError
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler
from tests.handlers.codecs.test_deepar_contract import ContractFamily

HOUR, WEEK = 3600, 604_800
FIRST, LAST = (round(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (2015, 2036))
WIDE = ForecastSpec(
    frequency="1h",
    context_length=48,
    prediction_length=24,
    quantile_levels=(0.5,),
    inputs=(
        InputChannel(source="target"),
        InputChannel(source="calendar", feature="hour_sin", shift=24),
        InputChannel(source="dynamic_feat", shift=24),
    ),
    dynamic_feat=("load",),
    time_zone="Europe/Berlin",
    origin="00:00",
    tail="clamp",
    scaler=Scaler(),
)


@cache
def list_changes() -> Mapping[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """The changes (instant, offset from then on) of every IANA zone from 2015 to 2035, and the zones that have them.

    They are found by asking the zone's own clock every week and by halving the week before a change, zone by zone.
    """
    weeks = [datetime.fromtimestamp(at, UTC).replace(tzinfo=None) for at in range(FIRST, LAST, WEEK)]
    found: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in sorted(available_timezones()):
        zone = ZoneInfo(name)
        offsets = [zone.utcoffset(week) for week in weeks]
        moved = [i for i in range(1, len(weeks)) if offsets[i] != offsets[i - 1]]
        key = tuple(halve_span(zone, FIRST + (i - 1) * WEEK - 2 * DAY, FIRST + i * WEEK + 2 * DAY) for i in moved)
        found.setdefault(key, []).append(name)
    return {key: tuple(names) for key, names in found.items()}


def find_offset(zone: ZoneInfo, instant: int) -> int:
    """Seconds ahead of UTC, by the zone's clock."""
    found = datetime.fromtimestamp(instant, UTC).astimezone(zone).utcoffset()
    assert found is not None
    return round(found.total_seconds())


def halve_span(zone: ZoneInfo, low: int, high: int) -> tuple[int, int]:
    """The instant of the change between two, and the offset after it."""
    before = find_offset(zone, low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if find_offset(zone, middle) == before else (low, middle)
    return high, find_offset(zone, high)


def test_every_zone_changes_its_clock_as_its_database_says() -> None:
    """2015 to 2035, all IANA zones: at each change, the second before it and the second of it."""
    counted = 0
    for known, names in list_changes().items():
        for name in names:
            assert find_zone(name).key == name
        zone = find_zone(names[0])
        for instant, after in known:
            around = np.array([instant - DAY, instant - 1, instant, instant + DAY], np.int64)
            assert compute_offsets(zone, around).tolist()[1:3] == [find_offset(zone, instant - 1), after]
            counted += 1
    assert len(list_changes()) > 50
    assert counted > 1000


@pytest.mark.slow
@pytest.mark.parametrize("step_s", [HOUR, 1800, 900])
def test_every_step_is_in_the_slot_of_its_wall_clock(step_s: int) -> None:
    """At every change of every zone: a series that ends before it, and the day that follows.

    A step of the answer is that of the slot in which its wall-clock time lies, steps follow without a gap, and the
    forecast begins right after what is known; together they are all real steps of a day's slots.
    """
    for known, names in list_changes().items():
        zone = find_zone(names[0])
        for i, (instant, _) in enumerate(known):
            steps = 30 * HOUR // step_s - i % 7  # the series ends some hours before the change, in one, or after it
            start = datetime.fromtimestamp(instant - instant % step_s - (28 + i % 5) * HOUR, UTC)
            plan = plan_slots(zone, start, step_s, steps, DAY // step_s, skipped_first=bool(i % 2))
            instants = round(start.timestamp()) + step_s * np.arange(len(plan.slots))
            wall = instants + [find_offset(zone, at) for at in instants.tolist()]
            np.testing.assert_array_equal(plan.slots, (wall - plan.start) // step_s)
            assert plan.slots.min() == 0
            np.testing.assert_array_equal(plan.steps, plan.slots[steps:] - plan.history)
            assert plan.steps.min() >= 0
            assert plan.steps.max() < DAY // step_s
            assert plan.history <= plan.slots[steps] if i % 2 else plan.steps.min() == 0
            assert not i % 2 or plan.history <= plan.slots[steps - 1] + 1
            shift = find_offset(zone, int(instants[-1])) - find_offset(zone, int(instants[steps - 1]))
            whole = plan.history == plan.slots[steps - 1] + 1 and shift % step_s == 0
            assert not whole or abs(len(plan.steps) + shift // step_s - DAY // step_s) <= abs(shift) // step_s


@pytest.mark.slow
def test_a_local_clock_can_be_read_back() -> None:
    """Every hour around every change: the stamps of a local clock give their instants back, the repeated hour too."""
    for known, names in list_changes().items():
        zone = find_zone(names[0])
        for instant, _ in known:
            instants = instant + HOUR * np.arange(-30, 30)
            local = [datetime.fromtimestamp(at, UTC).astimezone(zone).replace(tzinfo=None) for at in instants.tolist()]
            found = resolve_wall_clock(zone, local, HOUR)
            assert found is not None
            np.testing.assert_array_equal(found, instants)


def test_names_are_those_of_the_database() -> None:
    """A wrong one is refused with the nearest right ones, and a path or folder is no zone."""
    assert check_zone_name("Europe/Berlin") == "Europe/Berlin"
    with pytest.raises(ZoneUnknown, match=r"'Europe/Berln' is not an IANA .*did you mean Europe/Berlin"):
        check_zone_name("Europe/Berln")
    for wrong in ("Europe", "../etc/passwd", "/etc/localtime", "", "NEM", "a\0b"):
        with pytest.raises(ZoneUnknown, match="is not an IANA time zone"):
            find_zone(wrong)


def test_a_repeated_slot_is_the_mean_and_a_skipped_one_is_missing() -> None:
    """Of what is known of it; covariates, which are never missing, are interpolated."""
    values = np.array([1.0, 2.0, 4.0, np.nan, 9.0])
    found = average_slots(values, np.array([0, 1, 1, 3, 4]), 5)
    np.testing.assert_array_equal(found, [1, 3, np.nan, np.nan, 9])
    assert fill_skipped(found).tolist() == [1, 3, 5, 7, 9]


# --- requests -------------------------------------------------------------------------------------------------------


def make_request(start: str, target: list[float], load: list[float], **wanted: Any) -> bytes:
    """A body of one instance."""
    instance = {"start": start, "target": target, "dynamic_feat": [load]}
    return json.dumps({"instances": [instance], "configuration": wanted}).encode()


def ask_codec(body: bytes, forecast: ForecastSpec = WIDE) -> tuple[Float32, dict[str, Any]]:
    """The network's row, and the answer of a network that says the number of each step."""
    call = FamilyCodec(ContractFamily(forecast), forecast).decode(body, "", "")
    numbers = np.arange(forecast.prediction_length, dtype=np.float32)[None, :, None]
    return call.rows[0], json.loads(call.encode(numbers)[0])["predictions"][0]


def test_on_ordinary_days_an_offset_changes_nothing_but_the_stamp() -> None:
    """The same numbers in the archive's zone, in UTC and in another: the network sees the same row."""
    target, load = [float(i) for i in range(48)], [float(i % 24) for i in range(72)]
    row, plain = ask_codec(make_request("2024-06-01 00:00:00", target, load))
    assert (plain["start"], plain["time_zone"]) == ("2024-06-03 00:00:00", "Europe/Berlin")
    for start in ("2024-06-01 00:00:00+02:00", "2024-05-31T22:00:00Z", "2024-06-01T03:30+05:30"):
        real, found = ask_codec(make_request(start, target, load))
        np.testing.assert_array_equal(real, row)
        assert found == {**plain, "start": "2024-06-03 00:00:00+02:00"}


def test_the_day_when_the_clock_goes_forward_has_23_hours() -> None:
    """31 March 2024 in Berlin: 02:00 has no answer, and the covariate's slot lies between its neighbours."""
    row, found = ask_codec(make_request("2024-03-28T23:00Z", [1.0] * 48, [float(i) for i in range(71)]))
    assert found["start"] == "2024-03-31 00:00:00+01:00"
    assert found["mean"] == [0, 1, *range(3, 24)]
    assert found["quantiles"]["0.5"] == found["mean"]
    np.testing.assert_array_equal(row[2][-24:], [48, 49, 49.5, *range(50, 71)])
    after, _ = ask_codec(make_request("2024-03-30T23:00Z", [float(i) for i in range(47)], [0.0] * 71))
    np.testing.assert_array_equal(after[0][:5], [0, 1, 1, 2, 3])  # a missing value takes the one before


def test_the_day_when_the_clock_goes_back_has_25_hours() -> None:
    """27 October 2024 in Berlin: both hours from 02:00 get the answer of that slot; as history they are their mean."""
    _, found = ask_codec(make_request("2024-10-24T22:00Z", [1.0] * 48, [float(i) for i in range(73)]))
    assert found["start"] == "2024-10-27 00:00:00+02:00"
    assert found["mean"] == [0, 1, 2, 2, *range(3, 24)]
    row, _ = ask_codec(make_request("2024-10-26T22:00Z", [float(i) for i in range(49)], [0.0] * 73))
    np.testing.assert_array_equal(row[0][:5], [0, 1, 2.5, 4, 5])


def test_a_history_that_is_long_enough_in_real_hours_is_long_enough() -> None:
    """48 hours that end after the clock went back are 47 slots; the first value is repeated before them."""
    row, found = ask_codec(make_request("2024-10-26T23:00Z", [float(i) for i in range(48)], [0.0] * 72))
    assert found["start"] == "2024-10-29 00:00:00+01:00"
    np.testing.assert_array_equal(row[0][:5], [0, 0, 1.5, 3, 4])
    with pytest.raises(RequestError, match="target has 47 steps, but the model needs 48"):
        ask_codec(make_request("2024-06-01T23:00Z", [0.0] * 47, [0.0] * 71))


def test_what_does_not_fit_says_how_steps_are_counted() -> None:
    """Covariates of the wrong length, and a forecast that does not start at the archive's time of day."""
    with pytest.raises(RequestError, match=r"72 numbers, .* have 71 steps of real time in Europe/Berlin together"):
        ask_codec(make_request("2024-03-28T23:00Z", [1.0] * 48, [1.0] * 72))
    with pytest.raises(RequestError, match=r"the first forecast step is 2024-06-03 02:00:00, but .* from 00:00 on"):
        ask_codec(make_request("2024-06-01T00:00Z", [1.0] * 48, [1.0] * 72))
    with pytest.raises(RequestError, match="in the years 1 to 9999"):
        ask_codec(make_request("9999-12-31T23:00Z", [1.0] * 48, [1.0] * 72))
    with pytest.raises(RequestError, match="in the years 1 to 9999"):
        ask_codec(make_request("0001-01-01T00:00+14:00", [1.0] * 48, [1.0] * 72))


def test_a_midnight_that_does_not_exist_is_still_an_origin() -> None:
    """Havana's clock goes from 23:59 on 9 March 2024 to 01:00: the delivery day has 23 hours from then on."""
    havana = msgspec.structs.replace(WIDE, time_zone="America/Havana")
    _, found = ask_codec(make_request("2024-03-08T05:00Z", [1.0] * 48, [1.0] * 71), havana)
    assert found["start"] == "2024-03-10 01:00:00-04:00"
    assert found["mean"] == [*range(1, 24)]


def test_a_short_forecast_begins_with_the_next_real_step() -> None:
    """An hour that the clock skips is no forecast of its own, unless the archive's time of day is that hour."""
    short = {"context_length": 3, "prediction_length": 1, "dynamic_feat": ()}
    hour = msgspec.structs.replace(WIDE, **short, inputs=WIDE.inputs[:1], origin=msgspec.UNSET)
    instance = {"start": "2024-03-30T22:00Z", "target": [1.0, 2.0, 3.0]}  # until 02:00, when it becomes 03:00
    row, found = ask_codec(json.dumps({"instances": [instance]}).encode(), hour)
    assert (found["start"], found["mean"]) == ("2024-03-31 03:00:00+02:00", [0])
    assert row[0].tolist() == [2, 3, 3]  # the skipped hour takes the value before it
    two = msgspec.structs.replace(hour, origin="02:00")
    with pytest.raises(RequestError, match="the clock of Europe/Berlin skips all 1 steps of this forecast"):
        ask_codec(json.dumps({"instances": [instance]}).encode(), two)


def test_quarter_hours_and_days() -> None:
    """A day of 92 quarter-hours and one of 100; days are counted on the calendar, where each has one step."""
    quarters = msgspec.structs.replace(WIDE, frequency="15min", context_length=96, prediction_length=96)
    for start, count in (("2024-03-30T00:00+01:00", 92), ("2024-10-26T00:00+02:00", 100)):
        _, found = ask_codec(make_request(start, [1.0] * 96, [1.0] * (96 + count)), quarters)
        assert len(found["mean"]) == count
    daily = msgspec.structs.replace(WIDE, frequency="1D", context_length=3, origin=msgspec.UNSET)
    _, found = ask_codec(make_request("2024-03-29T00:00+01:00", [1.0] * 3, [1.0] * 27), daily)
    assert (found["start"], found["mean"]) == ("2024-04-01 00:00:00+02:00", [*range(24)])


def test_samples_and_marginals_count_real_steps() -> None:
    """The marginal, from which joint scenarios are made, says its instant and its step."""
    body = make_request(
        "2024-03-28T23:00Z", [1.0] * 48, [1.0] * 71, output_types=["samples", "marginal"], num_samples=3
    )
    _, found = ask_codec(body)
    assert np.shape(found["samples"]) == (3, 23)
    assert np.shape(found["marginal"]["values"]) == (1, 23, 1)
    assert (found["marginal"]["start"], found["marginal"]["step_s"]) == ("2024-03-31 00:00:00+01:00", 3600)


def ask_marginal(name: str, start: str, zone: str = "Europe/Berlin") -> dict[str, Any]:
    """A day ahead of 48 hours from `start` on as a correlation archive is sent it."""
    forecast = msgspec.structs.replace(
        WIDE, time_zone=zone, dynamic_feat=(), inputs=WIDE.inputs[:1], origin=msgspec.UNSET
    )
    body = {"instances": [{"start": start, "target": [1.0] * 48}], "configuration": {"output_types": ["marginal"]}}
    return {"name": name, "marginal": ask_codec(json.dumps(body).encode(), forecast)[1]["marginal"]}


@pytest.mark.parametrize("day", ["2024-03-31", "2024-10-27"])
def test_slots_and_real_steps_are_not_paired_on_a_day_when_the_clock_changes(day: str) -> None:
    """After the change equal positions are an hour apart: the call is refused with both models and their starts."""
    before = str(datetime.fromisoformat(day).date() - timedelta(days=2))
    offset = "+01:00" if day == "2024-03-31" else "+02:00"
    slots, real = ask_marginal("de.mar", before), ask_marginal("fr.mar", f"{before} 00:00{offset}")
    london = ask_marginal("gb.mar", before, "Europe/London")
    utc = ask_marginal("is.mar", before, "Atlantic/Reykjavik")
    read = msgspec.json.Decoder(list[MarginalForecast[Lists]]).decode
    assert pair_starts(read(json.dumps([slots, {**slots, "name": "at.mar"}]))) == [0, 0]
    assert pair_starts(read(json.dumps([slots, london]))) == [0, 1]  # both clocks change at one instant
    for pair in ([slots, real], [real, slots], [slots, utc], [utc, london]):
        said = f"from {day} 00:00:00.* counts slots of a clock .* from {day} 00:00:00.* does not change its clock"
        with pytest.raises(RequestError, match=said) as caught:
            pair_starts(read(json.dumps(pair)))
        assert all(each["name"] in str(caught.value) for each in pair)
    assert pair_starts(read(json.dumps([real, utc]))) == [0, 1 if offset == "+01:00" else 2]
    ordinary = ask_marginal("de.mar", "2024-06-01"), ask_marginal("fr.mar", "2024-06-01 00:00+02:00")
    assert pair_starts(read(json.dumps(ordinary))) == [0, 0]


def test_a_description_names_clock_covariates_and_tails() -> None:
    """For `GET /fleet/models/{model}`; of many covariates the first ones."""
    many = tuple(f"c{i}" for i in range(12))
    wide = msgspec.structs.replace(WIDE, dynamic_feat=many)
    found = FamilyCodec(ContractFamily(wide), wide).describe()["forecast"]
    assert isinstance(found, dict)
    assert (found["time_zone"], found["origin"], found["tail"]) == (
        "Europe/Berlin",
        "00:00",
        "clamp beyond 0.5 and 0.5",
    )
    assert found["dynamic_feat"] == [*many[:10], "and 2 more"]
    assert FamilyCodec(ContractFamily(WIDE)).describe() == {}


def test_wall_clock_seconds_are_stamps() -> None:
    """Far from 1970 too."""
    assert format_wall(0) == "1970-01-01 00:00:00"
    assert format_wall(-timedelta(days=366).days * DAY) == "1968-12-31 00:00:00"


@pytest.mark.slow
def test_a_clock_is_looked_at_once() -> None:
    """A second request over the same centuries looks at no day again; the ends of the calendar are served too."""
    zone = find_zone("Europe/Berlin")
    centuries = np.arange(0, 400 * 365 * DAY, DAY)
    first = compute_offsets(zone, centuries)
    looked = _scan_clock.cache_info().misses
    assert (compute_offsets(zone, centuries + 1)[1:] == first[1:]).all()
    assert _scan_clock.cache_info().misses == looked
    last = int((datetime(9999, 12, 30) - EPOCH).total_seconds())  # noqa: DTZ001 -- of a wall clock
    assert compute_offsets(zone, np.array([last - DAY, last])).tolist() == [3600, 3600]
