"""What `/metrics` shows of archives' code: what handlers measure, and TorchServe's own times. On the step thread.

A handler may say any name, and any labels: both are bounded here, and neither can be one of the server's own. The
label ModelName is always the archive's key without its `.mar`, so that no archive writes another's series. The series
of a model go when it leaves memory.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UntypedMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from model_store.cache.slots import Slot
from model_store.names import ModelName, split_version
from server.code_messages import Measure
from server.contract import METRIC_PREFIX
from server.single_thread_metrics import LoopHistogram
from server.worker.sandbox.replicas import Replicas

MOST_PER_MODEL, MOST_SERIES, MOST_NAMES = 50, 1000, 200
#: TorchServe's histograms have the buckets of Prometheus's client.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
#: Names that a handler's metric cannot have: the server shows these itself.
SERVERS_OWN = frozenset(
    {
        "QueueTime", "WorkerThreadTime", "WorkerLoadTime", "PredictionTime", "Requests2XX", "Requests4XX",
        "Requests5XX", "CPUUtilization", "MemoryUsed", "MemoryAvailable", "MemoryUtilization", "DiskUsage",
        "DiskAvailable", "DiskUtilization",
    }
)  # fmt: skip
SERVERS_PREFIXES = (METRIC_PREFIX, "ts_", "process_", "python_")
FORCED = ("ModelName", "Hostname")
_NAME, _LABEL = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*"), re.compile(r"[A-Za-z][A-Za-z0-9_]*")

log = structlog.get_logger()

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class ModelSeries:
    """What is shown of one model. `prediction_ms`: of its last batch."""

    prediction_ms: float = 0.0
    values: dict[tuple[str, Labels], float | LoopHistogram] = field(default_factory=dict)
    told: bool = False  #: whether the log says that something of it is not shown


class CodeMeasures(Collector):
    """See the module. `children`: the processes of each archive, for the time that their loads took."""

    def __init__(self, children: Mapping[Slot, Replicas], hostname: str) -> None:
        self._children, self._hostname = children, hostname
        self._models: dict[ModelName, ModelSeries] = {}
        self._kinds: dict[str, str] = {}
        self._series = 0
        self._queue_ms = self._thread_ms = 0.0

    def __repr__(self) -> str:
        """For example `<CodeMeasures 12 series of 3 models>`."""
        return f"<CodeMeasures {self._series} series of {len(self._models)} models>"

    def note_batch(
        self, model: ModelName, measures: Sequence[Measure], *, queued_s: float, ran_s: float, own_s: float
    ) -> None:
        """A batch has been answered. `own_s`: what it took of this worker beside the archive's process."""
        self._queue_ms, self._thread_ms = queued_s * 1e3, own_s * 1e3
        shown = self._models.get(model)
        if shown is None:
            shown = self._models[model] = ModelSeries()
        shown.prediction_ms = ran_s * 1e3
        for measure in measures:
            why = self._keep(shown, measure)
            if why and not shown.told:
                shown.told = True
                log.warning("metric_not_shown", model=model, metric=measure.name, why=why)

    def drop(self, model: ModelName) -> None:
        """The model has left memory."""
        shown = self._models.pop(model, None)
        if shown is None or not shown.values:
            return
        self._series -= len(shown.values)
        names = {name for each in self._models.values() for name, _ in each.values}
        self._kinds = {name: kind for name, kind in self._kinds.items() if name in names}

    def _keep(self, shown: ModelSeries, measure: Measure) -> str:
        """Take a measurement; else why it is not shown."""
        if why := _refuse(measure):
            return why
        if self._kinds.get(measure.name, measure.kind) != measure.kind:
            return f"it is a {self._kinds[measure.name]} of another archive or of this one"
        labels = tuple(sorted((name, text) for name, text in measure.labels.items() if name not in FORCED))
        series = measure.name, labels
        value = shown.values.get(series)
        if value is None:
            if len(shown.values) >= MOST_PER_MODEL or self._series >= MOST_SERIES:
                return f"a model has {MOST_PER_MODEL} series of its own, all of a worker have {MOST_SERIES}"
            if measure.name not in self._kinds and len(self._kinds) >= MOST_NAMES:
                return f"the models of a worker have {MOST_NAMES} metrics"
            self._kinds[measure.name] = measure.kind
            self._series += 1
            value = shown.values[series] = LoopHistogram(BUCKETS) if measure.kind == HISTOGRAM else 0.0
        if isinstance(value, LoopHistogram):
            value.observe(measure.value)
        else:
            shown.values[series] = measure.value + (value if measure.kind == COUNTER else 0.0)
        return ""

    def collect(self) -> Iterator[Metric]:
        """The families; none while no code has answered or is loaded."""
        yield from self._collect_loads()
        if self._models:
            yield self._show("QueueTime", "Time that the last batch waited (ms).", self._queue_ms)
            text = "Time that the last batch took of the worker beside the archive's process (ms)."
            yield self._show("WorkerThreadTime", text, self._thread_ms)
            labels = ("Hostname", "Level", "ModelName")
            prediction = GaugeMetricFamily("PredictionTime", "Time of the model's last batch (ms).", labels=labels)
            for model, shown in self._models.items():
                prediction.add_metric((self._hostname, "Model", _show_name(model)), shown.prediction_ms)
            yield prediction
        yield from self._collect_handlers()

    def _collect_loads(self) -> Iterator[Metric]:
        loads = GaugeMetricFamily(
            "WorkerLoadTime", "Time in which the process was loaded (ms).", labels=("WorkerName", "Level", "Hostname")
        )
        for slot, replicas in self._children.items():
            for child in replicas.children:
                name = f"W-{child.pid}-{_show_name(slot.model)}"
                loads.add_metric((name, "Host", self._hostname), child.load_s * 1e3)
        if loads.samples:
            yield loads

    def _collect_handlers(self) -> Iterator[Metric]:
        """A family for each name and set of labels, since labels of one name may differ between archives."""
        families: dict[tuple[str, tuple[str, ...]], Metric] = {}
        for model, shown in self._models.items():
            for (name, pairs), value in shown.values.items():
                labels = dict(pairs) | {"ModelName": _show_name(model), "Hostname": self._hostname}
                place = name, tuple(labels)
                family = families.get(place)
                if family is None:
                    family = families[place] = _make_family(name, self._kinds[name], tuple(labels))
                if isinstance(value, LoopHistogram):
                    assert isinstance(family, HistogramMetricFamily), "a name has one kind"
                    value.add_to(family, tuple(labels.values()))
                else:
                    assert isinstance(family, CounterMetricFamily | GaugeMetricFamily | UntypedMetricFamily)
                    family.add_metric(tuple(labels.values()), value)
        yield from _merge(families.values())

    def _show(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=("Level", "Hostname"))
        gauge.add_metric(("Host", self._hostname), value)
        return gauge


