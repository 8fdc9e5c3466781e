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
    complete,
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

    @classmethod
    def of(cls, forecast: ForecastSpec, step_s: int) -> "HistoryReader | None":
        """Return the reader of an archive; None if it has no rules."""
        rules = forecast.history
        if not rules:
            return None
        return cls(rules, forecast.scaler, forecast.history_length, forecast.prediction_length, step_s)

    @property
    def season(self) -> int:
        """The steps of a season."""
        return count_season(self.step_s)

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
        if gone or np.isnan(values).any():
            values = complete(values, self.scaler.center, self.season if self.rules.fill == "seasonal" else 0)
        return History(values, tuple(dict.fromkeys(codes)), fallback)

    def judge_rows(self, rows: Float64, first_hours: Sequence[int]) -> list[list[str]]:
        """Return further codes of each of the completed histories [n, needed]: their range, and their time of day."""
        rules = self.rules
        lowest, highest = rows.min(1), rows.max(1)
        outside = (lowest < rules.low) | (highest > rules.high) | (highest - lowest < rules.least_span)
        shifted = self._judge_shift(rows, first_hours) if rules.profile else np.zeros(len(rows), bool)
        if not (outside.any() or shifted.any()):
            return [[] for _ in rows]
        return [[RANGE] if far else [SHIFTED] if late else [] for far, late in zip(outside, shifted, strict=True)]

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

    def _judge_shift(self, rows: Float64, first_hours: Sequence[int]) -> Flags:
        """Whether the daily course of each row fits that of the archive better at another hour than at its own."""
        courses = measure_courses(to_network(rows, self.scaler), self.step_s, first_hours)
        gains: Float64 = compute_shift_gains(courses, np.array(self.rules.profile))
        return gains > self.rules.shift_gain

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


def measure_courses(rows: Float64, step_s: int, first_hours: Sequence[int]) -> Float64:
    """Measure the mean daily course [n, 24], from midnight on, of the last whole days of rows [n, T].

    `first_hours`: the hour of the day of the step after each row. Steps are of an hour or divide one.
    """
    steps = DAY // step_s
    days = rows[:, rows.shape[1] % steps :]
    hours = days.reshape(len(rows), -1, HOURS, steps // HOURS).mean(axis=(1, 3))
    turned = (np.arange(HOURS) - np.asarray(first_hours)[:, None]) % HOURS
    found: Float64 = np.take_along_axis(hours, turned, 1)
    return found


def compute_shift_gains(courses: Float64, profile: Float64) -> Float64:
    """Compute how much better each course [n, 24] fits the profile [24] at another hour than at its own: [n].

    The fit is their correlation, so that a gain is at most 2.
    """
    courses = courses - courses.mean(1, keepdims=True)
    size = np.sqrt((courses**2).sum(1))
    turns = np.stack([np.roll(profile, turn) for turn in range(HOURS)], axis=1)
    fits = courses @ turns / np.where(size > 0, size, 1.0)[:, None]
    gains: Float64 = fits[:, 1:].max(1) - fits[:, 0]
    return gains
