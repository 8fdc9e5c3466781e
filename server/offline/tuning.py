"""Searches the recipe that forecasts a fleet best, by successive halving on windows before the last ones. Torch.

A unit is a market and a fold: a fit to the rows before a block of validation windows, and its score there. In each
round every candidate that is left is tried on the same units, the worse half is dropped, and the next round has more
units, as many as the time that is left allows (Karnin et al. 2013, Jamieson and Talwalkar 2016). The markets of a fold
are fitted together, along the model dimension. The last windows of the file choose nothing: the winner is scored on
them once, beside the first candidate.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import Any

import numpy as np

from handlers.evaluation.scores import compute_seasonal_errors
from handlers.kinds import ArchiveParts, pack_model
from handlers.training.fit import Fitted, Fitting, fit_forecasters
from handlers.training.input_recipe import compute_naive_lag
from handlers.training.time_series import Series, SeriesInvalid
from model_store.archives.archive import DEFAULT_LIMITS
from model_store.archives.manifest import ForecastSpec, Kind
from model_store.errors import LoadError
from model_store.names import ModelName
from server.offline.calibration import count_windows
from server.offline.evaluation import compute_scores
from server.offline.input_recipes import make_recipes
from server.offline.rolling_windows import (
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    forecast_windows,
    open_unpublished,
)
from server.offline.tuning_journal import Journal, Trial

FOLDS = 3  #: most blocks of validation windows, one before the other
FIRST_UNITS = 4  #: of the first round
TOGETHER = 32  #: most markets of one fit
TESTED = 16  #: most markets of the test
TEST_SHARE = 0.1  #: of the time, which is kept for the test

Unit = tuple[int, int]  #: market, and fold counted from the last one
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe: the flags by which `fleetcast train` makes it, and what they mean."""

    flags: tuple[str, ...]
    architecture: str
    config: Mapping[str, Any]
    scaling: str = "asinh"

    @property
    def name(self) -> str:
        """Its flags, which are its key in the journal."""
        return " ".join(self.flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPlan:
    """The parameters of a search. Lengths of 0 are chosen by the frequency; `windows` are days of a block."""

    csv: Path
    candidates: Sequence[Candidate]
    minutes: float
    windows: int
    test: int
    fitting: Fitting
    prediction_length: int = 0
    context_length: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)  #: of `make_recipe`

    def __repr__(self) -> str:
        return f"<TuningPlan {len(self.candidates)} candidates for {self.csv.name} in {self.minutes:g} minutes>"

    def digest(self, series: Sequence[Series]) -> str:
        """A hash of all that determines a unit's score; neither the time nor the list of candidates does."""
        terms = (self.windows, self.test, self.fitting, self.prediction_length, self.context_length, self.options)
        said = hashlib.sha256(repr(terms).encode())
        for each in series:
            said.update(repr((each.name, each.start, each.step, each.known_names, each.zone)).encode())
            said.update(each.values.tobytes() + each.known.tobytes())
        return said.hexdigest()


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate's place: the round that it reached, its mean score over `units` there, and the seconds of a fit.

    The score is twice the pinball loss in units of the seasonal error, and rMAE that of its median; both are geometric
    means over units, because markets have different units. `test` and `test_rmae` are of the last windows.
    """

    candidate: Candidate
    round: int
    units: int
    score: float
    rmae: float
    seconds: float
    test: float | None = None
    test_rmae: float | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result: candidates from best to worst, how far the search went, and what could not be tried."""

    board: Sequence[Standing]
    rounds: Sequence[tuple[int, int]]  #: candidates and units of each round
    seconds: float
    markets: int
    test: tuple[str, str, int]  #: first and last stamp of the test, and its markets
    failed: Mapping[str, str]

    def __repr__(self) -> str:
        return f"<Tuned {self.board[0].candidate.name}, {len(self.rounds)} rounds>"


def choose_units(before: int, total: int, seconds: float, left_s: float, rounds_left: int) -> int:
    """Choose how many units the next round has: what its share of the time allows, at most doubling each round's work.

    `seconds`: of one unit by all candidates that are left. Returns `before` if there is no time for more.
    """
    more = int(max(0.0, left_s) / max(1, rounds_left) / max(seconds, 1e-9))
    return min(total, before + more)


def rank_candidates(
    trials: Mapping[str, Mapping[Unit, Trial]], names: Sequence[str], units: Sequence[Unit]
) -> list[tuple[str, float]]:
    """Rank by the geometric mean of scores over the units that any of them could be tried on; one that failed is last.

    A unit where all have failed says nothing and is left out.
    """
    judged = [unit for unit in units if any(isfinite(trials[name][unit].score) for name in names)]
    means = {name: _average([trials[name][unit].score for unit in judged]) for name in names}
    return sorted(means.items(), key=lambda pair: pair[1])


def list_units(markets: int, folds: int, seed: int) -> list[Unit]:
    """List all units: every market in a random order before the next fold, so that few units are of many markets."""
    order = np.random.default_rng(seed).permutation(markets).tolist()
    return [(market, fold) for fold in range(folds) for market in order]