def _refuse(measure: Measure) -> str:
    """Why a measurement cannot be shown; empty where it can."""
    name = measure.name
    if _NAME.fullmatch(name) is None or not all(map(_LABEL.fullmatch, measure.labels)):
        return "a metric's name, and the names of its dimensions, have letters, digits and underscores"
    if name in SERVERS_OWN or name.startswith(SERVERS_PREFIXES):
        return "the server has a metric of this name itself"
    if not math.isfinite(measure.value) or (measure.kind == COUNTER and measure.value < 0):
        return "its value is no number that such a metric may have"
    return ""


def _make_family(name: str, kind: str, labels: tuple[str, ...]) -> Metric:
    """The family: a counter without `_total` in its name is shown without a type, since clients write that name."""
    text = f"A {kind} of handlers."
    if kind == HISTOGRAM:
        return HistogramMetricFamily(name, text, labels=labels)
    if kind == GAUGE:
        return GaugeMetricFamily(name, text, labels=labels)
    if name.endswith("_total"):
        return CounterMetricFamily(name.removesuffix("_total"), text, labels=labels)
    return UntypedMetricFamily(name, text, labels=labels)


def _merge(families: Iterable[Metric]) -> Iterator[Metric]:
    """One family of each name."""
    merged: dict[str, Metric] = {}
    for family in families:
        if family.name in merged:
            merged[family.name].samples += family.samples
        else:
            merged[family.name] = family
    return iter(merged.values())


def _show_name(model: ModelName) -> str:
    return split_version(model)[0].removesuffix(".mar")
