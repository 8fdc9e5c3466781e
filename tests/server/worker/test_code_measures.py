"""What of archives' measurements is shown, without a server."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from model_store.names import ModelName
from server.code_messages import Measure
from server.worker.code_measures import MOST_NAMES, MOST_PER_MODEL, MOST_SERIES, CodeMeasures

A, B = ModelName("a.mar"), ModelName("b.mar")


def note(measures: CodeMeasures, model: ModelName, *found: Measure) -> None:
    """A batch of the model that has measured this."""
    measures.note_batch(model, found, queued_s=0.001, ran_s=0.002, own_s=0.003)


def show(measures: CodeMeasures) -> list[str]:
    """The exposition's series."""
    registry = CollectorRegistry()
    registry.register(measures)
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def count(measures: CodeMeasures, prefix: str) -> int:
    """Series whose names begin so."""
    return sum(line.startswith(prefix) for line in show(measures))


def test_counters_add_gauges_replace_histograms_count() -> None:
    """Over batches; times of TorchServe's are those of the last batch."""
    measures = CodeMeasures({}, "h")
    for value in (2.0, 0.5):
        found = (
            Measure("c", "counter", {}, value),
            Measure("g", "gauge", {}, value),
            Measure("t", "histogram", {}, value),
        )
        note(measures, A, *found)
    shown = show(measures)
    labels = '{Hostname="h",ModelName="a"}'
    assert f"c{labels} 2.5" in shown
    assert f"g{labels} 0.5" in shown
    assert f"t_count{labels} 2.0" in shown
    assert f"t_sum{labels} 2.5" in shown
    assert 't_bucket{Hostname="h",ModelName="a",le="0.5"} 1.0' in shown
    assert 'QueueTime{Hostname="h",Level="Host"} 1.0' in shown
    assert 'PredictionTime{Hostname="h",Level="Model",ModelName="a"} 2.0' in shown
    assert 'WorkerThreadTime{Hostname="h",Level="Host"} 3.0' in shown


def test_no_archive_writes_anothers_series_or_the_servers() -> None:
    """The model's name is not the handler's to say, nor are the server's names, nor another type for a name."""
    measures = CodeMeasures({}, "h")
    note(measures, A, Measure("c", "counter", {"ModelName": "b", "Hostname": "other"}, 1.0))
    note(measures, B, Measure("c", "gauge", {}, 5.0))
    for name in ("fleetcast_x", "ts_inference_requests_total", "PredictionTime", "MemoryUsed", "a b", "1a", ""):
        note(measures, A, Measure(name, "counter", {}, 1.0))
    note(measures, A, Measure("d", "counter", {"__name__": "c"}, 1.0), Measure("d", "counter", {}, float("nan")))
    note(measures, A, Measure("d", "counter", {}, -1.0))
    shown = show(measures)
    assert [line for line in shown if line[0] in "cd"] == ['c{Hostname="h",ModelName="a"} 1.0']
    assert not any(line.startswith(("fleetcast_x", "ts_inference", "MemoryUsed")) for line in shown)


def test_series_are_bounded_per_model_and_in_all_and_go_with_their_model() -> None:
    """A label that is different each time costs its own model alone, and so many models cost no more than the limit."""
    measures = CodeMeasures({}, "h")
    for i in range(3 * MOST_PER_MODEL):
        note(measures, A, Measure("c", "counter", {"id": str(i)}, 1.0))
    note(measures, B, Measure("c", "counter", {}, 1.0))
    assert (count(measures, 'c{Hostname="h",ModelName="a"'), count(measures, 'c{Hostname="h",ModelName="b"')) == (
        MOST_PER_MODEL,
        1,
    )
    for i in range(2 * MOST_SERIES // MOST_PER_MODEL):
        for j in range(MOST_PER_MODEL):
            note(measures, ModelName(f"m{i}.mar"), Measure("d", "counter", {"id": str(j)}, 1.0))
    assert count(measures, "c{") + count(measures, "d{") == MOST_SERIES
    measures.drop(A)
    assert count(measures, 'c{Hostname="h",ModelName="a"') == 0
    note(measures, B, Measure("e", "gauge", {}, 1.0))
    assert count(measures, "e{") == 1


@pytest.mark.parametrize("others", [0, MOST_NAMES])
def test_names_are_bounded_and_can_be_used_again(others: int) -> None:
    """A name is anyone's again when the last model that has it has gone."""
    measures = CodeMeasures({}, "h")
    for i in range(others):
        note(measures, ModelName(f"m{i // 40}.mar"), Measure(f"n{i}", "gauge", {}, 1.0))
    note(measures, A, Measure("mine", "gauge", {}, 1.0))
    assert count(measures, "mine{") == (0 if others else 1)
    measures.drop(A)
    for i in range(-(-others // 40)):
        measures.drop(ModelName(f"m{i}.mar"))
    note(measures, B, Measure("mine", "counter", {}, 1.0))
    assert count(measures, "mine{") == 1
