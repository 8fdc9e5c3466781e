"""Load profiles are reproducible, and have the distributions that they document."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.driver.profiles import (
    MAX_REQUESTS,
    TAKES,
    ArrivalProcess,
    Load,
    Onboarding,
    Profile,
    Replay,
    Schedule,
    Shape,
    Tick,
    compute_popularity,
    draw_constant,
    draw_diurnal,
    draw_poisson,
    list_ramp_rates,
    make_profile,
)

RECORDING = Schedule(np.arange(200) / 10, np.arange(200) % 7, 20.0)
LOADS: dict[str, Load] = {
    "poisson": Profile(50, 100.0, seed=3),
    "constant": Profile(50, 100.0, arrivals=ArrivalProcess.CONSTANT, seed=3),
    "diurnal": Profile(50, 100.0, arrivals=ArrivalProcess.DIURNAL, seed=3, day_s=5.0),
    "drift": Profile(50, 100.0, seed=3, drift_s=1.0),
    "tick": Tick(50, every_s=2.0, seed=3),
    "shuffled": Tick(50, every_s=2.0, shuffled=True, seed=3),
    "onboarding": Onboarding(Profile(30, 100.0, seed=3), 20),
    "replay": Replay(RECORDING, 50),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
def test_every_load_is_a_schedule(load: Load) -> None:
    """In order, within its time, of models that exist; and the same again, to the last bit."""
    first, again = load.schedule(10), load.schedule(10)
    assert first.at.tobytes() == again.at.tobytes()
    assert first.model.tobytes() == again.model.tobytes()
    assert [str(first.at.dtype), str(first.model.dtype)] == ["float64", "int64"]
    assert len(first.at) == len(first.model) > 20
    assert (np.diff(first.at) >= 0).all()
    assert (first.at[0], first.seconds) >= (0, 10)
    assert first.at[-1] <= 10
    assert 0 <= first.model.min() <= first.model.max() < load.models


@pytest.mark.parametrize("other", [Profile(50, 100.0, seed=4), Tick(50, shuffled=True, seed=4)])
def test_another_seed_or_part_gives_another_schedule(other: Load) -> None:
    """Times and models both differ from the first request on."""
    first = type(other)(50, shuffled=True, seed=3) if isinstance(other, Tick) else Profile(50, 100.0, seed=3)
    for second in (other.schedule(10), first.schedule(10, part=1)):
        assert first.schedule(10).at[:20].tolist() != second.at[:20].tolist()
        assert first.schedule(10).model[:20].tolist() != second.model[:20].tolist()


def test_schedules_stay_as_they_were() -> None:
    """A recorded seed can be repeated later: these values may only change together with a note in the change log."""
    schedule = Profile(200, 200.0).schedule(15)
    assert len(schedule.at) == 3078
    assert schedule.at[:3] == pytest.approx(
        [0.0004970171843787785, 0.0015229793812360226, 0.00263549656823181], rel=1e-12
    )
    assert schedule.model[:6].tolist() == [23, 80, 99, 23, 23, 50]


def test_the_warm_up_loads_the_same_popular_models() -> None:
    """Parts of a profile differ in their draws, not in who is popular."""
    profile = Profile(100, 1000.0, zipf=1.2)
    favourites = [np.bincount(profile.schedule(20, part).model).argmax() for part in (0, 1)]
    assert favourites[0] == favourites[1] == profile.popularity().argmax()


def test_constant_arrivals_are_a_metronome() -> None:
    """The first is due at once, the others 1 / rate apart, none after the end."""
    at = draw_constant(200.0, 2.0)
    assert (len(at), at[0]) == (400, 0.0)
    assert np.diff(at) == pytest.approx(1 / 200)
    assert at[-1] < 2.0
    assert Profile(1, 200.0, arrivals=ArrivalProcess.CONSTANT).schedule(2.0).at.tolist() == at.tolist()


def test_poisson_arrivals_are_independent() -> None:
    """Their number varies as a Poisson number does, and the gaps are exponential: as wide as their mean."""
    rng = np.random.default_rng(0)
    runs = [draw_poisson(100.0, 10.0, rng) for _ in range(200)]
    counts = np.array([len(at) for at in runs])
    assert counts.mean() == pytest.approx(1000, abs=5 * np.sqrt(1000 / 200))
    assert counts.var() == pytest.approx(1000, rel=0.4)
    gaps = np.concatenate([np.diff(at) for at in runs])
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert all(at[0] >= 0 and at[-1] < 10 for at in runs)


@pytest.mark.parametrize("trough", [0.0, 0.2, 1.0])
def test_a_day_has_its_trough_and_its_peak(trough: float) -> None:
    """Each hour of the day has the requests of the sine over it, within five deviations; `rate` is the mean."""
    days, day_s, rate = 200, 24.0, 50.0
    at = draw_diurnal(rate, days * day_s, day_s, trough, np.random.default_rng(5))
    hours = np.arange(25)
    swing = (1 - trough) / (1 + trough)
    integral = hours - swing * 24 / (2 * np.pi) * np.sin(2 * np.pi * hours / 24)
    wanted = rate * days * np.diff(integral)
    assert (abs(np.histogram(at % day_s, bins=hours)[0] - wanted) < 5 * np.sqrt(wanted)).all()
    assert len(at) == pytest.approx(rate * days * day_s, rel=0.02)
    night, noon = wanted[0], wanted[12]
    assert night / noon == pytest.approx(trough, abs=0.01)


def test_a_day_is_independent_from_moment_to_moment() -> None:
    """The number of requests at noon varies from day to day as a Poisson number: no day is like the other."""
    at = draw_diurnal(50.0, 4800.0, 24.0, 0.2, np.random.default_rng(6))
    noons = np.histogram(at, bins=4800)[0].reshape(200, 24)[:, 12]
    assert noons.var() == pytest.approx(noons.mean(), rel=0.4)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.3])
def test_popularity_falls_with_the_rank(exponent: float) -> None:
    """Sorted, it is 1 / rank ** exponent; as asked, the popular are spread over the fleet."""
    found = compute_popularity(500, exponent, np.random.default_rng(1))
    ranked = np.sort(found)[::-1]
    assert found.sum() == pytest.approx(1)
    assert ranked / ranked[0] == pytest.approx(np.arange(1, 501) ** -exponent)
    assert exponent == 0 or found.tolist() != ranked.tolist()


def test_models_are_asked_as_often_as_they_are_popular() -> None:
    """Draws follow the probabilities, within five standard deviations for every model."""
    schedule = Profile(20, 1000.0, zipf=1.0, seed=9).schedule(100)
    shares = np.sort(np.bincount(schedule.model, minlength=20))[::-1] / len(schedule.model)
    wanted = np.arange(1, 21) ** -1.0 / (np.arange(1, 21) ** -1.0).sum()
    assert (abs(shares - wanted) < 5 * np.sqrt(wanted / len(schedule.model))).all()


def stand_ins(still: Schedule, drifting: Schedule, models: int, start: float, end: float) -> list[int]:
    """Who is asked in a time instead of each model, by comparing a schedule with the same without drift."""
    then = (still.at >= start) & (still.at < end)
    pairs = set(zip(still.model[then].tolist(), drifting.model[then].tolist(), strict=True))
    assert len(pairs) == models, "one stand-in for each model, and each was asked"
    return [to for _, to in sorted(pairs)]


def test_drift_moves_a_share_of_the_models() -> None:
    """Up to the first move all is as without drift; each move trades the ranks of 4 of 20 models, in pairs."""
    still, drifting = Profile(20, 1000.0, zipf=0.5), Profile(20, 1000.0, zipf=0.5, drift_s=2.0, drift_share=0.2)
    one, other = still.schedule(6), drifting.schedule(6)
    assert one.at.tobytes() == other.at.tobytes()
    assert stand_ins(one, other, 20, 0, 2) == list(range(20))
    before = list(range(20))
    for start in (2, 4):
        after = stand_ins(one, other, 20, start, start + 2)
        assert sorted(after) == list(range(20))
        assert sum(x != y for x, y in zip(before, after, strict=True)) == 4
        assert all(after[before.index(y)] == x for x, y in zip(before, after, strict=True))
        before = after


def test_drift_is_the_same_at_any_rate_and_length_and_in_any_part() -> None:
    """What happens to the popular depends on seed and time alone."""

    def list_after(rate: float, seconds: float, part: int, seed: int = 0) -> list[int]:
        drifting = Profile(20, rate, zipf=0.5, seed=seed, drift_s=1.0, drift_share=0.5).schedule(seconds, part)
        still = Profile(20, rate, zipf=0.5, seed=seed).schedule(seconds, part)
        return stand_ins(still, drifting, 20, 3.0, 4.0)

    assert (
        list_after(1000.0, 4.0, 0)
        == list_after(3000.0, 4.0, 0)
        == list_after(1000.0, 9.0, 0)
        == list_after(1000.0, 4.0, 1)
    )
    assert list_after(1000.0, 4.0, 0) != list_after(1000.0, 4.0, 0, seed=1)


@pytest.mark.parametrize("spread_s", [0.0, 0.5, 2.0])
def test_a_tick_asks_every_model_once(spread_s: float) -> None:
    """Every 2 s, within the spread, spread out over it; the last tick is whole or not there."""
    schedule = Tick(100, every_s=2.0, spread_s=spread_s).schedule(7.9 if spread_s == 2.0 else 6.6)
    assert len(schedule.at) == (300 if spread_s == 2.0 else 400)
    for tick, (at, model) in enumerate(zip(schedule.at.reshape(-1, 100), schedule.model.reshape(-1, 100), strict=True)):
        assert model.tolist() == list(range(100))
        assert tick * 2.0 <= at[0] <= at[-1] <= tick * 2.0 + spread_s
        assert np.median(at) - tick * 2.0 == pytest.approx(spread_s / 2, abs=0.2 * spread_s)


def test_a_tick_that_just_fits_is_there() -> None:
    """Thirty ticks in three seconds, though 0.1 is no binary number."""
    assert len(Tick(10, every_s=0.1, spread_s=0.1).schedule(3.0).at) == 300


def test_a_shuffled_tick_has_another_order_each_time() -> None:
    """Still every model once."""
    orders = Tick(100, every_s=2.0, shuffled=True).schedule(5.0).model.reshape(-1, 100)
    assert (np.sort(orders, axis=1) == np.arange(100)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_newcomers_are_asked_once_within_a_second() -> None:
    """The known are asked as without them, all the time; the newcomers at the moment, in no particular order."""
    known = Profile(50, 200.0)
    schedule = Onboarding(known, 300, at_s=4.0, within_s=0.5).schedule(10)
    new = schedule.model >= 50
    assert sorted(schedule.model[new].tolist()) == list(range(50, 350))
    assert schedule.model[new].tolist() != list(range(50, 350))
    assert 4.0 <= schedule.at[new].min() < 4.1
    assert 4.4 < schedule.at[new].max() <= 4.5
    assert schedule.at[~new].tolist() == known.schedule(10).at.tolist()
    assert schedule.model[~new].tolist() == known.schedule(10).model.tolist()


def test_no_newcomer_is_asked_in_the_warm_up() -> None:
    """Otherwise they would not be new; a warm-up may be shorter than the moment is far."""
    warm_up = Onboarding(Profile(50, 200.0), 300, at_s=4.0).schedule(2.0, part=1)
    assert warm_up.model.max() < 50


def test_a_replay_is_what_was_recorded() -> None:
    """To the last bit, for as long as the recording is; faster, it is shorter and the same."""
    found = Replay(RECORDING, 7).schedule(60.0)
    assert (found.at.tobytes(), found.model.tobytes()) == (RECORDING.at.tobytes(), RECORDING.model.tobytes())
    assert found.seconds == RECORDING.seconds
    fast = Replay(RECORDING, 7, speed=4.0).schedule(60.0)
    assert (fast.at * 4).tolist() == RECORDING.at.tolist()
    assert (fast.model.tolist(), fast.seconds) == (RECORDING.model.tolist(), 5.0)


def test_a_replay_may_begin_later_and_warm_up_with_what_was_before() -> None:
    """The warm-up ends where the measured part begins, and asks nothing of what will be measured."""
    replay = Replay(RECORDING, 7, speed=2.0, start_s=8.0)
    warm_up, measured = replay.schedule(3.0, part=1), replay.schedule(3.0)
    assert warm_up.model.tolist() == RECORDING.model[20:80].tolist()
    assert measured.model.tolist() == RECORDING.model[80:140].tolist()
    assert (warm_up.seconds, measured.seconds) == (3.0, 3.0)
    assert (warm_up.at[0], measured.at[0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("load", "seconds", "why"),
    [
        (Profile(10, 1.0), 2.0, "1 requests/s for 2 s over 10 models: 2 requests; a load has 20 to 5000000: ask more"),
        (Profile(10, 1e6), 3600.0, "3600000000 requests; a load has 20 to 5000000: ask less, or not so long"),
        (Profile(0, 100.0), 10.0, "models cannot be 0: give 1 to"),
        (Profile(10, 100.0, -1.0), 10.0, "zipf cannot be -1: give 0 to 100"),
        (Profile(10, 100.0, float("nan")), 10.0, "zipf cannot be nan"),
        (Profile(10, -100.0), -10.0, "seconds cannot be -10"),
        (Profile(10, float("inf")), 10.0, "rate cannot be inf"),
        (Profile(1, drift_s=1.0), 10.0, "models, to trade places, cannot be 1: give 2"),
        (Profile(10, drift_s=1e-9), 10.0, "drift_s cannot be 1e-09: give 0.0001"),
        (Profile(10, drift_s=1.0, drift_share=1.1), 10.0, "drift_share cannot be 1.1: give 0 to 1"),
        (Profile(10, arrivals=ArrivalProcess.DIURNAL, day_s=0.0), 10.0, "day_s cannot be 0"),
        (Profile(10, arrivals=ArrivalProcess.DIURNAL, trough=2.0), 10.0, "trough cannot be 2: give 0 to 1"),
        (
            Profile(10, arrivals=ArrivalProcess.DIURNAL, trough=0.0, day_s=1e5),
            10.0,
            "the first 10 s of days of 100000 s",
        ),
        (Tick(10), 0.5, "spread_s, which ends before the next tick and the run do, cannot be 1: give 0 to 0.5"),
        (Tick(10, every_s=0.0), 5.0, "every_s cannot be 0"),
        (Tick(10), 5.0, "1 ticks of 10 models in 5 s: 10 requests"),
        (Tick(MAX_REQUESTS), 10.0, "2 ticks of 5000000 models"),
        (Onboarding(Profile(10), 0), 10.0, "newcomers cannot be 0"),
        (Onboarding(Profile(10), at_s=9.5), 10.0, "asked before the end, cannot be 9.5: give 0 to 9"),
        (Onboarding(Profile(10), within_s=-1.0), 10.0, "within_s, in which the newcomers are asked, cannot be -1"),
        (Replay(RECORDING, 6), 10.0, "models, as many as the recording names, cannot be 6: give 7 to"),
        (Replay(RECORDING, 7, speed=0.0), 10.0, "speed cannot be 0"),
        (Replay(RECORDING, 7, start_s=21.0), 10.0, "start_s cannot be 21: give 0 to 20"),
        (Replay(RECORDING, 7, start_s=19.0), 10.0, "the recording from second 19 to 20: 10 requests"),
        (Replay(Schedule(np.empty(0), np.empty(0, np.int64), 0.0), 7), 10.0, "from second 0 to 0: 0 requests"),
    ],
)
def test_senseless_loads_are_refused(load: Load, seconds: float, why: str) -> None:
    """What was wrong and what would do, before anything is drawn."""
    with pytest.raises(ValueError, match=re.escape(why)):
        load.schedule(seconds)


def test_a_replay_has_nothing_before_its_start() -> None:
    """A warm-up of it would be what is measured: refused."""
    with pytest.raises(ValueError, match="from second 0 to 0: 0 requests"):
        Replay(RECORDING, 7).schedule(5.0, part=1)


@pytest.mark.parametrize("shape", Shape)
def test_every_shape_can_be_had_by_its_name(shape: Shape) -> None:
    """With its defaults over as many models as are said; and each says what it is."""
    settings: dict[str, Any] = {"recording": RECORDING} if shape is Shape.REPLAY else {}
    load = make_profile(shape, 200, seed=5, rate=None, speed=None, **settings)
    schedule = load.schedule(10.0)
    assert load.models == 200
    assert schedule.model.max() < 200
    assert 10 < len(shape.about) < 80


def test_settings_reach_their_shape() -> None:
    """Each setting that a shape takes is one of its own, under its own name."""
    given: dict[str, Any] = {name: 0.5 for names in TAKES.values() for name in names}
    given |= {"newcomers": 50, "shuffled": True, "recording": RECORDING}
    found = {shape: make_profile(shape, 200, 5, **{name: given[name] for name in TAKES[shape]}) for shape in Shape}
    half: dict[str, Any] = {"rate": 0.5, "zipf": 0.5, "drift_s": 0.5, "drift_share": 0.5}
    assert found[Shape.POISSON] == Profile(200, seed=5, **half)
    assert found[Shape.CONSTANT] == Profile(200, arrivals=ArrivalProcess.CONSTANT, seed=5, **half)
    assert found[Shape.DIURNAL] == Profile(200, arrivals=ArrivalProcess.DIURNAL, seed=5, day_s=0.5, trough=0.5, **half)
    assert found[Shape.TICK] == Tick(200, 0.5, 0.5, shuffled=True, seed=5)
    assert found[Shape.ONBOARDING] == Onboarding(Profile(150, seed=5, **half), 50, 0.5, 0.5)
    replay = found[Shape.REPLAY]
    assert isinstance(replay, Replay)
    assert (replay.recording, replay.models, replay.speed, replay.start_s) == (RECORDING, 200, 0.5, 0.5)


@pytest.mark.parametrize(
    ("shape", "models", "settings", "why"),
    [
        (
            Shape.TICK,
            10,
            {"rate": 5.0, "zipf": 1.0},
            "the load tick takes no rate, zipf, but every_s, spread_s, shuffled",
        ),
        (Shape.POISSON, 10, {"speling": 5.0}, "takes no speling"),
        (Shape.REPLAY, 10, {}, "the load replay takes a recording: give it a trace"),
        (
            Shape.ONBOARDING,
            100,
            {},
            "newcomers, which leave at least one known model, cannot be 100: give 1 to 99",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    shape: Shape, models: int, settings: dict[str, Any], why: str
) -> None:
    """And what lacks: said before a run rather than found out after it."""
    with pytest.raises(ValueError, match=re.escape(why)):
        make_profile(shape, models, **settings)


def test_a_ramp_rises_to_its_end() -> None:
    """By a factor or a step, and at last to the most, once."""
    assert list_ramp_rates(100, 1000, factor=2) == [100, 200, 400, 800, 1000]
    assert list_ramp_rates(100, 400, factor=2) == [100, 200, 400]
    assert list_ramp_rates(100, 450, step=100) == [100, 200, 300, 400, 450]
    assert list_ramp_rates(100, 400, step=100) == [100, 200, 300, 400]
    assert list_ramp_rates(100, 100, factor=2) == list_ramp_rates(100, 100, step=1) == [100]


@given(start=st.floats(0.1, 1e6), span=st.floats(1.01, 1e3), factor=st.floats(1.01, 10))
def test_ramps_rise_all_the_way(start: float, span: float, factor: float) -> None:
    """From start to most, each rate above the one before, none left out."""
    for rates in (
        list_ramp_rates(start, start * span, factor=factor),
        list_ramp_rates(start, start * span, step=start * span * factor / 100),
    ):
        assert rates[0] == start
        assert rates[-1] == start * span
        assert all(one < other for one, other in pairwise(rates))
        assert len(rates) <= 1001


@pytest.mark.parametrize(
    ("start", "most", "how", "why"),
    [
        (100, 1000, {}, "either by a factor or by a step"),
        (100, 1000, {"factor": 2, "step": 5}, "either by a factor or by a step"),
        (100, 1000, {"factor": 1}, "factor cannot be 1: give 1.0023"),
        (100, 1000, {"factor": 0.5}, "factor cannot be 0.5"),
        (100, 1000, {"step": 0}, "step cannot be 0: give 0.9 to"),
        (0, 1000, {"factor": 2}, "start cannot be 0"),
        (100, 10, {"factor": 2}, "start cannot be 100: give 3.73357e-07 to 10"),
        (100, float("inf"), {"factor": 2}, "most cannot be inf"),
    ],
)
def test_ramps_that_never_end_are_refused(start: float, most: float, how: dict[str, float], why: str) -> None:
    """Or that would take a thousand runs, or fall."""
    with pytest.raises(ValueError, match=re.escape(why)):
        list_ramp_rates(start, most, **how)


def test_a_warm_up_may_be_one_tick() -> None:
    """A tick of one call is few requests; what is measured needs more for percentiles, what comes before does not."""
    tick = Tick(1, every_s=0.5, spread_s=0.0)
    assert len(tick.schedule(1.0, part=1).at) == 3
    with pytest.raises(ValueError, match="3 ticks of 1 models in 1 s: 3 requests; a load has 20 to"):
        tick.schedule(1.0)
