"""Retrains a fleet: fits each archive to a CSV file, compares it with the one in the store, and publishes it. Torch.

Each market keeps lengths, quantile levels, covariates and unit, on which its clients rely. The gate compares on windows
to which neither archive was fitted; where the old one has seen too many of the last windows, its recipe is fitted anew
to the rows before them. What passes is fitted once more, to all rows, and that is published.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from handlers.evaluation.scores import Steps
from handlers.kinds import ArchiveParts, find_kind, pack_model
from handlers.training.fit import Fitted, Fitting, Progress, explain_worse, fit_forecasters
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series, SeriesInvalid
from model_store.archives.manifest import ForecastSpec, Kind, Spec
from model_store.errors import StoreDenied, StoreUnavailable
from model_store.names import ModelName
from server.offline.calibration import Calibrated, calibrate_windows, count_windows, pack_calibrated
from server.offline.checkpoint import Checkpoint
from server.offline.fit_fingerprint import compute_fingerprint
from server.offline.fleet_evaluation import explain_error, fetch_archives, read_columns
from server.offline.input_recipes import make_recipes
from server.offline.promotion_gate import GateTerms, GateVerdict, choose_unseen, compare_models
from server.offline.refits import refit_scalers
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    add_known_series,
    count_unseen,
    forecast_windows,
    open_unpublished,
)
from server.sdk.client import reload_model
from server.sdk.errors import FleetcastError
from server.sdk.signing import find_token
from server.settings import Settings
from server.worker.archive_store import open_store

GROUP = 64  #: most markets that are fitted together


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result for one market, a line of the log. `kept`: the new archive was worse, so the old one stays."""

    target: str
    model: ModelName
    result: Literal["published", "kept", "unchanged", "failed"]
    version: str = ""  #: the version that the store has from now on
    score: str = ""
    value: float | None = None
    predecessor: float | None = None
    worse_percent: float | None = None
    message: str = ""
    note: str = ""  #: which rows the gate could not use, in words
    work: str = ""  #: a hash of what has decided; while it and `version` stay, a market that was kept is kept again
    at: str = ""  #: when the market was settled, UTC


@dataclass(frozen=True, slots=True)
class RetrainingPlan:
    """The parameters of a run. `architecture` is empty if each market keeps its own."""

    csv: Path
    time: str
    names: Mapping[str, ModelName]
    settings: Settings
    gate: GateTerms
    fitting: Fitting
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    servers: Sequence[str] = ()  #: management addresses of servers that reload each new archive
    rules: FileRules = PLAIN
    keep_worse: bool = False  #: publish also what is no better than the naive forecast
    half_life: float | None = None  #: days, in place of each archive's own
    residual_to: str = ""  #: column from which every market learns deviations; empty: each keeps its own
    calibrate: int = 0  #: days that every archive is calibrated by; 0: those that are calibrated, by as many windows

    def __repr__(self) -> str:
        return f"<RetrainingPlan {len(self.names)} markets from {self.csv.name} to {self.settings.store}>"

    def name_base(self, target: str) -> str:
        """Return the column from which a target learns deviations; empty if it keeps its own."""
        return self.residual_to.replace("{target}", target)

    @property
    def digest(self) -> bytes:
        """A hash of everything that determines the outcome, except the contents of the store."""
        digest = hashlib.sha256(self.csv.read_bytes())
        terms = (
            self.time,
            dict(self.names),
            self.settings.store,
            self.gate,
            self.fitting,
            self.architecture,
            self.config,
            self.rules,
            self.keep_worse,
            self.half_life,
            self.residual_to,
            self.calibrate,
        )
        digest.update(repr(terms).encode())
        return digest.digest()


@dataclass(frozen=True, slots=True)
class RetrainingMarket:
    """A market before its fit: the archive in the store, all rows, and the new recipe.

    `held_back`: the series up to the windows of the gate and of the calibration. `by_recipe`: the predecessor has seen
    too many of these windows. `calibrated`: the first step of each window that a calibration learns from.
    `fingerprint`: of the fit to all rows, which is what would be published.
    """

    line: int
    predecessor: ArchiveVersion
    series: Series
    held_back: Series
    forecast: ForecastSpec
    architecture: str
    config: Mapping[str, Any]
    by_recipe: bool
    calibrated: Steps
    fitting: Fitting
    fingerprint: str

    @property
    def is_calibrated_so(self) -> bool:
        """Whether the predecessor's calibration is that of the windows which a new one would learn from."""
        old = self.predecessor.calibration
        if old is None or not len(self.calibrated):
            return old is None and not len(self.calibrated)
        last = int(self.calibrated[-1]) + self.forecast.prediction_length - 1
        return (old.windows, old.until) == (len(self.calibrated), self.series.stamp(last))

    @property
    def kin(self) -> str:
        """A key that is equal for markets that can be fitted together."""
        forecast = self.forecast
        lengths = (forecast.context_length, forecast.prediction_length, forecast.history_length, len(forecast.inputs))
        terms = (self.architecture, sorted(self.config.items()), self.fitting)
        levels = (forecast.quantile_levels, bool(forecast.tails))
        return repr((*terms, lengths, levels))


