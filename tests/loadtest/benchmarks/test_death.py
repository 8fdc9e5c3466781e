"""What the bench of a worker's death says of its requests."""

from loadtest.benchmarks.death import Outcome, summarise_span


def test_a_span_has_what_was_due_in_it_around_any_death() -> None:
    """Requests count by when they were due, not by when they were answered; a span without any says so."""
    outcomes = [Outcome(9.5, 0.001, ""), Outcome(10.0, 0.3, ""), Outcome(10.9, 0.1, ""), Outcome(20.2, 0.2, "")]
    assert summarise_span(outcomes, [10.0, 20.0], 0.0, 1.0) == {
        "requests": 3, "p50_ms": 200.0, "p99_ms": 298.0, "max_ms": 300.0,
    }  # fmt: skip
    assert summarise_span(outcomes, [10.0], -1.0, 0.0)["max_ms"] == 1.0
    assert summarise_span(outcomes, [50.0], 0.0, 1.0)["requests"] == 0
