"""Trains archives of the columns of a price file: reads them, fits them, packs what is fit for use, stores it. Torch.

A column that cannot be fitted, or whose fit is no better than the naive forecast, stops only itself.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from handlers.kinds import ArchiveParts, pack_model
from handlers.training.fit import Fitted, Fitting, Progress, explain_worse, fit_forecasters
from handlers.training.input_recipe import DAY, HOUR, choose_prediction_length
from handlers.training.stamps import FileRules, name_step
from handlers.training.time_series import Series, SeriesInvalid, read_csv
from model_store.archives.manifest import ForecastSpec, Kind
from model_store.names import ModelName
from server.offline.archive_location import locate_archive
from server.offline.archive_tools import verify_packed_archive
from server.offline.input_recipes import make_recipes
from server.settings import Settings

Watch = Callable[[str], AbstractContextManager[Progress]]  #: shows the progress of a fit, which it is told in words


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """The parameters of a run. Empty or 0 where the prices decide; `options` are those of `make_recipe`."""

    csv: Path
    time: str
    names: Mapping[str, ModelName]  #: by target
    known_future: Sequence[str]  #: column names, in which {target} may stand; with `residual_to` if there is one
    rules: FileRules
    out: str
    settings: Settings  #: of the store at `out`
    fitting: Fitting
    residual_to: str = ""  #: the known-future column from which deviations are learnt
    until: datetime | None = None
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prediction_length: int = 0
    context_length: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_worse: bool = False

    def __repr__(self) -> str:
        return f"<TrainingPlan {len(self.names)} markets from {self.csv.name} to {self.out}>"


@dataclass(frozen=True, slots=True)
class Trained:
    """What was stored, with the bytes of each archive, and why the other targets have none."""

    fitted: Sequence[Fitted]
    sizes: Sequence[int]
    failed: Mapping[str, str]


def read_prices(plan: TrainingPlan) -> list[Series]:
    """Read the columns of the plan. Raises SeriesInvalid, OSError; ValueError if the file does not have its step."""
    series = read_csv(plan.csv, plan.time, list(plan.names), plan.known_future, plan.rules, plan.residual_to)
    if plan.rules.step_s and round(series[0].step.total_seconds()) != plan.rules.step_s:
        frequency = series[0].frequency
        raise ValueError(
            f"--frequency {name_step(plan.rules.step_s)}: {plan.csv.name} has steps of {frequency} throughout"
        )
    return series if plan.until is None else [each.before(plan.until) for each in series]


def train_archives(plan: TrainingPlan, series: Sequence[Series], watch: Watch) -> Trained:
    """Fit all series together and store what is better than naive. Raises SeriesInvalid, ValueError if that is none."""
    architecture = plan.architecture or choose_architecture(series[0], plan.prediction_length)
    alive, forecasts, failed = _make_possible_recipes(plan, architecture, series)
    _check_out(plan, next(iter(plan.names.values())))
    fitted, broken = _fit_what_can_be(plan, architecture, alive, forecasts, watch)
    failed |= broken
    if not plan.keep_worse:
        fitted, worse = _refuse_worse(fitted)
        failed |= worse
    if not fitted:
        raise ValueError("; ".join(failed.values()))
    sizes = _store_archives(plan, fitted, alive[0])
    return Trained(fitted, sizes, failed)


def choose_architecture(series: Series, prediction_length: int) -> str:
    """The architecture that has the least errors for prices of this step, by DECISIONS 80."""
    step_s = round(series.step.total_seconds())
    whole_days = (prediction_length or choose_prediction_length(step_s)) * step_s % DAY == 0
    return "lear" if HOUR / 4 <= step_s <= HOUR and DAY % step_s == 0 and whole_days else "tcn"


def _make_possible_recipes(
    plan: TrainingPlan, architecture: str, series: Sequence[Series]
) -> tuple[list[Series], list[ForecastSpec], dict[str, str]]:
    """The series that have values, their recipes, and why the others have none. Raises SeriesInvalid if none has."""
    found, dead = dict[str, tuple[Series, ForecastSpec]](), dict[str, str]()
    lengths = (plan.prediction_length, plan.context_length)
    for each in series:
        try:
            base = plan.residual_to.replace("{target}", each.name)
            one = each.without_gaps(base) if base else each
            options = {**plan.options, "residual_to": base}
            (recipe,) = make_recipes([one], architecture, plan.config, *lengths, options)
        except SeriesInvalid as error:
            if len(series) == 1:
                raise
            dead[each.name] = str(error)
        else:
            found[each.name] = (one, recipe)
    if not found:
        raise SeriesInvalid("; ".join(dead.values()))
    return [each for each, _ in found.values()], [recipe for _, recipe in found.values()], dead


def _check_out(plan: TrainingPlan, name: ModelName) -> None:
    """Check before the fit that `out` can be written to; nothing is created. Raises ValueError."""
    if "://" in plan.out:
        locate_archive(plan.settings, name)
        return
    folder = Path(plan.out).expanduser().absolute()
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {plan.out}: {nearest} is not a folder that can be written to")


def _fit_what_can_be(
    plan: TrainingPlan, architecture: str, series: Sequence[Series], forecasts: Sequence[ForecastSpec], watch: Watch
) -> tuple[list[Fitted], dict[str, str]]:
    """Fit all series together; if one cannot be fitted, each alone, and say why. Raises SeriesInvalid if none can."""

    def fit(some: Sequence[Series], recipes: Sequence[ForecastSpec]) -> list[Fitted]:
        with watch(f"fitting {len(some)} {architecture}") as progress:
            return fit_forecasters(some, recipes, architecture, dict(plan.config), plan.fitting, progress)

    try:
        return fit(series, forecasts), {}
    except SeriesInvalid:
        if len(series) == 1:
            raise
    fitted, failed = list[Fitted](), dict[str, str]()
    for each, recipe in zip(series, forecasts, strict=True):
        try:
            fitted += fit([each], [recipe])
        except SeriesInvalid as error:
            failed[each.name] = str(error)
    if not fitted:
        raise SeriesInvalid("; ".join(failed.values()))
    return fitted, failed


def _refuse_worse(fitted: Sequence[Fitted]) -> tuple[list[Fitted], dict[str, str]]:
    """Those that are better than the naive forecast, and why the others are not stored."""
    why = {each.name: explain_worse(each) for each in fitted}
    refused = {name: f"{text}; it is not stored (--keep-worse stores it)" for name, text in why.items() if text}
    return [each for each in fitted if each.name not in refused], refused


def _store_archives(plan: TrainingPlan, fitted: Sequence[Fitted], series: Series) -> list[int]:
    """Pack the archives, verify them as a worker would, and store them. Returns their sizes in bytes."""
    if "://" not in plan.out:
        Path(plan.out).expanduser().mkdir(parents=True, exist_ok=True)
    sizes, place = [], locate_archive(plan.settings, plan.names[fitted[0].name])
    for each in fitted:
        name = plan.names[each.name]
        packed = _pack_fitted(plan, each, series, name)
        verify_packed_archive(packed, name, place.limits)
        place.source.put(name, packed)
        sizes.append(len(packed))
    return sizes


def _pack_fitted(plan: TrainingPlan, fitted: Fitted, series: Series, name: ModelName) -> bytes:
    """Pack an archive; its description names the price file and the range of its rows that the fit used."""
    until = series.stamp(len(series.values) - 1)
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(
            tensors=fitted.tensors,
            architecture=fitted.architecture,
            config=fitted.config,
            forecast=fitted.forecast,
            trained_until=until,
            trained_epochs=plan.fitting.epochs,
        ),
        model_name=name.rpartition("/")[2].partition(".")[0],
        golden=fitted.golden,
        description=f"trained on {plan.csv.name}, {series.stamp(0)} to {until}",
    )
