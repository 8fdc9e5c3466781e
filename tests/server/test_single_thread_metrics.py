"""The metrics of one thread: what is scraped is what prometheus_client would show of the same counts."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from server.contract import METRIC_PREFIX, MetricSpec
from server.single_thread_metrics import CounterFamily, HistogramFamily

SPEC = MetricSpec("counter", "things", "What is counted.", ("kind",))
TIMES = MetricSpec("histogram", "times", "What it took.", ("kind",))
BOUNDS = (0.001, 0.25, 1, 30)
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100))


@given(counted=st.lists(st.tuples(st.sampled_from(["a", 'b "c"', "ü"]), VALUES)), common=st.booleans())
def test_what_is_scraped_is_the_librarys(counted: Sequence[tuple[str, float]], common: bool) -> None:
    """Of several series, values on a bucket's bound too, with labels of the process and without."""
    names, values = (("worker",), ("3",)) if common else ((), ())
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts, times = CounterFamily(SPEC, names), HistogramFamily(TIMES, BOUNDS, names)
    labels = (*names, *SPEC.labels)
    ours.register(counts)
    ours.register(times)
    count = Counter(METRIC_PREFIX + SPEC.name, SPEC.help, labels, registry=None)
    histogram = Histogram(METRIC_PREFIX + TIMES.name, TIMES.help, labels, registry=None, buckets=BOUNDS)
    theirs.register(count)
    theirs.register(histogram)
    for kind, value in counted:
        counts.labels(*values, kind).inc(value)
        times.labels(*values, kind).observe(value)
        count.labels(*values, kind).inc(value)
        histogram.labels(*values, kind).observe(value)
    assert sorted(generate_latest(ours).splitlines()) == sorted(generate_latest(theirs).splitlines())


def test_labels_are_checked() -> None:
    """A series without the value of a label would be scraped under another's name."""
    with pytest.raises(ValueError, match=r"has the labels \('worker', 'kind'\)"):
        CounterFamily(SPEC, ("worker",)).labels("a")