@dataclass(frozen=True, slots=True)
class Passed:
    """What is to be published: the gate has passed it, and its calibration is known if it has one."""

    verdict: GateVerdict
    calibrated: Calibrated | None


class Retraining:
    """One run over the fleet. The checkpoint keeps finished markets, so that a killed run can be continued."""

    def __init__(self, plan: RetrainingPlan, watch: Callable[[float, str], None] = lambda *_: None) -> None:
        """`watch` gets how many markets the fits of a running group amount to so far, and the fit in words."""
        self._plan, self._watch = plan, watch
        self._source, self._limits = open_store(plan.settings)
        self._answers = InProcess()
        self._columns: Mapping[str, Mapping[str, Series]] = {}

    def __repr__(self) -> str:
        return f"<Retraining {self._plan!r}>"

    def run(
        self,
        journal: Checkpoint,
        told: Callable[[int], None],
        earlier: Mapping[ModelName, Outcome] = MappingProxyType({}),
    ) -> None:
        """Retrain every market that the checkpoint does not have yet, and of which something has changed.

        `earlier`: the last outcome of each archive, from the record of earlier runs.

        Raises:
            StoreUnavailable, StoreDenied, OSError: the run may be started again. SeriesInvalid: the file cannot be
            read. ValueError: the architecture or its config, which is the same for all.
        """
        plan = self._plan
        with ThreadPoolExecutor(plan.settings.loader_threads) as pool:
            models, failed = fetch_archives(pool, plan.names, plan.settings)
        more = {target: [name] for target in models if (name := plan.name_base(target))}
        self._columns, lacking = read_columns(plan.csv, plan.time, models, plan.rules, more)
        failed.update(lacking)
        left = set(journal.left().nonzero()[0].tolist())

        def done(line: int, outcome: Outcome) -> None:
            if line in left:
                outcome = replace(outcome, at=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"))
                journal.add([(line, msgspec.json.encode(outcome) + b"\n")])
                left.discard(line)
                told(1)

        markets = []
        for line, target in enumerate(plan.names):
            if target in failed:
                done(line, self._record_failure(target, failed[target]))
                continue
            try:
                market = self._prepare_market(line, target, models[target])
                recalled = self._recall_outcome(market, earlier) if line in left else None
            except (SeriesInvalid, Unfit) as error:
                done(line, self._record_failure(target, str(error)))
                continue
            markets.append(market)
            if recalled is not None:
                done(line, recalled)
        for group in group_markets(markets):
            if any(each.line in left for each in group):
                for each, outcome in self._settle_group(group, left):
                    done(each.line, outcome)

    def _recall_outcome(self, market: RetrainingMarket, earlier: Mapping[ModelName, Outcome]) -> Outcome | None:
        """Return the outcome of a market of which nothing has changed since it was settled, else None."""
        old, fingerprint = market.predecessor, market.fingerprint
        if old.archive.spec and old.archive.spec.fingerprint == fingerprint and market.is_calibrated_so:
            return Outcome(target=market.series.name, model=old.name, result="unchanged", version=old.version)
        before = earlier.get(old.name)
        if (
            before
            and before.result == "kept"
            and before.version == old.version
            and before.work == self._name_work(market)
        ):
            return replace(before, message="nothing has changed since it was kept")
        return None

    def _name_work(self, market: RetrainingMarket) -> str:
        """Hash what decides about a market, beside the archive in the store."""
        terms = (market.fingerprint, self._plan.gate, len(market.calibrated), market.by_recipe)
        return hashlib.sha256(repr(terms).encode()).hexdigest()

    def _prepare_market(self, line: int, target: str, model: ArchiveVersion) -> RetrainingMarket:
        """Prepare a market. Raises Unfit or SeriesInvalid if it cannot be fitted, ValueError if none can."""
        plan, forecast, spec = self._plan, model.forecast, model.archive.spec
        series = add_known_series(self._columns[target], target, forecast)
        every = plan.gate.rolling.origins(series, [forecast])
        origins = choose_unseen(every, series, [model])
        learnt = self._choose_calibrated(model, series)
        held = origins if not len(learnt) or origins[0] <= learnt[0] else learnt
        before = series.before(series.start + int(held[0]) * series.step)
        unseen = count_unseen(model, series, held)
        by_recipe = unseen is not None and unseen < len(held)
        if not plan.architecture and (spec is None or not spec.architecture):
            what = "only architectures that Fleetcast knows can be retrained as they are; give --architecture"
            raise Unfit(f"{model.name} is a {find_kind(model.archive).kind} archive; {what}")
        architecture, config = plan.architecture, plan.config
        if not architecture and spec is not None:
            architecture, config = spec.architecture, spec.config
        base = plan.name_base(target) or forecast.residual_to or ""
        if plan.architecture or base != (forecast.residual_to or ""):
            series, before = self._add_base(series, base), self._add_base(before, base)
            forecast = rebuild_forecast(forecast, before, architecture, config, base)
        half_life = plan.half_life if plan.half_life is not None else (spec.trained_half_life or 0.0) if spec else 0.0
        fitting = dataclasses.replace(plan.fitting, half_life_days=half_life)
        mark = compute_fingerprint(series, refit_scalers(forecast, series), architecture, config, fitting)
        return RetrainingMarket(
            line, model, series, before, forecast, architecture, config, by_recipe, learnt, fitting, mark
        )

    def _add_base(self, series: Series, base: str) -> Series:
        """Add the column from which deviations are learnt to the covariates, complete. Raises SeriesInvalid."""
        if not base:
            return series
        if base not in series.known_names:
            row = self._columns[series.name][base].values[: len(series.values)]
            known = np.concatenate([series.known, row[None]])
            series = dataclasses.replace(series, known=known, known_names=(*series.known_names, base))
        return series.without_gaps(base)

    def _choose_calibrated(self, model: ArchiveVersion, series: Series) -> Steps:
        """Return the first steps of the windows to calibrate by: none if the market is not calibrated. Raises Unfit."""
        days, old = self._plan.calibrate, model.calibration
        if not days and old is None:
            return np.empty(0, np.int64)
        most = count_windows(days, model.forecast) if days else old.windows if old else 0
        return Rolling(most=most).origins(series, [model.forecast])

    def _settle_group(
        self, group: Sequence[RetrainingMarket], left: set[int]
    ) -> Iterator[tuple[RetrainingMarket, Outcome]]:
        """Judge each market that is left, fit the group to all rows, and publish what has passed."""
        passed: dict[int, Passed] = {}
        for each, fitted in self._fit_group(group, held_back=True):
            if each.line not in left:
                continue
            judged = self._judge_market(each, fitted)
            if isinstance(judged, Outcome):
                yield each, judged
            else:
                passed[each.line] = judged
        if not passed:
            return
        for each, fitted in self._fit_group(group, held_back=False):
            if each.line in passed:
                yield each, self._settle_market(each, fitted, passed[each.line])

    def _watch_fit(self, size: int, architecture: str, *, held_back: bool) -> Progress:
        """Count a fit as half of the work on its markets: the first is judged, the second is what is published."""

        def watch(done: int, steps: int, loss: float) -> None:
            share = (done / max(1, steps) + (not held_back)) / 2
            self._watch(size * share, f"{architecture}, holdout loss {loss:.4f}")

        return watch

    def _fit_group(
        self, group: Sequence[RetrainingMarket], *, held_back: bool
    ) -> Iterator[tuple[RetrainingMarket, Fitted | Exception]]:
        """Fit the group together; if that fails, fit each market alone, so that only the faulty ones fail."""
        first = group[0]
        series = [each.held_back if held_back else each.series for each in group]
        try:
            inputs = [refit_scalers(each.forecast, rows) for each, rows in zip(group, series, strict=True)]
            config, watch = dict(first.config), self._watch_fit(len(group), first.architecture, held_back=held_back)
            fitted = fit_forecasters(series, inputs, first.architecture, config, first.fitting, watch)
        except Exception as error:
            if len(group) == 1:
                yield first, error
                return
            for each in group:
                yield from self._fit_group([each], held_back=held_back)
        else:
            yield from zip(group, fitted, strict=True)

    def _judge_market(self, market: RetrainingMarket, fitted: Fitted | Exception) -> Passed | Outcome:
        """Return the verdict of an archive that passes the gate, with its calibration, else the outcome.

        The gate compares networks without calibration: the new one's would be by the windows that it is judged on.
        """
        target, old = market.series.name, market.predecessor
        if isinstance(fitted, Exception):
            return self._record_failure(target, explain_error(fitted))
        worse = explain_worse(fitted)
        if worse and not self._plan.keep_worse:
            return self._refuse_worse(target, worse)
        try:
            candidate = self._open_fitted(market, fitted)
            before = self._refit_predecessor(market, candidate) if market.by_recipe else old.without_calibration()
            columns = self._columns[target]
            verdict = compare_models(
                self._plan.gate, self._answers, target, columns, candidate, before, recipe=market.by_recipe
            )
            calibrated = self._calibrate(market, candidate) if verdict.passed else None
        except (StoreUnavailable, StoreDenied):
            raise
        except Exception as error:
            return self._record_failure(target, explain_error(error))
        verdict = dataclasses.replace(verdict, notes=(*verdict.notes, *filter(None, [worse])))
        if not verdict.passed:
            return self._make_outcome(market, verdict, "kept", old.version)
        return Passed(verdict, calibrated)

    def _calibrate(self, market: RetrainingMarket, candidate: ArchiveVersion) -> Calibrated | None:
        """Learn offsets from windows that the candidate was not fitted to; None without any. Raises Unfit."""
        if not len(market.calibrated):
            return None
        return calibrate_windows(forecast_windows(self._answers, candidate, market.series, market.calibrated))

    def _open_fitted(self, market: RetrainingMarket, fitted: Fitted) -> ArchiveVersion:
        """Open what was fitted to the rows before the gate's windows. Raises ArchiveInvalid."""
        packed = self._pack_market(market, fitted, market.held_back, "")
        return open_unpublished(packed, market.predecessor.name, self._limits)

    def _refit_predecessor(self, market: RetrainingMarket, candidate: ArchiveVersion) -> ArchiveVersion:
        """Fit the predecessor's recipe, with its own epochs, to the rows before the gate's windows.

        It is the candidate itself if both have one recipe. Raises SeriesInvalid, ArchiveInvalid.
        """
        spec, plan = market.predecessor.archive.spec, self._plan
        assert spec is not None, "it says until when it was trained"
        assert spec.forecast is not None, "it forecasts"
        epochs, half_life = spec.trained_epochs or 0.0, spec.trained_half_life or 0.0
        fitting = dataclasses.replace(plan.fitting, epochs=epochs, half_life_days=half_life)
        same = market.forecast.residual_to == spec.forecast.residual_to and not plan.architecture
        if same and market.fitting == fitting:
            return candidate
        own = add_known_series(self._columns[market.series.name], market.series.name, spec.forecast)
        series = own.before(own.start + len(market.held_back.values) * own.step)
        inputs = [refit_scalers(spec.forecast, series)]
        (fitted,) = fit_forecasters([series], inputs, spec.architecture, dict(spec.config), fitting)
        return self._open_fitted(market, fitted)

    def _settle_market(self, market: RetrainingMarket, fitted: Fitted | Exception, passed: Passed) -> Outcome:
        target = market.series.name
        if isinstance(fitted, Exception):
            return self._record_failure(target, explain_error(fitted))
        if (worse := explain_worse(fitted)) and not self._plan.keep_worse:
            return self._refuse_worse(target, worse)
        try:
            return self._publish_fitted(market, fitted, passed)
        except (StoreUnavailable, StoreDenied):
            raise
        except Exception as error:
            return self._record_failure(target, explain_error(error))

    def _publish_fitted(self, market: RetrainingMarket, fitted: Fitted, passed: Passed) -> Outcome:
        """Publish what was fitted to all rows, unless it is what the store has. Raises LoadError."""
        old, verdict = market.predecessor, passed.verdict
        packed = self._pack_market(market, fitted, market.series, f"; {verdict}", market.fingerprint)
        if passed.calibrated is not None:
            packed = pack_calibrated(open_unpublished(packed, old.name, self._limits).archive, passed.calibrated)
        new = open_unpublished(packed, old.name, self._limits)
        if _have_same_tensors(new.archive.spec, old.archive.spec):
            return Outcome(target=market.series.name, model=old.name, result="unchanged", version=old.version)
        version = self._source.put(old.name, packed)
        return self._make_outcome(market, verdict, "published", version, self._reload_servers(old.name))

    def _make_outcome(
        self,
        market: RetrainingMarket,
        verdict: GateVerdict,
        result: Literal["published", "kept"],
        version: str,
        message: str = "",
    ) -> Outcome:
        return Outcome(
            target=market.series.name,
            model=market.predecessor.name,
            result=result,
            version=version,
            score=verdict.gate.score,
            value=verdict.candidate,
            predecessor=verdict.predecessor,
            worse_percent=round(verdict.worse, 3),
            message=message,
            note="; ".join([*market.series.notes, *verdict.notes]),
            work=self._name_work(market),
        )

    def _reload_servers(self, model: ModelName) -> str:
        """Let the servers reload the archive; returns their errors in words. It stays published in any case."""
        wrong = []
        for url in self._plan.servers:
            try:
                reload_model(url, model, find_token())
            except (FleetcastError, ValueError) as error:
                wrong.append(str(error))
        return "; ".join(wrong)

    def _pack_market(
        self, market: RetrainingMarket, fitted: Fitted, series: Series, note: str, fingerprint: str = ""
    ) -> bytes:
        span = f"{series.stamp(0)} to {series.stamp(len(series.values) - 1)}"
        return pack_model(
            Kind.FORECASTER,
            ArchiveParts(
                tensors=fitted.tensors,
                architecture=fitted.architecture,
                config=fitted.config,
                forecast=fitted.forecast,
                trained_until=series.stamp(len(series.values) - 1),
                trained_epochs=market.fitting.epochs,
                trained_half_life=market.fitting.half_life_days or UNSET,
                fingerprint=fingerprint or UNSET,
            ),
            model_name=market.predecessor.name.rpartition("/")[2].partition(".")[0],
            golden=fitted.golden,
            description=f"trained on {self._plan.csv.name}, {span}{note}",
        )

    def _refuse_worse(self, target: str, why: str) -> Outcome:
        return self._record_failure(target, f"{why}; the old archive stays (--keep-worse publishes it)")

    def _record_failure(self, target: str, message: str) -> Outcome:
        return Outcome(target=target, model=self._plan.names[target], result="failed", message=message)


def read_last_outcomes(log: Path) -> dict[ModelName, Outcome]:
    """Read the last outcome of each archive from the record of earlier runs; lines that are none are left out."""
    found = dict[ModelName, Outcome]()
    if log.exists():
        with log.open("rb") as lines:
            for line in lines:
                try:
                    outcome = msgspec.json.decode(line, type=Outcome)
                except msgspec.MsgspecError:
                    continue
                found[outcome.model] = outcome
    return found


def rebuild_forecast(
    forecast: ForecastSpec, series: Series, architecture: str, config: Mapping[str, Any], residual_to: str = ""
) -> ForecastSpec:
    """Make the recipe for another architecture, or of deviations from another column. Raises ValueError.

    Requests and answers stay the same, but for that column where the series has it as a new covariate.
    """
    options = {
        "scaling": "linear" if forecast.scaler.kind == "linear" else "asinh",
        "unit": forecast.unit,
        "time_zone": forecast.time_zone,
        "levels": forecast.quantile_levels,
        "tail": "exponential" if forecast.tails else "clamp",
        "max_missing": forecast.history.max_missing if forecast.history else None,
        "fallback": bool(forecast.history and forecast.history.fallback),
        "residual_to": residual_to,
    }
    lengths = (forecast.prediction_length, forecast.context_length)
    (made,) = make_recipes([series], architecture, config, *lengths, options)
    origin = made.origin and forecast.origin  # one architecture needs an origin, another answers for any hour
    kept: dict[str, Any] = {"floor": forecast.floor, "cap": forecast.cap, "products": forecast.products}
    if not forecast.tails:
        kept["tail"] = forecast.tail
    return replace(made, origin=origin, **kept)


def group_markets(markets: Sequence[RetrainingMarket]) -> Iterator[Sequence[RetrainingMarket]]:
    """Group markets that can be fitted together.

    INVARIANT: groups do not depend on which markets are done, because the results of fits depend on the group.
    """
    kinds: dict[str, list[RetrainingMarket]] = {}
    for each in markets:
        kinds.setdefault(each.kin, []).append(each)
    for kin in kinds.values():
        yield from (kin[at : at + GROUP] for at in range(0, len(kin), GROUP))


def _have_same_tensors(new: Spec | None, old: Spec | None) -> bool:
    """Return whether both have the same tensors, recipe and calibration, so that nothing needs to be published."""
    if new is None or old is None:
        return False
    return (new.weights, new.forecast, new.calibration) == (old.weights, old.forecast, old.calibration)
