"""Rhythms are learnt from calls: ticks, noise, drift, misses, models that come and go; their memory is bounded."""

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.names import ModelName
from server.worker.prefetch import rhythms as prefetch
from server.worker.prefetch.rhythms import MOST_TRUST, Expected, Rhythms

STEP_S = 0.05
LEARNT = 4  #: ticks after which a model is foreseen

Call = tuple[float, ModelName]


class CallPlayer:
    """Plays calls to rhythms in the order of time, and keeps what was foreseen."""

    def __init__(self) -> None:
        self.rhythms = Rhythms()
        self.foreseen: list[Expected] = []
        self.now = 0.0

    def play(self, calls: Iterable[Call]) -> dict[Call, bool]:
        """Each call, and whether it had been foreseen."""
        told = {}
        for time, model in sorted(calls):
            self.wait(time)
            told[time, model] = model in self.rhythms
            self.rhythms.record_request(model, time)
        return told

    def wait(self, until: float) -> None:
        """Time passes, looked at as often as a worker does."""
        while self.now + STEP_S < until:
            self.now += STEP_S
            self.foreseen += self.rhythms.collect_due(self.now)


def name_models(prefix: str, count: int) -> list[ModelName]:
    """For example a0, a1, ..."""
    return [ModelName(f"{prefix}{i}") for i in range(count)]


def tick(fleet: Iterable[ModelName], at: float, spread: float, rng: random.Random) -> Iterator[Call]:
    """All of a fleet, each at some moment of the spread."""
    return ((at + rng.random() * spread, model) for model in fleet)


def draw_noise(models: list[ModelName], rate: float, until: float, rng: random.Random) -> Iterator[Call]:
    """Independent calls, rank r with popularity 1 / r."""
    weights = [1 / (rank + 1) for rank in range(len(models))]
    time = rng.expovariate(rate)
    while time < until:
        yield time, rng.choices(models, weights)[0]
        time += rng.expovariate(rate)


@settings(deadline=None)
@given(
    period=st.floats(2.5, 7200),
    phase=st.floats(0, 7200),
    jitter=st.floats(0, 1 / 60),
    drift=st.floats(-0.002, 0.002),
    seed=st.integers(0, 99),
)
def test_any_clock_is_learnt_by_its_fourth_tick_and_kept(
    period: float, phase: float, jitter: float, drift: float, seed: int
) -> None:
    """Whatever period, phase, jitter and drift: from the fifth on every call is foreseen, and none before."""
    rng, model, rhythms, last = random.Random(seed), ModelName("a"), Rhythms(), 0.0
    jitter = min(jitter * period, 12.0)
    for k in range(12):
        at = phase + k * period * (1 + drift) + rng.uniform(0, jitter)
        for step in range(1, 40):  # coarser than a worker looks, and that is enough
            rhythms.collect_due(last + (at - last) * step / 40)
        rhythms.collect_due(at - STEP_S)
        assert (model in rhythms) == (k >= LEARNT), f"call {k}"
        rhythms.record_request(model, at)
        assert model not in rhythms, "it has just been asked"
        last = at
    found = rhythms.period(model)
    assert found is not None
    assert found == pytest.approx(period * (1 + drift), rel=1 / 24)


def test_a_fleet_is_foreseen_in_time_and_once_a_tick() -> None:
    """Each model once for each tick, before its call, and the due times are right within the spread."""
    market, rng, fleet = CallPlayer(), random.Random(1), name_models("a", 50)
    calls = [call for k in range(1, 11) for call in tick(fleet, 300.0 * k, 1.0, rng)]
    told = market.play(calls)
    assert all(known == (time >= 300 * (LEARNT + 1)) for (time, _), known in told.items())
    assert len(market.foreseen) == 6 * len(fleet)
    assert all(min(each.due % 300, -each.due % 300) < 2 for each in market.foreseen)


@pytest.mark.slow
def test_a_call_for_many_models_is_a_request_for_each() -> None:
    """Ticks with visits of several calls, of models that have a rhythm, are strangers or are new: both ways agree."""
    one, all_at_once = Rhythms(), Rhythms()
    for tick in range(8):
        for again in (0.0, 0.2):
            models = [ModelName(f"m{i}") for i in range(20) if (i + tick) % 5 or i < 10]
            now = 60.0 * tick + again
            for model in models:
                one.record_request(model, now)
            all_at_once.record_requests(models, now)
        assert repr(all_at_once) == repr(one)
        assert all_at_once.collect_due(60.0 * tick + 50) == one.collect_due(60.0 * tick + 50)
    assert len(one) >= 10


def test_noise_between_the_ticks_is_passed_over() -> None:
    """Zipf traffic for other models and for the same ones: the tick is learnt, noise is hardly foreseen."""
    market, rng = CallPlayer(), random.Random(2)
    fleet, others = name_models("a", 100), name_models("b", 400)
    calls = [call for k in range(1, 16) for call in tick(fleet, 300.0 * k, 1.0, rng)]
    told = market.play([*calls, *draw_noise(others, 2.0, 4700, rng), *draw_noise(fleet, 0.2, 4700, rng)])
    late = [known for (time, model), known in told.items() if model in fleet and time % 300 < 1 and time > 3000]
    assert sum(late) / len(late) > 0.9
    of_others = sum(each.model in others for each in market.foreseen)
    assert of_others < 0.35 * len(market.foreseen), "a wrong guess is rare"


