"""Trains archives of the columns of a price file: reads them, fits them, packs what is fit for use, stores it. Torch.

Targets are read and fitted in groups, so that memory does not grow with their number, and each group is stored before
the next. A column that cannot be fitted, or whose fit is no better than the naive forecast, stops only itself.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import UNSET

from handlers.kinds import ArchiveParts, pack_model
from handlers.training.fit import Fitted, Fitting, Progress, explain_worse, fit_forecasters
from handlers.training.input_recipe import DAY, HOUR, choose_prediction_length
from handlers.training.stamps import FileRules, name_step
from handlers.training.time_series import Series, SeriesInvalid, read_csv
from model_store.archives.manifest import ForecastSpec, Kind
from model_store.errors import ArchiveInvalid, ModelNotFound
from model_store.names import ModelName
from server.offline.archive_location import locate_archive
from server.offline.archive_tools import verify_packed_archive
from server.offline.fit_fingerprint import compute_fingerprint
from server.offline.input_recipes import make_recipes
from server.settings import Settings

GROUP = 64  #: most targets that are fitted together
READ_BYTES = 2**27  #: of the columns that are read at a time
FIT_BYTES = 2**29  #: about the most memory of the windows of a group
CHANNELS = 8  #: about how many times as large as its series the windows of a target are: ten channels of half the bytes


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


class StoredFit(NamedTuple):
    """An archive that is in the store: losses as of its fit, NaN where it was there already, and its size in bytes."""

    target: str
    loss: float
    naive_loss: float
    size: int
    forecast: ForecastSpec


@dataclass(slots=True)
class Trained:
    """What was stored, what was there already of the same fit, and why the other targets have no archive."""

    stored: list[StoredFit]
    unchanged: list[StoredFit]
    failed: dict[str, str]
    notes: dict[str, None]  #: what was assumed when the file was read

    def __repr__(self) -> str:
        return f"<Trained {len(self.stored)} stored, {len(self.unchanged)} unchanged, {len(self.failed)} failed>"


class GroupPlace(NamedTuple):
    """Which targets a fit is of: `size` of them after the first `done` of `total`."""

    architecture: str
    done: int
    size: int
    total: int


Watch = Callable[[GroupPlace], AbstractContextManager[Progress]]  #: shows the progress of a fit


def train_archives(plan: TrainingPlan, watch: Watch) -> Trained:
    """Fit all targets, some at a time, and store each group's archives before the next is read.

    So memory is bounded by a group, and a run that was killed continues: what has been fitted to the same rows in the
    same way is not fitted again. Raises SeriesInvalid, OSError; ValueError if no target has an archive.
    """
    _check_out(plan, next(iter(plan.names.values())))
    found, done = Trained([], [], {}, {}), 0
    for block in _read_blocks(plan):
        found.notes.update(dict.fromkeys(block[0].notes))
        architecture = plan.architecture or choose_architecture(block[0], plan.prediction_length)
        for series in _split_block(plan, block):
            place = GroupPlace(architecture, done, len(series), len(plan.names))
            _train_group(plan, series, place, watch, found)
            done += len(series)
    if not found.stored and not found.unchanged:
        raise ValueError("; ".join(found.failed.values()))
    return found


def read_prices(plan: TrainingPlan) -> list[Series]:
    """Read all columns of the plan at once, for a search that compares them. Raises as `_read_blocks` does."""
    return [series for block in _read_blocks(plan) for series in block]


def _read_blocks(plan: TrainingPlan) -> Iterator[Sequence[Series]]:
    """Read the columns of the plan in blocks of bounded memory: first those of a group, then as many as fit.

    Raises SeriesInvalid, OSError; ValueError if the file does not have the plan's step.
    """
    targets, size = list(plan.names), GROUP
    while targets:
        some, targets = targets[:size], targets[size:]
        series = read_csv(plan.csv, plan.time, some, plan.known_future, plan.rules, plan.residual_to)
        if plan.rules.step_s and round(series[0].step.total_seconds()) != plan.rules.step_s:
            step, frequency = name_step(plan.rules.step_s), series[0].frequency
            raise ValueError(f"--frequency {step}: {plan.csv.name} has steps of {frequency} throughout")
        if plan.until is not None:
            series = [each.before(plan.until) for each in series]
        size = max(GROUP, READ_BYTES // _count_bytes(series[0]) // GROUP * GROUP)
        yield series


def _split_block(plan: TrainingPlan, block: Sequence[Series]) -> Iterator[Sequence[Series]]:
    """Split a block into the groups that are fitted together.

    INVARIANT: groups depend on the file and the plan alone, because the numbers of a network depend on its group.
    """
    each = CHANNELS * _count_bytes(block[0]) * _count_networks(plan.config)
    size = max(1, min(GROUP, FIT_BYTES // max(each, 1)))
    for at in range(0, len(block), size):
        yield block[at : at + size]


def _count_networks(config: Mapping[str, Any]) -> int:
    """Count the networks of an archive that have windows of their own: members, and the parts of a mixture."""
    parts: Sequence[Mapping[str, Any]] = config.get("parts", ())
    return sum(_count_networks(part) for part in parts) or int(config.get("members", 1))


def _count_bytes(series: Series) -> int:
    """Count the bytes of values and covariates, at least one."""
    return max(1, series.values.nbytes + series.known.nbytes)


def _train_group(plan: TrainingPlan, series: Sequence[Series], place: GroupPlace, watch: Watch, found: Trained) -> None:
    """Fit a group and store what is fit for use, unless all of it is in the store already."""
    alive, forecasts, dead = _make_possible_recipes(plan, place.architecture, series)
    found.failed |= dead
    prints = {
        each.name: compute_fingerprint(each, forecast, place.architecture, plan.config, plan.fitting)
        for each, forecast in zip(alive, forecasts, strict=True)
    }
    there = [old for each in alive if (old := _find_same_fit(plan, each.name, prints[each.name]))]
    found.unchanged += there
    left = {each.name for each in alive} - {old.target for old in there}
    if not left:
        return
    fitted, broken = _fit_what_can_be(plan, place, alive, forecasts, watch)
    found.failed |= broken
    fitted = [each for each in fitted if each.name in left]
    if not plan.keep_worse:
        fitted, worse = _refuse_worse(fitted)
        found.failed |= worse
    if fitted:
        found.stored += _store_archives(plan, fitted, alive[0], prints)


def _find_same_fit(plan: TrainingPlan, target: str, fingerprint: str) -> StoredFit | None:
    """Return the archive of this target if the store has one of the same fit. Raises StoreUnavailable, StoreDenied."""
    if not fingerprint or ("://" not in plan.out and not Path(plan.out).expanduser().is_dir()):
        return None
    place = locate_archive(plan.settings, plan.names[target])
    try:
        archive = place.fetch()[0]
    except (ModelNotFound, ArchiveInvalid):
        return None
    spec = archive.spec
    if spec is None or spec.forecast is None or spec.fingerprint != fingerprint:
        return None
    return StoredFit(target, nan, nan, 0, spec.forecast)


def choose_architecture(series: Series, prediction_length: int) -> str:
    """The architecture that has the least errors for prices of this step, by DECISIONS 80."""
    step_s = round(series.step.total_seconds())
    whole_days = (prediction_length or choose_prediction_length(step_s)) * step_s % DAY == 0
    return "lear" if HOUR / 4 <= step_s <= HOUR and DAY % step_s == 0 and whole_days else "tcn"


def _make_possible_recipes(
    plan: TrainingPlan, architecture: str, series: Sequence[Series]
) -> tuple[list[Series], list[ForecastSpec], dict[str, str]]:
    """The series that have values, their recipes, and why the others have none."""
    found, dead = dict[str, tuple[Series, ForecastSpec]](), dict[str, str]()
    lengths = (plan.prediction_length, plan.context_length)
    for each in series:
        try:
            base = plan.residual_to.replace("{target}", each.name)
            one = each.without_gaps(base) if base else each
            options = {**plan.options, "residual_to": base}
            (recipe,) = make_recipes([one], architecture, plan.config, *lengths, options)
        except SeriesInvalid as error:
            dead[each.name] = str(error)
        else:
            found[each.name] = (one, recipe)
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
    plan: TrainingPlan, place: GroupPlace, series: Sequence[Series], forecasts: Sequence[ForecastSpec], watch: Watch
) -> tuple[list[Fitted], dict[str, str]]:
    """Fit all series together; if one cannot be fitted, each alone, and say why. A group has its share of the time."""
    fitting = replace(plan.fitting, max_seconds=plan.fitting.max_seconds * place.size / place.total)

    def fit(some: Sequence[Series], recipes: Sequence[ForecastSpec], at: GroupPlace) -> list[Fitted]:
        with watch(at) as progress:
            return fit_forecasters(some, recipes, at.architecture, dict(plan.config), fitting, progress)

    try:
        return fit(series, forecasts, place), {}
    except SeriesInvalid as error:
        if len(series) == 1:
            return [], {series[0].name: str(error)}
    fitted, failed = list[Fitted](), dict[str, str]()
    for i, (each, recipe) in enumerate(zip(series, forecasts, strict=True)):
        try:
            fitted += fit([each], [recipe], place._replace(done=place.done + i, size=1))
        except SeriesInvalid as error:
            failed[each.name] = str(error)
    return fitted, failed


def _refuse_worse(fitted: Sequence[Fitted]) -> tuple[list[Fitted], dict[str, str]]:
    """Those that are better than the naive forecast, and why the others are not stored."""
    why = {each.name: explain_worse(each) for each in fitted}
    refused = {name: f"{text}; it is not stored (--keep-worse stores it)" for name, text in why.items() if text}
    return [each for each in fitted if each.name not in refused], refused


def _store_archives(
    plan: TrainingPlan, fitted: Sequence[Fitted], series: Series, prints: Mapping[str, str]
) -> list[StoredFit]:
    """Pack the archives, verify them as a worker would, and store them."""
    if "://" not in plan.out:
        Path(plan.out).expanduser().mkdir(parents=True, exist_ok=True)
    stored, place = list[StoredFit](), locate_archive(plan.settings, plan.names[fitted[0].name])
    for each in fitted:
        name = plan.names[each.name]
        packed = _pack_fitted(plan, each, series, name, prints[each.name])
        verify_packed_archive(packed, name, place.limits)
        place.source.put(name, packed)
        stored.append(StoredFit(each.name, each.loss, each.naive_loss, len(packed), each.forecast))
    return stored


def _pack_fitted(plan: TrainingPlan, fitted: Fitted, series: Series, name: ModelName, fingerprint: str) -> bytes:
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
            trained_half_life=plan.fitting.half_life_days or UNSET,
            fingerprint=fingerprint or UNSET,
        ),
        model_name=name.rpartition("/")[2].partition(".")[0],
        golden=fitted.golden,
        description=f"trained on {plan.csv.name}, {series.stamp(0)} to {until}",
    )
