"""What handlers measure by `context.metrics`: kept until the next batch's answer takes it to the worker. In a child.

It has the methods that TorchServe 0.12 and Multi Model Server 1.1 document. Both write a line for each measurement,
which any `print` can forge; here measurements travel beside the answers, and a printed line is a line of the log.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from server.code_messages import (
    MAX_MEASURES,
    MEASURE_LABEL,
    MEASURE_LABELS,
    MEASURE_NAME,
    MEASURE_TEXT,
    Measure,
)

COUNTER, GAUGE, HISTOGRAM = KINDS = ("counter", "gauge", "histogram")
LEVEL, MODEL, ERROR = "Level", "Model", "Error"
ModelMetrics = Mapping[str, Sequence[Mapping[str, Any]]]


class HandlerMetrics:
    """See the module. `is_mms`: `add_metric` takes its arguments in Multi Model Server's order."""

    def __init__(self, *, is_mms: bool = False) -> None:
        self.cache: dict[str, dict[str, HandlerMetric]] = {kind: {} for kind in KINDS}
        self.store: list[Any] = []
        self.request_ids: Any = None
        self.model_name = ""
        self._pending: dict[object, Measure] = {}
        self._dropped = 0
        if is_mms:
            self.add_metric: Callable[..., None] = self._add_as_mms
        else:
            self.add_metric = self._add_as_torchserve

    def __repr__(self) -> str:
        """For example `<HandlerMetrics 2 wait>`."""
        return f"<HandlerMetrics {len(self._pending)} wait>"

    def take(self) -> list[Measure]:
        """What was measured since the last call."""
        if not self._pending:
            return []
        found, self._pending = list(self._pending.values()), {}
        if self._dropped:
            print(f"{self._dropped} measurements of one batch were dropped: {MAX_MEASURES} are kept", file=sys.stderr)  # noqa: T201
            self._dropped = 0
        return found

    def declare(self, metrics: ModelMetrics) -> None:
        """Know the metrics of the part `model_metrics` of a metrics.yaml, for `get_metric`."""
        for kind, listed in metrics.items():
            for each in listed:
                names = [str(name) for name in each.get("dimensions", ())]
                self.add_metric_to_cache(str(each["name"]), str(each.get("unit", "")), names, kind)

    def set_request_ids(self, request_ids: Any) -> None:
        """Part of the interface: the ids are in the server's log."""
        self.request_ids = request_ids

    def add_counter(self, name: str, value: float, idx: Any = None, dimensions: Iterable[Any] | None = None) -> None:
        """Add to a counter."""
        del idx
        self._note(name, COUNTER, value, _read_dimensions(dimensions))

    def add_time(
        self,
        name: str,
        value: float,
        idx: Any = None,
        unit: str = "ms",
        dimensions: Iterable[Any] | None = None,
        metric_type: Any = GAUGE,
    ) -> None:
        """Note a time."""
        del idx, unit
        self._note(name, metric_type, value, _read_dimensions(dimensions))

    def add_size(
        self,
        name: str,
        value: float,
        idx: Any = None,
        unit: str = "MB",
        dimensions: Iterable[Any] | None = None,
        metric_type: Any = GAUGE,
    ) -> None:
        """Note a size."""
        del idx, unit
        self._note(name, metric_type, value, _read_dimensions(dimensions))

    def add_percent(
        self,
        name: str,
        value: float,
        idx: Any = None,
        dimensions: Iterable[Any] | None = None,
        metric_type: Any = GAUGE,
    ) -> None:
        """Note a share."""
        del idx
        self._note(name, metric_type, value, _read_dimensions(dimensions))

    def add_error(self, name: str, value: Any, dimensions: Iterable[Any] | None = None) -> None:
        """Count an error. Multi Model Server's is a text: it counts as one."""
        number = value if isinstance(value, int | float) else 1
        self._note(name, COUNTER, number, {LEVEL: ERROR, **_read_dimensions(dimensions)})

    def get_metric(self, metric_name: str, metric_type: Any = COUNTER) -> "HandlerMetric":
        """A metric that was declared or added to the cache. Raises TorchServe's MetricsCacheKeyError, or KeyError."""
        found = self.cache.get(_read_kind(metric_type), {}).get(metric_name)
        if found is None:
            raise _find_key_error()(
                f"{metric_name} is no {_read_kind(metric_type)} of the server's code_metrics file, and "
                "add_metric_to_cache was not called for it"
            )
        return found

    def add_metric_to_cache(
        self, metric_name: str, unit: str = "", dimension_names: Sequence[str] = (), metric_type: Any = COUNTER
    ) -> "HandlerMetric":
        """A metric of which values can be noted."""
        kind = _read_kind(metric_type)
        found = HandlerMetric(metric_name, unit, list(dimension_names), kind, self._note)
        if len(self.cache[kind]) < MAX_MEASURES or metric_name in self.cache[kind]:
            self.cache[kind][metric_name] = found
        return found

    def _add_as_torchserve(
        self,
        name: str,
        value: float,
        unit: str = "",
        idx: Any = None,
        dimensions: Iterable[Any] | None = None,
        metric_type: Any = COUNTER,
    ) -> None:
        del unit, idx
        self._note(name, metric_type, value, _read_dimensions(dimensions))

    def _add_as_mms(
        self, name: str, value: float, idx: Any = None, unit: str = "", dimensions: Iterable[Any] | None = None
    ) -> None:
        del unit, idx
        self._note(name, GAUGE, value, _read_dimensions(dimensions))

    def _note(self, name: str, metric_type: Any, value: Any, labels: dict[str, str]) -> None:
        """Keep a value: counters of one batch are summed, of a gauge the last counts. What is no number is told."""
        kind = _read_kind(metric_type)
        number = float(value) if isinstance(value, int | float) or hasattr(value, "__float__") else math.nan
        if not math.isfinite(number) or (kind == COUNTER and number < 0):
            print(f"metric {str(name)[:MEASURE_NAME]}: {value!r:.80} is no value of a {kind}", file=sys.stderr)  # noqa: T201
            return
        labels.setdefault(LEVEL, MODEL)
        measure = _make_measure(str(name), kind, labels, number)
        key: object = len(self._pending) if kind == HISTOGRAM else (kind, measure.name, *sorted(measure.labels.items()))
        before = self._pending.get(key)
        if before is None and len(self._pending) >= MAX_MEASURES:
            self._dropped += 1
            return
        if before is not None and kind == COUNTER:
            measure = Measure(measure.name, kind, measure.labels, before.value + number)
        self._pending[key] = measure


