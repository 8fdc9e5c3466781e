"""Judges and completes the history of a request by the rules of its archive (`ForecastSpec.history`). No torch.

What is doubtful is marked in the answer by a code; `docs/quality.md` says what each means, and how often it is a false
alarm. A history that says too little is answered by the archive's fallback where it has one: the value of the last
known day at this time, and the errors that this had in the past.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from handlers.codecs.features import DAY, HOUR, Float64, from_network, to_network
from handlers.codecs.gaps import (
    EMPTY,
    FALLBACK,
    FILLED,
    FLAT,
    MISSING,
    RANGE,
    SHIFTED,
    SHORT,
    STALE,
    Flags,
    History,
    complete_history,
)
from model_store.archives.manifest import Fallback, ForecastSpec, HistoryRules, Scaler

FAILED = frozenset((MISSING, EMPTY, FLAT, STALE))  #: a history that the network is not asked with where it need not be
UNJUDGED = FAILED | {SHORT}  #: a history of which so much was completed has no range and no course of its own
WEEK_DAYS, HOURS = 7, 24
MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class HistoryReader:
    """The rules of one archive of one product, ready to be used. `needed`: the steps that a request must have."""

    rules: HistoryRules
    scaler: Scaler
    needed: int
    prediction: int
    step_s: int
    season: int  #: steps
    turns: Float64 | None  #: see `turn_profile`

    @classmethod
    def of(cls, forecast: ForecastSpec, step_s: int) -> "HistoryReader | None":
        """Return the reader of an archive; None if it has no rules."""
        rules = forecast.history
        if not rules:
            return None
        lengths = (forecast.history_length, forecast.prediction_length, step_s, count_season(step_s))
        return cls(rules, forecast.scaler, *lengths, turn_profile(rules.profile) if rules.profile else None)

    def read(self, values: Float64, short: int, first_hour: int) -> History:
        """Judge and complete a history [T] with NaN for what is missing; the first `short` steps were not sent.

        `first_hour`: the hour of the day of the first forecast step. The result has no codes of `judge_rows`.
        """
        missing = np.isnan(values[-self.needed :])
        gone = int(np.count_nonzero(missing))
        codes = [SHORT] if short else []
        if gone:
            codes += self._judge_gaps(missing, gone, short)
        doubtful = 0
        if gone < len(missing):
            doubtful = self._count_flat(values)
            codes += [FLAT] if doubtful else []
            if not doubtful and (doubtful := self._count_stale(values)):
                codes.append(STALE)
        fallback = None
        if self.rules.fallback and not FAILED.isdisjoint(codes):
            sure = values if not doubtful else np.concatenate([values[:-doubtful], np.full(doubtful, np.nan)])
            fallback = self._fall_back(sure, self.rules.fallback, first_hour)
            codes.append(FALLBACK)
        if gone or (len(values) > self.needed and np.isnan(values).any()):
            values = complete_history(values, self.scaler.center, self.season if self.rules.fill == "seasonal" else 0)
        return History(values, tuple(dict.fromkeys(codes)), fallback)

    def judge_rows(self, rows: Float64, first_hours: Sequence[int]) -> list[list[str]] | None:
        """Return further codes of each of the completed histories [n, needed]: their range, and their time of day.

        None where no history has any, which is told before all else is counted: most calls have one row.
        """
        rules = self.rules
        lowest, highest = rows.min(1), rows.max(1)
        outside = (lowest < rules.low) | (highest > rules.high) | (highest - lowest < rules.least_span)
        shifted = None if self.turns is None else self._judge_shift(rows, self.turns, first_hours)
        if shifted is None and not outside.any():
            return None
        late = np.zeros(len(rows), bool) if shifted is None else shifted
        return [[RANGE] if far else [SHIFTED] if also else [] for far, also in zip(outside, late, strict=True)]

    def _judge_gaps(self, missing: Flags, gone: int, short: int) -> list[str]:
        """Return the codes of a history of which `gone` steps are missing, the last of them perhaps at its end."""
        if gone == len(missing):
            return [EMPTY]
        codes = [FILLED] if gone > short else []
        if gone > self.rules.max_missing * len(missing):
            codes.append(MISSING)
        trailing = int(np.argmin(missing[::-1]))
        if trailing >= self.rules.stale_steps:
            codes.append(STALE)
        return codes

    def _count_flat(self, values: Float64) -> int:
        """Count the steps of equal value at the end, if they are as many as is unusual, else 0."""
        least, last = self.rules.flat_steps, values[-1]
        if len(values) < least or values[-least] != last or not (values[-least:] == last).all():
            return 0
        different = np.flatnonzero(values[::-1] != last)
        return int(different[0]) if len(different) else len(values)

    def _count_stale(self, values: Float64) -> int:
        """Count the steps at the end that repeat those a season before, if they are as many as is unusual, else 0."""
        least, season = self.rules.stale_steps, self.season
        if season < 2 or len(values) < least + season or values[-1] != values[-1 - season]:  # noqa: PLR2004
            return 0
        if (
            values[-least] != values[-least - season]
            or not (values[-least:] == values[-least - season : -season]).all()
        ):
            return 0
        different = np.flatnonzero(values[season:][::-1] != values[:-season][::-1])
        return int(different[0]) if len(different) else len(values) - season

    def _judge_shift(self, rows: Float64, turns: Float64, first_hours: Sequence[int]) -> Flags | None:
        """Whether the daily course of each row fits that of the archive better at another hour; None if none does."""
        courses = measure_courses(to_network(rows, self.scaler), self.step_s)
        fits = courses @ turns
        if fits.argmax(axis=1).tolist() == list(first_hours):
            return None
        found: Flags = compute_shift_gains(courses, turns, first_hours) > self.rules.shift_gain
        return found

    def _fall_back(self, values: Float64, fallback: Fallback, first_hour: int) -> Float64:
        """Forecast quantiles [prediction, levels]: the latest known value at the time of day, plus its past errors.

        Where no such value is known, they are those of all prices at this hour of the day.
        """
        known, season, ahead = to_network(values, self.scaler), self.season, np.arange(self.prediction)
        base, far = np.full(self.prediction, np.nan), np.zeros(self.prediction, bool)
        for back in range(1, 1 + (len(values) + self.prediction) // season):
            places = len(values) + ahead - back * season
            here = np.isnan(base) & (places >= 0) & (places < len(values))
            base[here] = known[places[here]]
            far[here] = places[here] + max(season, self.prediction) < len(values) + ahead[here]
        quantiles = base[:, None] + np.where(far[:, None], np.array(fallback.far), np.array(fallback.near))
        hours = (first_hour + ahead * self.step_s // HOUR) % HOURS
        usual = np.array(fallback.usual)[hours if len(fallback.usual) > 1 else np.zeros_like(hours)]
        prices = from_network(np.where(np.isnan(quantiles), usual, quantiles), self.scaler)
        return np.clip(prices, -MOST, MOST)


def count_season(step_s: int) -> int:
    """Count the steps of a season: a day, of days a week, else one step."""
    if step_s < DAY:
        return DAY // step_s if DAY % step_s == 0 else 1
    return WEEK_DAYS if step_s == DAY else 1


def measure_courses(rows: Float64, step_s: int) -> Float64:
    """Measure the mean daily course [n, 24] of the last whole days of rows [n, T], in the order of the rows.

    Steps are of an hour or divide one.
    """
    steps = DAY // step_s
    days = rows[:, rows.shape[1] % steps :].reshape(len(rows), -1, steps).mean(axis=1)
    found: Float64 = days if steps == HOURS else days.reshape(len(rows), HOURS, -1).mean(axis=2)
    return found


def turn_profile(profile: Sequence[float]) -> Float64:
    """Return the profile [24] of a day that begins at each hour of it [24, 24], a column each."""
    return np.stack([np.roll(profile, -hour) for hour in range(HOURS)], axis=1)


def compute_shift_gains(courses: Float64, turns: Float64, first_hours: Sequence[int]) -> Float64:
    """Compute how much better each course [n, 24] fits a profile at another hour than at its own: [n].

    `first_hours`: the hour of the day at which each course begins. The fit is the correlation with the profile, whose
    mean is 0 and whose length is 1, so that a gain is at most 2.
    """
    fits = courses @ turns
    places = np.arange(len(courses)), np.asarray(first_hours)
    own = fits[places]
    fits[places] = -np.inf
    size = courses.std(axis=1) * HOURS**0.5
    gains: Float64 = (fits.max(axis=1) - own) / np.where(size > 0, size, np.inf)
    return gains