@pytest.mark.slow
def test_two_clocks_at_once() -> None:
    """Five minutes and an hour, models of one, of the other and of both: each is foreseen for its own ticks."""
    market, rng = CallPlayer(), random.Random(3)
    fast, slow = name_models("fast", 20), name_models("slow", 20)
    hours = 7
    calls = [call for k in range(1, 12 * hours) for call in tick(fast, 300.0 * k, 1.0, rng)]
    calls += [call for k in range(1, hours) for call in tick(slow, 3600.0 * k + 100, 1.0, rng)]
    told = market.play(calls)
    assert all(known for (time, model), known in told.items() if model in fast and time > 1800)
    assert all(known for (time, model), known in told.items() if model in slow and time > 5 * 3600)
    assert market.rhythms.period(fast[0]) == pytest.approx(300, rel=0.01)
    assert market.rhythms.period(slow[0]) == pytest.approx(3600, rel=0.01)


def test_missed_ticks_are_forgiven() -> None:
    """After one and after two ticks without calls the next is foreseen as ever."""
    market, rng, fleet = CallPlayer(), random.Random(4), name_models("a", 10)
    ticks = [k for k in range(1, 20) if k not in (9, 14, 15)]
    told = market.play(call for k in ticks for call in tick(fleet, 300.0 * k, 1.0, rng))
    assert all(known for (time, _), known in told.items() if time >= 300 * (LEARNT + 1))


def test_a_model_that_leaves_the_fleet_is_forgotten() -> None:
    """It is foreseen for a few ticks more, then not even remembered."""
    market, rng = CallPlayer(), random.Random(5)
    stay, leave = name_models("stay", 10), name_models("leave", 10)
    calls = [call for k in range(1, 21) for call in tick(stay, 300.0 * k, 1.0, rng)]
    calls += [call for k in range(1, 11) for call in tick(leave, 300.0 * k, 1.0, rng)]
    market.play(calls)
    in_vain = [each for each in market.foreseen if each.model in leave and each.due > 10 * 300 + 100]
    assert len(in_vain) == len(leave) * (MOST_TRUST - 1)
    assert repr(market.rhythms) == "<Rhythms of 10 models, 0 strangers>"


def test_a_clock_that_jumps_is_learnt_anew() -> None:
    """The fleet's tick moves by half a period: some ticks later it is foreseen at its new time."""
    market, rng, fleet = CallPlayer(), random.Random(6), name_models("a", 10)
    moved = 3000.0 + 150
    calls = [call for k in range(1, 11) for call in tick(fleet, 300.0 * k, 1.0, rng)]
    calls += [call for k in range(1, 16) for call in tick(fleet, moved + 300.0 * k, 1.0, rng)]
    told = market.play(calls)
    assert all(known for (time, _), known in told.items() if time > moved + 300 * (MOST_TRUST + LEARNT + 2))


def test_several_calls_at_a_tick_are_one_visit() -> None:
    """Clients that ask a model again at once, or some times within seconds, do not make a faster clock of it."""
    market, rng, model = CallPlayer(), random.Random(7), ModelName("a")
    calls = [(300.0 * k + i * 0.4 + rng.random() * 0.2, model) for k in range(1, 12) for i in range(8)]
    market.play(calls)
    assert market.rhythms.period(model) == pytest.approx(300, rel=0.01)


def test_a_model_that_is_always_asked_has_no_rhythm() -> None:
    """A steady stream, even with equal gaps, is one long visit: nobody has to bring such a model."""
    rhythms, model = Rhythms(), ModelName("a")
    for i in range(1000):
        rhythms.collect_due(i * 0.3)
        rhythms.record_request(model, i * 0.3)
    assert rhythms.period(model) is None


@pytest.mark.slow
def test_memory_is_bounded_whatever_names_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million strangers do not stay, rhythms end at their own bound, and the calendar has no more than they need."""
    monkeypatch.setattr(prefetch, "MAX_STRANGER_BYTES", 700_000)
    monkeypatch.setattr(prefetch, "MAX_RHYTHM_BYTES", 64_500)
    rhythms = Rhythms()
    for i in range(100_000):
        rhythms.record_request(ModelName(f"once/{i}"), i * 1e-3)
    assert 1000 <= len(rhythms._strangers) <= 1200
    assert rhythms._strangers.used_bytes <= 700_000
    for k in range(1, 30):
        for step in range(60):
            rhythms.collect_due(1000 + 3.0 * k - 3 + step * STEP_S)
        for model in name_models("a", 500):
            rhythms.record_request(model, 1000 + 3.0 * k)
    assert 90 <= len(rhythms) <= 100
    assert rhythms._rhythm_bytes <= 64_500
    assert rhythms._strangers.used_bytes <= 700_000
    assert sum(map(len, rhythms._calendar.values())) <= 2 * len(rhythms)


@settings(deadline=None)
@given(gaps=st.lists(st.floats(0, 50), max_size=60), models=st.integers(1, 3), seed=st.integers(0, 99))
def test_whatever_the_calls_nobody_is_foreseen_late_or_twice(gaps: list[float], models: int, seed: int) -> None:
    """No calls bring it out of step: what is due lies ahead or is just over, and is told once until asked or missed."""
    rng, fleet, rhythms, now = random.Random(seed), name_models("a", models), Rhythms(), 0.0
    told: list[Expected] = []
    for gap in gaps:
        for step in range(20):
            moment = now + gap * step / 20
            for each in rhythms.collect_due(moment):
                assert each.due >= moment - 50 / 24 - gap / 20 - STEP_S
                told.append(each)
        now += gap
        rhythms.record_request(rng.choice(fleet), now)
    for model in fleet:
        dues = [each.due for each in told if each.model == model]
        assert all(later > earlier for earlier, later in pairwise(dues))
