"""Counters and histograms in which one thread of a process counts, for what is counted with every request.

They show what prometheus_client's show and count in a tenth of the time or less: those take a lock and check their
state at each call, one to two microseconds, and a request is counted in nine of them.

INVARIANT: only the thread of the process's event loop calls `inc`, `observe`, `labels` and `collect`.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.contract import METRIC_PREFIX, MetricSpec

SLOW_S = 0.1  #: from here on each request is its bucket's example
EXAMPLES = 1024  #: of a bucket's requests one in as many is an example too, beginning with the first
TRACED_S = 300.0  #: for which an example with a trace is kept from those without
MOST_ID_BYTES = 100  #: of a request's id; OpenMetrics allows an exemplar 128 characters


class LoopCounter:
    """One series of a counter."""

    def __init__(self) -> None:
        self.value = 0.0

    def __repr__(self) -> str:
        """For example `<LoopCounter 12.0>`."""
        return f"<LoopCounter {self.value}>"

    def inc(self, amount: float = 1.0) -> None:
        """Add to it; `amount` is not negative."""
        self.value += amount


class BucketExample(NamedTuple):
    """One request of a bucket: its id, how long it took, and the Unix time at which it was counted.

    `trace_id`: of its trace, where it was sampled.
    """

    request_id: bytes
    value: float
    at: float
    trace_id: str = ""


class LoopHistogram:
    """One series of a histogram. `bounds`: the buckets' upper bounds, ascending, without infinity.

    `examples`: the latest by the bucket's place, of what `observe_request` keeps.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0
        self.examples: dict[int, BucketExample] = {}

    def __repr__(self) -> str:
        """For example `<LoopHistogram of 12 values>`."""
        return f"<LoopHistogram of {sum(self._counts)} values>"

    def observe(self, value: float, count: int = 1) -> None:
        """Count so many equal values in the first bucket whose bound is not below them."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def observe_request(self, value: float, request_id: bytes, answers: int = 1) -> None:
        """Count the seconds of a request for each of its answers.

        The slow ones, and a few of the others, become their bucket's example.
        """
        at = bisect_left(self._bounds, value)
        before = self._counts[at] - 1
        self._counts[at] += answers
        self._sum += value * answers
        if (value >= SLOW_S or (before + answers) // EXAMPLES > before // EXAMPLES) and request_id:
            self._keep(at, BucketExample(request_id[:MOST_ID_BYTES], value, time.time()))

    def show_trace(self, value: float, request_id: bytes, trace_id: str) -> None:
        """Make a request that is counted already, and traced, its bucket's example."""
        at = bisect_left(self._bounds, value)
        self.examples[at] = BucketExample(request_id[:MOST_ID_BYTES], value, time.time(), trace_id)

    def _keep(self, at: int, example: BucketExample) -> None:
        """Let an example take the place of the one before, unless that has a trace to look at and is not old."""
        held = self.examples.get(at)
        if held is None or not held.trace_id or example.at - held.at > TRACED_S:
            self.examples[at] = example

    def name_bucket(self, at: int) -> str:
        """The label `le` of the bucket at this place."""
        bound = self._bounds[at] if at < len(self._bounds) else float("inf")
        name: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
        return name

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add the series with these labels' values to what a scrape gets."""
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), float(total)))  # type: ignore[no-untyped-call]
        family.add_metric(labels, buckets, self._sum)


Series = TypeVar("Series", LoopCounter, LoopHistogram)


class _Family(Collector, Generic[Series]):
    """The series of one metric by their labels' values. `make`: a new series."""

    def __init__(self, spec: MetricSpec, common: Sequence[str], make: Callable[[], Series]) -> None:
        self._name, self._help, self.label_names = METRIC_PREFIX + spec.name, spec.help, (*common, *spec.labels)
        self._series: dict[tuple[str, ...], Series] = {}
        self._make: Callable[[], Series] = make

    def __repr__(self) -> str:
        """For example `<CounterFamily fleetcast_requests: 3 series>`."""
        return f"<{type(self).__name__.lstrip('_')} {self._name}: {len(self._series)} series>"

    def labels(self, *values: str) -> Series:
        """The series with these labels' values, in the order of the labels; to be kept, since finding it takes time."""
        if len(values) != len(self.label_names):
            raise ValueError(f"{self._name} has the labels {self.label_names}, not {values}")
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = self._make()
        return series


class CounterFamily(_Family[LoopCounter]):
    """A counter's series. `common`: names of labels before those that the metric itself has."""

    def __init__(self, spec: MetricSpec, common: Sequence[str] = ()) -> None:
        super().__init__(spec, common, LoopCounter)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        family = CounterMetricFamily(self._name, self._help, labels=self.label_names)
        for labels, series in self._series.items():
            family.add_metric(labels, series.value)
        yield family


class HistogramFamily(_Family[LoopHistogram]):
    """A histogram's series. `bounds`: the buckets' upper bounds, ascending, without infinity."""

    def __init__(self, spec: MetricSpec, bounds: Sequence[float], common: Sequence[str] = ()) -> None:
        super().__init__(spec, common, lambda: LoopHistogram(bounds))

    def list_examples(self) -> Iterator[tuple[dict[str, str], BucketExample]]:
        """The examples of all series, with the labels of their buckets."""
        for labels, series in self._series.items():
            named = dict(zip(self.label_names, labels, strict=True))
            for at, example in series.examples.items():
                yield {**named, "le": series.name_bucket(at)}, example

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        family = HistogramMetricFamily(self._name, self._help, labels=self.label_names)
        for labels, series in self._series.items():
            series.add_to(family, labels)
        yield family
