"""Doubtful histories are marked, completed by their season, and answered by the fallback where there is one."""

from datetime import datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.codecs.deepar import DeepAr
from handlers.codecs.gaps import complete_history
from handlers.codecs.history import compute_shift_gains, measure_courses, turn_profile
from handlers.errors import RequestError
from handlers.training.history_rules import learn_history_rules
from handlers.training.time_series import Series
from model_store.archives.manifest import Fallback, ForecastSpec, InputChannel, Scaler

DAYS, NEEDED, AHEAD = 400, 96, 24
START = datetime.fromisoformat("2024-01-01")
LEVELS = (0.1, 0.5, 0.9)
PLAIN = ForecastSpec(
    frequency="1h",
    context_length=NEEDED,
    prediction_length=AHEAD,
    quantile_levels=LEVELS,
    inputs=(InputChannel(source="target"),),
    scaler=Scaler(kind="linear", center=60, scale=20),
)


def make_prices(days: int = DAYS, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Hourly prices with a course of the day and noise; its highest hour is the evening's."""
    hours = np.arange(24 * days)
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.normal(60, 8, days), 24)
    course = 20 * np.sin((hours % 24 - 13) / 24 * 2 * np.pi) + 8 * (hours % 24 == 8)
    found: np.ndarray[Any, np.dtype[np.float64]] = level + course + rng.normal(0, 3, len(hours))
    return found


def learn(values: Any = None, *, fallback: bool = True) -> ForecastSpec:
    """The recipe with rules learnt from prices."""
    prices = make_prices() if values is None else values
    series = Series("p", START, timedelta(hours=1), prices, np.empty((0, len(prices))))
    return replace(PLAIN, history=learn_history_rules(series, prices, PLAIN, 0.25, fallback=fallback))


RULED = learn()
BARE = learn(fallback=False)
OUTPUT = np.tile(np.array([-0.1, 0.0, 0.1], np.float32), (1, AHEAD, 1))


def ask(forecast: ForecastSpec, *targets: Any, start: str = "2024-03-01 00:00:00", **configuration: Any) -> Any:
    """The predictions for these histories (NaN is null), and the marks of the answer."""
    sent = [[None if value != value else value for value in map(float, target)] for target in targets]  # noqa: PLR0124
    instances = [{"start": start, "target": target} for target in sent]
    rows, encode = DeepAr(forecast).decode(
        msgspec.json.encode({"instances": instances, "configuration": configuration})
    )
    answer = encode(np.repeat(OUTPUT, len(rows), axis=0))
    return msgspec.json.decode(answer)["predictions"], encode.marks


def spoil(kind: str) -> Any:
    """A sound history, spoilt."""
    history = make_prices(NEEDED // 24, seed=7)
    match kind:
        case "flat":
            history[-10:] = history[-11]
        case "stale":
            history[-24:] = history[-48:-24]
        case "late":
            history[-13:] = np.nan
        case "shifted":
            history = np.roll(history, 3)
        case "units":
            history = history / 1000
        case "spike":
            history[40] = 9_000
        case "gap":
            history[50:56] = np.nan
        case "holes":
            history[::3] = np.nan
        case "empty":
            history[:] = np.nan
    return history


@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        ("sound", None),
        ("flat", ["flat"]),
        ("stale", ["stale"]),
        ("late", ["filled", "stale"]),
        ("shifted", ["shifted"]),
        ("units", ["range"]),
        ("spike", ["range"]),
        ("gap", ["filled"]),
        ("holes", ["filled", "missing"]),
    ],
)
def test_each_fault_is_marked(kind: str, codes: list[str] | None) -> None:
    """The prediction has the codes, and the header counts them; a sound history beside it has neither."""
    (found, beside), marks = ask(BARE, spoil(kind), spoil("sound"))
    assert found.get("quality") == codes
    assert "quality" not in beside
    assert marks.quality == ", ".join(f"{code}=1" for code in codes or ())
    assert found["quantiles"]["0.5"] == [60] * AHEAD, "the network answers"


