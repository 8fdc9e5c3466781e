"""Load profiles: when requests are due and which model each names, as arrays. Pure: no clock, no I/O.

A `Profile` combines an arrival process (constant, Poisson or diurnal) with a popularity (Zipf, with or without drift).
Three profiles decide both at once: `Tick` (requests by the clock), `Onboarding` (new models) and `Replay` (a
recording). All have `models` and `schedule(seconds, part)`. A ramp is several runs of one profile;
`list_ramp_rates` gives their rates.

INVARIANT: the same profile gives the same schedule to the last bit. Each part draws from a generator of its own, so
that more seconds or another rate do not change which models are popular, nor how that changes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MIN_REQUESTS, MAX_REQUESTS = 20, 5_000_000  #: fewer requests have no percentiles, more take hundreds of megabytes
MAX_MODELS = 10_000_000
MAX_MOVES = 100_000  #: most changes of popularity in a schedule
MAX_RATES = 1_000
NEWCOMERS = 100
MIN_S, MAX_S = 1e-3, 31 * 86_400.0
_POPULARITY, _ARRIVALS, _CHOICES, _DRIFT, _TICKS, _NEWCOMERS = range(6)


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Requests at `at` [n] seconds from the start, rising, for the models `model` [n]; `seconds` is the duration."""

    at: Float64
    model: Int64
    seconds: float


# --- arrivals x popularity ------------------------------------------------------------------------------------------


class ArrivalProcess(StrEnum):
    """The process of arrival times."""

    POISSON = "poisson"  #: independent clients
    CONSTANT = "constant"  #: equal intervals
    DIURNAL = "diurnal"  #: independent clients with a lower rate at night