class HandlerMetric:
    """One metric as `get_metric` and `add_metric_to_cache` give it."""

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: list[str],
        metric_type: str,
        note: Callable[[str, str, Any, dict[str, str]], None],
    ) -> None:
        self.metric_name, self.unit, self.dimension_names, self.metric_type = (
            metric_name, unit, dimension_names, metric_type,
        )  # fmt: skip
        self._note = note

    def __repr__(self) -> str:
        """For example `<HandlerMetric counter Asked>`."""
        return f"<HandlerMetric {self.metric_type} {self.metric_name}>"

    def add_or_update(self, value: Any, dimension_values: Sequence[Any] = (), request_id: str = "") -> None:
        """Note a value. Other values than there are dimensions are told, and not kept, as TorchServe has it."""
        del request_id
        if len(dimension_values) != len(self.dimension_names):
            told = f"metric {self.metric_name}: dimensions {self.dimension_names} need as many values"
            print(told, file=sys.stderr)  # noqa: T201
            return
        pairs = zip(self.dimension_names, dimension_values, strict=True)
        self._note(self.metric_name, self.metric_type, value, {name: str(each) for name, each in pairs})

    def update(self, value: Any, request_id: str = "", dimensions: Iterable[Any] | None = None) -> None:
        """Note a value with dimensions of its own."""
        del request_id
        self._note(self.metric_name, self.metric_type, value, _read_dimensions(dimensions))


def _read_kind(metric_type: Any) -> str:
    """`counter`, `gauge` or `histogram`, of these words or of a member of TorchServe's MetricTypes."""
    kind = str(getattr(metric_type, "value", metric_type)).lower()
    if kind not in KINDS:
        raise ValueError(f"a metric is of type {', '.join(KINDS)}, and not {kind[:80]!r}")
    return kind


def _read_dimensions(dimensions: Iterable[Any] | None) -> dict[str, str]:
    """Name -> value of TorchServe's and Multi Model Server's `Dimension`s."""
    return {str(each.name): str(each.value) for each in dimensions or ()}


def _make_measure(name: str, kind: str, labels: Mapping[str, str], value: float) -> Measure:
    """As the worker takes it: too long names and texts are cut, and too many labels left out."""
    kept = list(labels.items())[:MEASURE_LABELS]
    short = {each[:MEASURE_LABEL]: text[:MEASURE_TEXT] for each, text in kept}
    return Measure(name[:MEASURE_NAME], kind, short, value)


def _find_key_error() -> type[Exception]:
    """TorchServe's own error where its package has been imported: handlers catch it."""
    if "ts" not in sys.modules:
        return KeyError
    try:
        found = importlib.import_module("ts.metrics.metric_cache_errors").MetricsCacheKeyError
    except (ImportError, AttributeError):
        return KeyError
    return found if isinstance(found, type) and issubclass(found, Exception) else KeyError
