"""Which requests are traced: every sampler of OpenTelemetry's, and a bound that none exceeds."""

import pytest

from server.front.tracing.sampling import SAMPLERS, Sampler, TraceBudget, read_sampler
from server.front.tracing.trace_context import TraceParent

LOW, HIGH = "f" * 16 + "0" * 15 + "1", "0" * 16 + "f" * 16
SAMPLED, UNSAMPLED = (TraceParent(LOW, "1" * 16, is_sampled=sampled) for sampled in (True, False))


@pytest.mark.parametrize(
    ("name", "argument", "without_parent", "sampled", "unsampled"),
    [
        ("always_on", "", True, True, True),
        ("always_off", "", False, False, False),
        ("parentbased_always_on", "", True, True, False),
        ("parentbased_always_off", "", False, True, False),
        ("parentbased_traceidratio", "0", False, True, False),
        ("traceidratio", "0", False, False, False),
        ("traceidratio", "1", True, True, True),
        ("traceidratio", "", True, True, True),
    ],
)
def test_each_sampler_decides_as_its_name_says(
    name: str, argument: str, without_parent: bool, sampled: bool, unsampled: bool
) -> None:
    """Those that follow the parent do so whatever their share is."""
    sampler = read_sampler(name, argument)
    assert sampler.wants(None, HIGH) is without_parent
    assert sampler.wants(SAMPLED, LOW) is sampled
    assert sampler.wants(UNSAMPLED, LOW) is unsampled


def test_a_share_is_of_the_traces_ids() -> None:
    """The lower half of the id decides, as in other parts of a system, so that all decide alike."""
    half = Sampler(follows_parent=False, ratio=0.5)
    assert half.wants(None, LOW)
    assert not half.wants(None, HIGH)
    tenth = Sampler(follows_parent=False, ratio=0.1)
    ids = [f"{0:016x}{i * (2**64 // 1000):016x}" for i in range(1000)]
    assert sum(tenth.wants(None, each) for each in ids) in (100, 101)


@pytest.mark.parametrize(("name", "argument"), [("jaeger_remote", ""), ("traceidratio", "2"), ("traceidratio", "x")])
def test_a_wrong_sampler_is_an_error_that_says_so(name: str, argument: str) -> None:
    """It names the variable."""
    with pytest.raises(ValueError, match="OTEL_TRACES_SAMPLER"):
        read_sampler(name, argument)


def test_a_budget_bounds_traces_in_the_long_run() -> None:
    """A burst at first, then as many as time allows; idle time saves no more than the burst."""
    clock = [0.0]
    budget = TraceBudget(2.0, lambda: clock[0])
    assert sum(budget.take() for _ in range(100)) == 10
    clock[0] += 1.0
    assert sum(budget.take() for _ in range(100)) == 2
    clock[0] += 1000.0
    assert sum(budget.take() for _ in range(100)) == 10
    slow = TraceBudget(0.1, lambda: clock[0])
    assert [slow.take(), slow.take()] == [True, False]


def test_all_samplers_of_the_specification_that_need_no_server_are_there() -> None:
    """By their names."""
    assert len(SAMPLERS) == 6