class Tuning:
    """One search. Results are journalled as they come, so that a search that was ended goes on where it was."""

    def __init__(
        self,
        plan: TuningPlan,
        series: Sequence[Series],
        journal: Journal,
        say: Say,
        watch: Callable[[float, str], None] = lambda *_: None,
    ) -> None:
        """`watch` gets the seconds of work so far and the candidate that is fitted.

        Raises SeriesInvalid if the series are too short for a validation and a test.
        """
        self._plan, self._series, self._journal, self._say, self._watch = plan, series, journal, say, watch
        self._forecast = self._make_recipe(series[0], plan.candidates[0])
        self._block = count_windows(plan.windows, self._forecast) * self._forecast.prediction_length
        self._end = len(series[0].values) - count_windows(plan.test, self._forecast) * self._forecast.prediction_length
        self._folds = min(FOLDS, int((self._end / 2) // self._block))
        if self._folds < 1:
            steps, days = len(series[0].values), f"{plan.test} days of test and {plan.windows} of validation"
            what = f"{steps} steps are too few for {days}"
            raise SeriesInvalid(f"{series[0].name}: {what}; give smaller --test and --windows")
        self._spent = journal.seconds
        self._rounds: list[tuple[int, int]] = []
        self._reached: dict[str, tuple[int, int]] = {}

    def __repr__(self) -> str:
        return f"<Tuning {self._plan!r}, {len(self._series)} markets, {self._folds} folds>"

    def run(self) -> Tuned:
        """Search until one is left or the time is over, and test the winner. Raises SeriesInvalid if all fail."""
        plan, limit = self._plan, 60 * self._plan.minutes * (1 - TEST_SHARE)
        units = list_units(len(self._series), self._folds, plan.fitting.seed)
        alive, count = [each.name for each in plan.candidates], max(1, min(FIRST_UNITS, len(units) // FOLDS))
        alive = self._try_first(alive, units[:count], limit / 2)
        while True:
            ranked = [name for name, _ in rank_candidates(self._journal.trials, alive, units[:count])]
            self._finish_round(ranked, count)
            alive = ranked[: -(-len(ranked) // 2)]
            rounds_left = max(1, (len(alive) - 1).bit_length())
            seconds = sum(self._estimate_seconds(name) for name in alive)
            more = choose_units(count, len(units), seconds, limit - self._spent, rounds_left)
            if len(alive) == 1 or more == count:
                break
            self._say_round(alive, more, len(units), (more - count) * seconds)
            for name in alive:
                self._try(name, units[count:more])
            count = more
        return self._test_winner(units)

    def _try_first(self, names: Sequence[str], units: Sequence[Unit], limit: float) -> list[str]:
        """Try the candidates in order until the time for the first round is over; returns who was tried."""
        self._say_round(names, len(units), len(self._series) * self._folds, None)
        tried = list[str]()
        for name in names:
            if tried and self._spent > limit:
                break
            self._try(name, units)
            tried.append(name)
        if len(tried) < len(names):
            self._say(f"no time for {', '.join(names[len(tried) :])}; give more --minutes")
        return tried

    def _say_round(self, names: Sequence[str], units: int, total: int, seconds: float | None) -> None:
        about = "" if seconds is None else f", about {seconds / 60:.1f} minutes"
        what = f"round {len(self._rounds) + 1}: {len(names)} candidates on {units} of {total} fits{about}"
        self._say(f"{what}; {self._spent / 60:.1f} of {self._plan.minutes:g} minutes used")

    def _finish_round(self, ranked: Sequence[str], units: int) -> None:
        self._rounds.append((len(ranked), units))
        self._reached |= dict.fromkeys(ranked, (len(self._rounds), units))
        self._say(f"round {len(self._rounds)}: {ranked[0]} leads")

    def _estimate_seconds(self, name: str) -> float:
        """Estimate the seconds of a unit by those that were tried."""
        seconds = [trial.seconds for trial in self._journal.trials[name].values()]
        return sum(seconds) / len(seconds)

    def _try(self, name: str, units: Sequence[Unit]) -> None:
        """Try a candidate on the units that the journal does not have."""
        (candidate,) = (each for each in self._plan.candidates if each.name == name)
        left = [unit for unit in units if unit not in self._journal.trials[name]]
        for fold, some in groupby(sorted(left, key=lambda unit: unit[1]), key=lambda unit: unit[1]):
            markets = [market for market, _ in some]
            for at in range(0, len(markets), TOGETHER):
                group = markets[at : at + TOGETHER]
                started = time.monotonic()
                scores = self._score_group(candidate, group, self._end - fold * self._block, self._block)
                seconds = (time.monotonic() - started) / len(group)
                for market, (score, rmae) in zip(group, scores, strict=True):
                    self._journal.add(name, (market, fold), Trial(score, rmae, seconds))
                self._spent += seconds * len(group)

    def _score_group(
        self, candidate: Candidate, markets: Sequence[int], end: int, length: int
    ) -> list[tuple[float, float]]:
        """Fit markets together to the rows before the last `length` before step `end`, and score them on these.

        A market that cannot be fitted or scored has the score infinity; if one fails, each is fitted alone.
        """
        series = [self._series[market] for market in markets]
        known = [each.before(each.start + (end - length) * each.step) for each in series]
        started = time.monotonic()

        def watch(*_: float) -> None:
            self._watch(self._spent + time.monotonic() - started, candidate.name)

        try:
            recipes = [self._make_recipe(each, candidate) for each in known]
            config = dict(candidate.config)
            fitted = fit_forecasters(known, recipes, candidate.architecture, config, self._plan.fitting, watch)
            scored = zip(series, fitted, strict=True)
            return [self._score(each.before(each.start + end * each.step), of, end - length) for each, of in scored]
        except (SeriesInvalid, Unfit, LoadError):
            if len(markets) == 1:
                return [(inf, inf)]
            return [one for market in markets for one in self._score_group(candidate, [market], end, length)]

    def _make_recipe(self, series: Series, candidate: Candidate) -> ForecastSpec:
        lengths = (self._plan.prediction_length, self._plan.context_length)
        options = {**self._plan.options, "scaling": candidate.scaling, "time_zone": series.zone}
        return make_recipes([series], candidate.architecture, candidate.config, *lengths, options)[0]

    def _score(self, series: Series, fitted: Fitted, first: int) -> tuple[float, float]:
        """Score a fit on the windows from step `first` on. Raises Unfit, LoadError."""
        parts = ArchiveParts(
            tensors=fitted.tensors, architecture=fitted.architecture, config=fitted.config, forecast=fitted.forecast
        )
        model = open_unpublished(
            pack_model(Kind.FORECASTER, parts, model_name="m"), ModelName(f"{series.name}.mar"), DEFAULT_LIMITS
        )
        origins = Rolling(first=series.start + first * series.step).origins(series, [fitted.forecast])
        return measure_forecasts(forecast_windows(InProcess(), model, series, origins))

    def _test_winner(self, units: Sequence[Unit]) -> Tuned:
        """Make the board; the winner and the first candidate are fitted to all rows before the test, and scored."""
        board = sorted(
            (self._make_standing(each, units) for each in self._plan.candidates if each.name in self._reached),
            key=lambda each: (-each.round, each.score),
        )
        if not isfinite(board[0].score):
            raise SeriesInvalid("no candidate could be fitted and scored; train one, which says why")
        total, names = len(self._series[0].values), {board[0].candidate.name, self._plan.candidates[0].name}
        markets = list(dict.fromkeys(market for market, _ in units))[:TESTED]
        self._say(f"test: {' and '.join(sorted(names))} on {len(markets)} markets")
        tested = []
        for each in board:
            if each.candidate.name not in names:
                tested.append(each)
                continue
            scores = self._score_group(each.candidate, markets, total, total - self._end)
            score, rmae = (_average([pair[at] for pair in scores]) for at in range(2))
            tested.append(
                Standing(each.candidate, each.round, each.units, each.score, each.rmae, each.seconds, score, rmae)
            )
        series = self._series[0]
        span = (series.stamp(self._end), series.stamp(total - 1), len(markets))
        return Tuned(tested, self._rounds, self._spent, len(self._series), span, dict(self._list_failures()))

    def _make_standing(self, candidate: Candidate, units: Sequence[Unit]) -> Standing:
        reached, count = self._reached[candidate.name]
        trials = [self._journal.trials[candidate.name][unit] for unit in units[:count]]
        score, rmae = (_average([getattr(each, of) for each in trials]) for of in ("score", "rmae"))
        return Standing(candidate, reached, count, score, rmae, self._estimate_seconds(candidate.name))

    def _list_failures(self) -> Iterator[tuple[str, str]]:
        """List who failed on some units."""
        for name, trials in self._journal.trials.items():
            if failed := sum(not isfinite(each.score) for each in trials.values()):
                yield name, f"{failed} of {len(trials)} fits failed"


def measure_forecasts(found: WindowForecasts) -> tuple[float, float]:
    """Compute twice the pinball loss in units of the seasonal error, and rMAE; infinite where one is undefined."""
    season = compute_naive_lag(round(found.series.step.total_seconds()), 1)
    scale = float(np.nanmean(compute_seasonal_errors(found.series.values, found.origins, season)))
    scores = compute_scores(found)
    score = 2 * scores.pinball / scale if scale else inf
    return tuple(each if isfinite(each) else inf for each in (score, scores.rmae))  # type: ignore[return-value]


def _average(values: Sequence[float]) -> float:
    """The geometric mean; infinite with an infinite value or without any."""
    if not values or not all(map(isfinite, values)):
        return inf
    return exp(sum(log(max(each, 1e-12)) for each in values) / len(values))
