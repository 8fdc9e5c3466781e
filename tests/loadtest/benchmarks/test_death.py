"""What the bench of a worker's death says of its requests."""

import datetime as dt
import json

from loadtest.benchmarks.death import Outcome, find_stages, summarise_span


def test_a_span_has_what_was_due_in_it_around_any_death() -> None:
    """Requests count by when they were due, not by when they were answered; a span without any says so."""
    outcomes = [Outcome(9.5, 0.001, ""), Outcome(10.0, 0.3, ""), Outcome(10.9, 0.1, ""), Outcome(20.2, 0.2, "")]
    assert summarise_span(outcomes, [10.0, 20.0], 0.0, 1.0) == {
        "requests": 3, "p50_ms": 200.0, "p99_ms": 298.0, "max_ms": 300.0,
    }  # fmt: skip
    assert summarise_span(outcomes, [10.0], -1.0, 0.0)["max_ms"] == 1.0
    assert summarise_span(outcomes, [50.0], 0.0, 1.0)["requests"] == 0


def test_a_start_is_that_of_the_worker_after_the_death() -> None:
    """Events before the death or of other kinds are passed over; what was not said is left out."""
    at = 1_790_000_000.0

    def say(event: str, later_ms: float, **more: object) -> str:
        when = dt.datetime.fromtimestamp(at + later_ms / 1e3, dt.UTC).isoformat().replace("+00:00", "Z")
        return json.dumps({"event": event, "timestamp": when, **more})

    lines = [
        say("worker_ready", -500.0, stages_ms={"adopt": 1.0}), "no JSON", say("restarting", 10.0), say("ended", 20.0),
        say("worker_ready", 90.0, stages_ms={"adopt": 30.0}),
    ]  # fmt: skip
    assert find_stages(lines, [at, at + 1.0]) == [
        {"noticed_ms": 20.0, "ready_ms": 90.0, "stages_ms": {"adopt": 30.0}}, {},
    ]  # fmt: skip
