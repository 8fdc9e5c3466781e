"""One reading of all processes' metrics serves every viewer of a second."""

import asyncio
from collections.abc import Mapping

from server.metrics import FrontMetrics, MergedMetrics, WorkerMetrics
from server.supervisor.overview import FRESH_S, Overview, summarise_metrics


def make_merged() -> MergedMetrics:
    """Two fronts and two workers that have counted something."""
    merged = MergedMetrics()
    for i in range(2):
        front = FrontMetrics()
        front.show_protocol("v2", [200, 404])
        series = front.bind_answers("sagemaker", 200)
        series.answers.inc()
        series.seconds.observe(0.0004)
        front.bind_answers("forecasts", 503 if i else 200).answers.inc()
        merged.update(f"front {i}", front.text())
        worker = WorkerMetrics(i, "cpu")
        worker.hits.inc()
        worker.loaded.set(3)
        worker.load_seconds("disk" if i else "store", 0.02)
        worker.bytes.set(100)
        merged.update(f"worker {i}", worker.text())
    return merged


def test_families_are_summed_over_processes() -> None:
    """By the label that a viewer tells apart; histograms keep their bounds."""
    found = summarise_metrics(make_merged().collect())
    assert found["requests"] == {"200": 3, "503": 1}
    assert found["requests_by_protocol"] == {"sagemaker": 2, "forecasts": 2}
    assert found["load_failures"] == {}  # what has never happened is not listed, though it has series
    assert found["cache_requests"] == {"hit": 2, "miss": 0, "coalesced": 0}
    assert found["loaded_models"] == {"0": 3, "1": 3}
    assert isinstance(found["cache_bytes"], Mapping)
    assert found["cache_bytes"]["device"] == 200
    seconds, loads = found["request_seconds"], found["load_seconds"]
    assert isinstance(seconds, Mapping)
    assert seconds["counts"][seconds["bounds"].index(0.00025)] == 0
    assert seconds["counts"][seconds["bounds"].index(0.0005)] == 2
    assert seconds["counts"][-1] == 2
    assert isinstance(loads, Mapping)
    assert {tier: each["counts"][-1] for tier, each in loads.items()} == {"disk": 1, "store": 1}


def test_without_any_metric_all_is_empty() -> None:
    """A server whose processes have not started yet is no error."""
    found = summarise_metrics([])
    assert found["requests"] == {}
    assert found["request_seconds"] == {"bounds": [], "counts": [], "sum": 0.0}


def test_viewers_share_a_reading() -> None:
    """Many at once cause one; one that leaves takes it from nobody; a second later there is a new one."""
    readings, now = 0, 100.0

    async def read() -> MergedMetrics:
        nonlocal readings
        readings += 1
        await asyncio.sleep(0)
        return make_merged()

    async def view() -> None:
        nonlocal now
        overview = Overview(read, lambda: {"version": "x"}, lambda: now)
        viewers = [asyncio.create_task(overview.read()) for _ in range(50)]
        await asyncio.sleep(0)
        viewers[0].cancel()
        answers = await asyncio.gather(*viewers, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert all(each is answers[1] for each in answers[1:])
        assert readings == 1
        now += FRESH_S / 2
        await overview.read()
        assert readings == 1
        now += FRESH_S / 2
        found = await overview.read()
        assert (readings, found["version"]) == (2, "x")

    asyncio.run(view())
