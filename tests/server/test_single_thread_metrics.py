"""The metrics of one thread: what is scraped is what prometheus_client would show of the same counts."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from server.contract import METRIC_PREFIX, MetricSpec
from server.single_thread_metrics import EXAMPLES, MOST_ID_BYTES, SLOW_S, CounterFamily, HistogramFamily

SPEC = MetricSpec("counter", "things", "What is counted.", ("kind",))
TIMES = MetricSpec("histogram", "times", "What it took.", ("kind",))
BOUNDS = (0.001, 0.25, 1, 30)
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100))


@pytest.mark.slow
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


def test_the_first_the_slow_and_a_few_others_are_examples() -> None:
    """Of each bucket the first request; of slow ones the last; of quick ones one in 1,024; long ids are cut."""
    times = HistogramFamily(TIMES, (0.001, SLOW_S, 1))
    series = times.labels("a")
    for i in range(EXAMPLES):
        series.observe_request(0.0005, b"quick-%d" % i)
    series.observe_request(0.0007, b"later")
    for i in range(3):
        series.observe_request(0.5, b"slow-%d" % i + b"x" * 200)
    series.observe_request(0.01, b"")
    found = {labels["le"]: example for labels, example in times.list_examples()}
    assert {le: example.request_id[:6] for le, example in found.items()} == {"0.001": b"later", "1.0": b"slow-2"}
    assert (found["0.001"].value, len(found["1.0"].request_id)) == (0.0007, MOST_ID_BYTES)


@given(amounts=st.lists(st.integers(1, 3000), max_size=8))
def test_answers_of_a_request_are_counted_together(amounts: Sequence[int]) -> None:
    """What is counted, and which request is the example, is as if each answer were counted by itself."""
    at_once, one_by_one = HistogramFamily(TIMES, BOUNDS), HistogramFamily(TIMES, BOUNDS)
    value = BOUNDS[0] / 2
    for i, amount in enumerate(amounts):
        at_once.labels("a").observe_request(value, b"request-%d" % i, amount)
        for _ in range(amount):
            one_by_one.labels("a").observe_request(value, b"request-%d" % i)
    examples = [[each.request_id for _, each in family.list_examples()] for family in (at_once, one_by_one)]
    assert examples[0] == examples[1]
    (found,), (wanted,) = at_once.collect(), one_by_one.collect()
    for one, other in zip(found.samples, wanted.samples, strict=True):
        assert (one.name, one.labels) == (other.name, other.labels)
        assert one.value == pytest.approx(other.value)


@given(values=st.lists(VALUES))
def test_requests_are_counted_as_other_values_are(values: Sequence[float]) -> None:
    """With an id or without."""
    requests, others = HistogramFamily(TIMES, BOUNDS), HistogramFamily(TIMES, BOUNDS)
    for i, value in enumerate(values):
        requests.labels("a").observe_request(value, b"id" * (i % 2))
        others.labels("a").observe(value)
    (found,), (wanted,) = requests.collect(), others.collect()
    assert found.samples == wanted.samples
