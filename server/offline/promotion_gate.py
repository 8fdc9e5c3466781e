"""The gate before publishing: the new archive and its predecessor forecast the same windows, and one score decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np

from handlers.evaluation.scores import Steps
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series, read_csv
from model_store.errors import ArchiveInvalid, ModelNotFound
from server.offline.archive_location import ArchiveLocation
from server.offline.evaluation import compute_scores
from server.offline.measures import Score
from server.offline.rolling_windows import (
    Answers,
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    add_known_series,
    count_unseen,
    explain_seen_windows,
    explain_unused_rows,
    fetch_version,
    forecast_windows,
    open_unpublished,
)

LEAST_UNSEEN = 7  #: least number of windows, of days a week, that a comparison needs to be made on these alone
BY_LEVEL = ("pinball", "wql", "crps")  #: scores that depend on the quantile levels


class GateRefused(ValueError):
    """The archive is worse than the one that it would replace; the message has the scores."""


@dataclass(frozen=True, slots=True)
class GateTerms:
    """The terms of the operator: at most `margin` percent worse by `score` (lower is better) on these windows."""

    score: Score
    margin: float
    rolling: Rolling


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The result of a comparison. Without a predecessor that can answer, the candidate passes."""

    gate: GateTerms
    candidate: float
    predecessor: float | None
    version: str  #: version of the predecessor
    windows: int
    first: str
    last: str
    notes: tuple[str, ...] = ()  #: what limits the comparison, in words
    recipe: bool = False  #: whether the predecessor's recipe was fitted anew to what the candidate was fitted to

    @property
    def worse(self) -> float:
        """By how many percent the archive is worse; negative if it is better."""
        if self.predecessor is None or self.candidate == self.predecessor:
            return 0.0
        return 100 * (self.candidate / self.predecessor - 1) if self.predecessor else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the archive may be published."""
        return self.worse <= self.gate.margin

    def __str__(self) -> str:
        """For example `gate: wql 0.2011 against 0.2132 of version 8f3a, 28 windows from ... to ...`."""
        of = "its recipe, fitted to the same rows" if self.recipe else f"version {self.version}"
        before = "no predecessor" if self.predecessor is None else f"{self.predecessor:.4g} of {of}"
        span = f"{self.windows} windows from {self.first} to {self.last}"
        return f"gate: {self.gate.score} {self.candidate:.4g} against {before}, {span}"


def compare_models(
    gate: GateTerms,
    answers: Answers,
    target: str,
    columns: Mapping[str, Series],
    candidate: ArchiveVersion,
    predecessor: ArchiveVersion | None,
    *,
    recipe: bool = False,
) -> GateVerdict:
    """Score both models on the windows that both can forecast, at the steps and levels that both have.

    `columns` contains the target and all covariates. A broken predecessor counts as none. Windows that one of them was
    fitted to are left out, if enough others remain; `recipe`: the predecessor was fitted anew for this comparison.

    Raises:
        Unfit: one of them cannot be backtested, or the score is undefined. LoadError: the candidate does not load.
    """
    both = [candidate, *([predecessor] if predecessor else [])]
    series = [add_known_series(columns, target, each.forecast) for each in both]
    origins = choose_unseen(gate.rolling.origins(series[0], [each.forecast for each in both]), series[0], both)
    unknown = predecessor is not None and predecessor.trained_until is None
    seen = ["the predecessor does not say until when it was trained; it may have seen these windows"] * unknown
    seen += [explain_seen_windows(each, series[0], origins) for each in both]
    found = [forecast_windows(answers, candidate, series[0], origins)]
    if predecessor is not None:
        try:
            found.append(forecast_windows(answers, predecessor, series[1], origins))
        except ArchiveInvalid:
            predecessor = None
    values = [_score_value(gate.score, each) for each in _cut_to_common(gate.score, found)]
    return GateVerdict(
        gate=gate,
        candidate=values[0],
        predecessor=values[1] if predecessor else None,
        version=predecessor.version if predecessor else "",
        windows=len(origins),
        first=series[0].stamp(int(origins[0])),
        last=series[0].stamp(int(found[0].steps[-1, -1])),
        notes=tuple(
            filter(None, [explain_unused_rows(series[0], both[0].forecast, int(found[0].steps[-1, -1])), *seen])
        ),
        recipe=recipe,
    )


def choose_unseen(origins: Steps, series: Series, models: Sequence[ArchiveVersion]) -> Steps:
    """Return the windows that none of the models was fitted to; all windows if fewer than LEAST_UNSEEN are left."""
    counts = [count for each in models if (count := count_unseen(each, series, origins)) is not None]
    unseen = min(counts, default=len(origins))
    return origins[len(origins) - unseen :] if unseen >= min(LEAST_UNSEEN, len(origins)) else origins


def _cut_to_common(score: Score, found: list[WindowForecasts]) -> list[WindowForecasts]:
    """Cut the forecasts to the steps that all have and, for a score by levels, to the levels that all have."""
    horizon, levels = min(each.horizon for each in found), found[0].levels
    for each in found[1:]:
        levels = np.intersect1d(levels, each.levels)
    if score not in BY_LEVEL:
        return [each.cut(horizon, each.levels) for each in found]
    if not len(levels):
        raise Unfit(f"{found[0].model} and its predecessor share no quantile level; gate by wape, mase or rmae")
    return [each.cut(horizon, levels) for each in found]


def _score_value(score: Score, found: WindowForecasts) -> float:
    value: float = getattr(compute_scores(found), score)
    if isnan(value):
        raise Unfit(f"{found!r}: {score} is undefined there (nothing observed, or no median); choose another score")
    return value


def compare_with_predecessor(
    gate: GateTerms,
    csv: Path,
    time: str,
    target: str,
    where: ArchiveLocation,
    packed: bytes,
    rules: FileRules = PLAIN,
) -> GateVerdict:
    """Compare a packed archive with the one that the store has at its place; the file is read by `rules`.

    Raises:
        GateRefused: it is worse. Unfit, SeriesInvalid: it cannot be judged. LoadError, OSError.
    """
    candidate = open_unpublished(packed, where.name, where.limits)
    try:
        predecessor = fetch_version(where.source, where.name, where.limits)
    except (ModelNotFound, ArchiveInvalid):
        predecessor = None
    known = [name for each in (candidate, predecessor) if each for name in each.forecast.dynamic_feat]
    rules = rules.for_archive(candidate.forecast)
    if predecessor and predecessor.forecast.time_zone != rules.zone:
        zones = f"{predecessor.forecast.time_zone} and the new archive in {rules.zone}"
        raise Unfit(f"{where.name}: the predecessor forecasts in {zones}; pack once without a gate")
    columns = {each.name: each for each in read_csv(csv, time, list(dict.fromkeys([target, *known])), (), rules)}
    verdict = compare_models(gate, InProcess(), target, columns, candidate, predecessor)
    if not verdict.passed:
        worse, most = f"{verdict.worse:.1f} % worse", f"{gate.margin:g} %"
        raise GateRefused(f"{where.name} is worse than its predecessor: {verdict}; {worse}, and the margin is {most}")
    return verdict