def test_later_rows_of_the_same_kind_seldom_alarm() -> None:
    """On 300 windows of prices that no rule has learnt from at most one in fifty is marked."""
    later = make_prices(310, seed=3)
    windows = [later[at : at + NEEDED] for at in range(0, 300 * 24, 24)]
    found, _ = ask(BARE, *windows)
    assert sum("quality" in each for each in found) <= 6


def test_the_hour_of_the_day_is_that_of_the_history() -> None:
    """A history that begins at another hour, or is sent with an offset, is not shifted by that."""
    whole = make_prices(NEEDED // 24 + 1, seed=7)
    for hour in (0, 5, 23):
        (found,), _ = ask(BARE, whole[hour : hour + NEEDED], start=f"2024-03-01 {hour:02}:00:00")
        assert "quality" not in found
    berlin = replace(BARE, time_zone="Europe/Berlin")
    (found,), _ = ask(berlin, whole[:NEEDED], start="2024-02-29 23:00:00Z")
    assert "quality" not in found
    (found,), _ = ask(berlin, whole[:NEEDED], start="2024-03-01 04:00:00Z")
    assert found["quality"] == ["shifted"]


def test_the_fallback_is_the_last_known_day_with_the_band_of_its_errors() -> None:
    """Its middle is the price of the last sure day at this time; its band holds what it promises on later prices."""
    later = make_prices(320, seed=5)
    covered, middles = [], []
    for at in range(NEEDED, 300 * 24, 24):
        history = later[at - NEEDED : at].copy()
        history[-10:] = history[-11]  # flat, so that these steps are not sure
        (found,), marks = ask(RULED, history)
        assert found["quality"] == ["flat", "fallback"]
        assert marks.quality == "flat=1, fallback=1"
        low, middle, high = (np.array(found["quantiles"][name]) for name in ("0.1", "0.5", "0.9"))
        truth = later[at : at + AHEAD]
        covered.append((low <= truth) & (truth <= high))
        middles.append(middle[:13] - history[-24:-11])
    assert np.mean(covered) == pytest.approx(0.8, abs=0.06)
    assert np.abs(np.mean(middles)) < 1


def test_a_history_without_values_is_refused_or_answered_by_all_prices() -> None:
    """With rules it is refused, with a fallback it has the wide band of all prices; without rules it is marked."""
    with pytest.raises(RequestError, match="no step of the history has a value") as caught:
        ask(BARE, spoil("empty"))
    assert (caught.value.instance, caught.value.field) == (0, "target")
    (found,), _ = ask(RULED, spoil("empty"))
    assert found["quality"] == ["empty", "fallback"]
    prices = make_prices()
    for hour in (3, 19):
        low, high = np.quantile(prices[hour::24], (0.1, 0.9))
        assert found["quantiles"]["0.1"][hour] == pytest.approx(low, abs=0.1)
        assert found["quantiles"]["0.9"][hour] == pytest.approx(high, abs=0.1)
    (found,), marks = ask(PLAIN, spoil("empty"))
    assert (found["quality"], marks.quality) == (["empty"], "empty=1")


def test_a_short_history_is_marked() -> None:
    """An archive that pads takes a history of any length, and says that it was short, or empty."""
    padded = replace(RULED, pad_context=True)
    (short,), _ = ask(padded, spoil("sound")[-80:])
    assert short["quality"] == ["short"]
    (none,), _ = ask(padded, [])
    assert none["quality"] == ["short", "empty", "fallback"]


def test_the_network_reads_the_season_where_steps_are_missing() -> None:
    """The row has the value a day before; an archive without rules repeats the last known one, as it always did."""
    history = spoil("gap")
    history[20:22] = np.nan
    sent = {"start": "2024-03-01 00:00:00", "target": [None if np.isnan(each) else each for each in history.tolist()]}
    body = msgspec.json.encode({"instances": [sent]})
    seasonal, plain = (DeepAr(each).decode(body)[0][0, 0] * 20 + 60 for each in (BARE, PLAIN))
    np.testing.assert_allclose(seasonal[50:56], history[26:32], rtol=1e-5)
    np.testing.assert_allclose(seasonal[20:22], np.interp([1, 2], [0, 3], history[[19, 22]]), rtol=1e-5)
    np.testing.assert_allclose(plain[[20, 21, *range(50, 56)]], history[[19, 19, *[49] * 6]], rtol=1e-5)


@given(st.lists(st.one_of(st.just(float("nan")), st.floats(-100, 100)), max_size=40), st.integers(0, 9))
def test_completed_histories_have_no_gaps_and_keep_what_is_known(values: list[float], season: int) -> None:
    """Each gap takes a value of the same phase where one is known, else the last known one, else the center."""
    history = np.array(values)
    found = complete_history(history, 7.0, season)
    known = ~np.isnan(history)
    assert not np.isnan(found).any()
    np.testing.assert_array_equal(found[known], history[known])
    span = (history[known].min(), history[known].max()) if known.any() else (7.0, 7.0)
    filled = found[~known]
    assert ((filled >= span[0] - 1e-9) & (filled <= span[1] + 1e-9) | (filled == 7)).all()
    if season > 1:
        phases = np.arange(len(history)) % season
        assert not np.isin(found[~known & np.isin(phases, phases[known])], [7.0]).any() or 7.0 in span or known.all()


def test_a_gain_tells_how_far_a_course_is_turned() -> None:
    """A course that is turned by three hours fits the profile better there; one in place has no gain."""
    profile = np.sin(np.arange(24) / 24 * 2 * np.pi)
    profile /= np.sqrt((profile**2).sum())
    rows = np.tile(profile, (2, 3))
    rows[1] = np.roll(rows[1], 3)
    courses, turns = measure_courses(rows, 3600), turn_profile(profile.tolist())
    gains = compute_shift_gains(courses, turns, [0, 0])
    assert gains[0] < 0 < gains[1]
    later = measure_courses(np.roll(rows, -5, axis=1), 3600)
    np.testing.assert_allclose(compute_shift_gains(later, turns, [5, 5]), gains)
    quarters = np.repeat(rows, 4, axis=1)
    np.testing.assert_allclose(measure_courses(quarters, 900), courses)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"low": 1.0, "high": 1.0}, "history.low"),
        ({"profile": (1.0,) * 23}, "24"),
        ({"fallback": Fallback(near=(1, 2), far=(1, 2, 3), usual=((1, 2, 3),))}, "with 3 levels"),
        ({"fallback": Fallback(near=(1, 3, 2), far=(1, 2, 3), usual=((1, 2, 3),))}, "must rise"),
        ({"fallback": Fallback(near=(1, 2, 3), far=(1, 2, 3), usual=((1, 2, 3),) * 2)}, "24 or one"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    """The message names the field."""
    rules = BARE.history
    assert rules
    with pytest.raises(ValueError, match=said):
        replace(BARE, history=replace(rules, **changes))


def test_rules_survive_their_file() -> None:
    """A recipe with rules and fallback is read as it was written."""
    assert msgspec.json.decode(msgspec.json.encode(RULED), type=ForecastSpec) == RULED


def test_prices_without_a_course_have_no_rule_for_it() -> None:
    """Noise has no hours of its own, so that no history of it is called shifted more often than one in fifty."""
    noise = learn(np.random.default_rng(1).normal(60, 5, 24 * 200))
    later = np.random.default_rng(2).normal(60, 5, 24 * 200)
    found, _ = ask(noise, *[later[at : at + NEEDED] for at in range(0, 24 * 190, 24)])
    assert sum("shifted" in each.get("quality", ()) for each in found) <= 4