@dataclass(frozen=True, slots=True)
class Profile:
    """A load over `models` models: `rate` requests a second on average, popularity of rank r as 1 / r ** `zipf`.

    Every `drift_s` seconds `drift_share` of the models trade ranks in pairs, at the same times and in the same way in
    every part; 0: never. A diurnal day takes `day_s` seconds, starts at its quietest with `trough` times the rate of
    its peak, and `rate` is its mean.
    """

    models: int
    rate: float = 200.0
    zipf: float = 1.0
    arrivals: ArrivalProcess = ArrivalProcess.POISSON
    seed: int = 0
    drift_s: float = 0.0
    drift_share: float = 0.1
    day_s: float = 60.0
    trough: float = 0.2

    def schedule(self, seconds: float, part: int = 0) -> Schedule:
        """Draw the load for so long. Other parts, such as a warm-up, have other arrivals but the same popular models.

        Raises ValueError for fewer than MIN_REQUESTS or more than MAX_REQUESTS, and for a setting out of its bounds.
        """
        self._check(seconds)
        at = self._due(seconds, np.random.default_rng([self.seed, _ARRIVALS, part]))
        choices = np.random.default_rng([self.seed, _CHOICES, part])
        model = choices.choice(self.models, size=len(at), p=self.popularity())
        if self.drift_s:
            model = self._drifted(at, model, seconds)
        return Schedule(at, model, seconds)

    def popularity(self) -> Float64:
        """Return the probability [models] of each model, before any drift."""
        return compute_popularity(self.models, self.zipf, np.random.default_rng([self.seed, _POPULARITY]))

    def _check(self, seconds: float) -> None:
        _require_range("seconds", seconds, MIN_S, MAX_S)
        _require_range("models", self.models, 1, MAX_MODELS)
        _require_range("rate", self.rate, 1 / MAX_S, MAX_REQUESTS / MIN_S)
        _require_range("zipf", self.zipf, 0, 100)
        if self.drift_s:
            _require_range("models, to trade places,", self.models, 2, MAX_MODELS)
            _require_range("drift_s", self.drift_s, seconds / MAX_MOVES, MAX_S)
            _require_range("drift_share", self.drift_share, 0, 1)
        _require_requests(self.rate * seconds, f"{self.rate:g} requests/s for {seconds:g} s over {self.models} models")
        if self.arrivals is ArrivalProcess.DIURNAL:
            _require_range("day_s", self.day_s, MIN_S, MAX_S)
            _require_range("trough", self.trough, 0, 1)
            expected = self.rate * _integrate_day(seconds, self.day_s, self.trough)
            _require_requests(
                expected, f"the first {seconds:g} s of days of {self.day_s:g} s at {self.rate:g} requests/s"
            )

    def _due(self, seconds: float, rng: np.random.Generator) -> Float64:
        match self.arrivals:
            case ArrivalProcess.CONSTANT:
                return draw_constant(self.rate, seconds)
            case ArrivalProcess.POISSON:
                return draw_poisson(self.rate, seconds, rng)
            case ArrivalProcess.DIURNAL:
                return draw_diurnal(self.rate, seconds, self.day_s, self.trough, rng)

    def _drifted(self, at: Float64, model: Int64, seconds: float) -> Int64:
        """Return the models [n] after the drift of their ranks."""
        rng = np.random.default_rng([self.seed, _DRIFT])
        stands_in = np.arange(self.models)
        pairs = min(math.ceil(self.drift_share * self.models / 2), self.models // 2)
        found = model.copy()
        moves = np.searchsorted(at, np.arange(self.drift_s, seconds, self.drift_s))
        for start, end in pairwise([*moves.tolist(), len(at)]):
            one, other = rng.permutation(self.models)[: 2 * pairs].reshape(2, pairs)
            stands_in[one], stands_in[other] = stands_in[other], stands_in[one]
            found[start:end] = stands_in[model[start:end]]
        return found


def draw_constant(rate: float, seconds: float) -> Float64:
    """Return arrivals every 1 / rate seconds from 0 on."""
    return np.arange(round(rate * seconds)) / rate


def draw_poisson(rate: float, seconds: float, rng: np.random.Generator) -> Float64:
    """Draw a Poisson process: a Poisson number of arrivals, which are then independent and uniform."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def draw_diurnal(rate: float, seconds: float, day_s: float, trough: float, rng: np.random.Generator) -> Float64:
    """Draw a Poisson process of rate `rate` * (1 - swing * cos(2 pi t / day_s)), by thinning one of the peak's rate.

    The method is exact: P. A. W. Lewis and G. S. Shedler, "Simulation of nonhomogeneous Poisson processes by
    thinning", 1979.
    """
    swing = _compute_swing(trough)
    at = draw_poisson(rate * (1 + swing), seconds, rng)
    return at[rng.random(len(at)) * (1 + swing) < 1 - swing * np.cos(2 * np.pi * at / day_s)]


def compute_popularity(models: int, exponent: float, rng: np.random.Generator) -> Float64:
    """Return the probability [models] of each; ranks are drawn, so that neighbours in the list differ in popularity."""
    weights = np.arange(1, models + 1, dtype=np.float64) ** -exponent
    return rng.permutation(weights / weights.sum())


def _compute_swing(trough: float) -> float:
    """Compute the relative amplitude of the rate, 0 to 1, whose lowest value is `trough` times its highest."""
    return (1 - trough) / (1 + trough)


def _integrate_day(seconds: float, day_s: float, trough: float) -> float:
    """Integrate the rate of a day, in units of its mean."""
    return seconds - _compute_swing(trough) * day_s / math.tau * math.sin(math.tau * seconds / day_s)


# --- shapes that decide both ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """The market clock: every `every_s` seconds, from 0 on, each model is requested once within `spread_s` seconds.

    The order is that of the models, the worst case of an LRU that is slightly too small, or `shuffled` each time.
    """

    models: int
    every_s: float = 5.0
    spread_s: float = 1.0
    shuffled: bool = False
    seed: int = 0

    def schedule(self, seconds: float, part: int = 0) -> Schedule:
        """Make whole ticks; a part other than 0 has one. Raises ValueError as `Profile.schedule` does."""
        _require_range("seconds", seconds, MIN_S, MAX_S)
        _require_range("models", self.models, 1, MAX_MODELS)
        _require_range("every_s", self.every_s, MIN_S, MAX_S)
        _require_range(
            "spread_s, which ends before the next tick and the run do,", self.spread_s, 0, min(self.every_s, seconds)
        )
        ticks = 1 + int((seconds - self.spread_s) / self.every_s + 1e-9)
        least = 1 if part else MIN_REQUESTS
        _require_requests(ticks * self.models, f"{ticks} ticks of {self.models} models in {seconds:g} s", least)
        rng = np.random.default_rng([self.seed, _TICKS, part])
        after = np.sort(rng.uniform(0, self.spread_s, (ticks, self.models)), axis=1)
        at = np.arange(ticks)[:, np.newaxis] * self.every_s + after
        model = np.tile(np.arange(self.models), (ticks, 1))
        if self.shuffled:
            model = rng.permuted(model, axis=1)
        return Schedule(at.ravel(), model.ravel(), seconds)


@dataclass(frozen=True, slots=True)
class Onboarding:
    """The load of the `known` models; `at_s` seconds into it each of `newcomers` others is requested.

    Each is requested once, within `within_s` seconds, in a drawn order. Their indices follow those of the known.
    """

    known: Profile
    newcomers: int = NEWCOMERS
    at_s: float = 5.0
    within_s: float = 1.0

    @property
    def models(self) -> int:
        """The number of known and new models."""
        return self.known.models + self.newcomers

    def schedule(self, seconds: float, part: int = 0) -> Schedule:
        """Draw the load; only part 0 has new models. Raises ValueError as `Profile.schedule` does."""
        _require_range("newcomers", self.newcomers, 1, MAX_REQUESTS)
        _require_range("within_s, in which the newcomers are asked,", self.within_s, 0, MAX_S)
        steady = self.known.schedule(seconds, part)
        if part:
            return steady
        _require_range("at_s, so that the newcomers are asked before the end,", self.at_s, 0, seconds - self.within_s)
        rng = np.random.default_rng([self.known.seed, _NEWCOMERS])
        at = np.concatenate([steady.at, rng.uniform(self.at_s, self.at_s + self.within_s, self.newcomers)])
        model = np.concatenate([steady.model, self.known.models + np.arange(self.newcomers)])
        order = np.argsort(at, kind="stable")
        return Schedule(at[order], model[order], seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A recording from its second `start_s` on, `speed` times as fast. Nothing is drawn."""

    recording: Schedule
    models: int
    speed: float = 1.0
    start_s: float = 0.0

    def schedule(self, seconds: float, part: int = 0) -> Schedule:
        """Return the recording for so long, or to its end. A part other than 0 is the recording just before `start_s`.

        Raises ValueError as `Profile.schedule` does, and for a recording of more models than exist.
        """
        _require_range("seconds", seconds, MIN_S, math.inf)
        _require_range("speed", self.speed, 1e-3, 1e6)
        _require_range("start_s", self.start_s, 0, self.recording.seconds)
        start, end = self.start_s, min(self.start_s + seconds * self.speed, self.recording.seconds)
        if part:
            start, end = max(0.0, self.start_s - seconds * self.speed), self.start_s
        first, last = np.searchsorted(self.recording.at, [start, end]).tolist()
        _require_requests(last - first, f"the recording from second {start:g} to {end:g}")
        model = self.recording.model[first:last]
        _require_range("models, as many as the recording names,", self.models, int(model.max()) + 1, MAX_MODELS)
        return Schedule((self.recording.at[first:last] - start) / self.speed, model, (end - start) / self.speed)


# --- by name --------------------------------------------------------------------------------------------------------

Load = Profile | Tick | Onboarding | Replay


class Shape(StrEnum):
    """The shapes of a load by name."""

    POISSON = "poisson"
    CONSTANT = "constant"
    DIURNAL = "diurnal"
    TICK = "tick"
    ONBOARDING = "onboarding"
    REPLAY = "replay"

    @property
    def about(self) -> str:
        """The description of the shape in one line."""
        return _ABOUT[self]


_ABOUT: Mapping[Shape, str] = {
    Shape.POISSON: "independent clients, Zipf popularity that may drift",
    Shape.CONSTANT: "the same at even intervals",
    Shape.DIURNAL: "the same with quiet nights and busy noons, a day in a minute",
    Shape.TICK: "the market clock: every model within a second, again and again",
    Shape.ONBOARDING: "independent clients, and at one moment requests for models that are new",
    Shape.REPLAY: "a recorded trace, as it was or faster",
}
_STEADY = ("rate", "zipf", "drift_s", "drift_share")
_BURST = ("newcomers", "at_s", "within_s")
TAKES: Mapping[Shape, tuple[str, ...]] = {
    Shape.POISSON: _STEADY,
    Shape.CONSTANT: _STEADY,
    Shape.DIURNAL: (*_STEADY, "day_s", "trough"),
    Shape.TICK: ("every_s", "spread_s", "shuffled"),
    Shape.ONBOARDING: (*_STEADY, *_BURST),
    Shape.REPLAY: ("recording", "speed", "start_s"),
}


def make_profile(shape: Shape, models: int, seed: int = 0, **settings: float | Schedule | None) -> Load:
    """Make the load over so many models; a setting that is None has its default.

    Raises ValueError for a setting that the shape does not take, see TAKES, and for a replay without a recording.
    """
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if ignored := given.keys() - TAKES[shape]:
        raise ValueError(f"the load {shape} takes no {', '.join(sorted(ignored))}, but {', '.join(TAKES[shape])}")
    match shape:
        case Shape.TICK:
            return Tick(models, seed=seed, **given)
        case Shape.ONBOARDING:
            burst = {name: given.pop(name) for name in _BURST if name in given}
            newcomers = burst.setdefault("newcomers", NEWCOMERS)
            _require_range("newcomers, which leave at least one known model,", newcomers, 1, models - 1)
            return Onboarding(Profile(models - newcomers, seed=seed, **given), **burst)
        case Shape.REPLAY:
            if "recording" not in given:
                raise ValueError("the load replay takes a recording: give it a trace")
            return Replay(models=models, **given)
        case _:
            return Profile(models, arrivals=ArrivalProcess(shape), seed=seed, **given)


def list_ramp_rates(
    start: float, most: float, *, factor: float | None = None, step: float | None = None
) -> list[float]:
    """List the rates to try until one is not sustained: each is `factor` times the last or `step` more; `most` is last.

    Raises ValueError unless exactly one of the two is given, and for rates that do not rise from above 0 to `most`.
    """
    if (factor is None) == (step is None):
        raise ValueError("a ramp rises either by a factor or by a step: give one of them")
    _require_range("start", start, 1 / MAX_S, most)
    _require_range("most", most, start, MAX_REQUESTS / MIN_S)
    if factor is not None:
        _require_range("factor", factor, (most / start) ** (1 / MAX_RATES) + 1e-9, math.inf)
        rises = math.log(most / start) / math.log(factor)
        rates = [start * factor**i for i in range(math.ceil(rises - 1e-9))]
    else:
        assert step is not None
        _require_range("step", step, max((most - start) / MAX_RATES, 1e-9), math.inf)
        rates = [start + step * i for i in range(math.ceil((most - start) / step - 1e-9))]
    return [*rates, most]


def _require_range(what: str, value: float, low: float, high: float) -> None:
    """Raise ValueError if the value is out of its bounds, or not a number."""
    if not low <= value <= high:
        raise ValueError(f"{what} cannot be {value:g}: give {low:g} to {high:g}")


def _require_requests(requests: float, what: str, least: int = MIN_REQUESTS) -> None:
    """Raise ValueError for too few or too many requests."""
    if not least <= requests <= MAX_REQUESTS:
        few = requests < least
        hint = "ask more, or for longer" if few else "ask less, or not so long"
        raise ValueError(f"{what}: {requests:.0f} requests; a load has {least} to {MAX_REQUESTS}: {hint}")
