"""What a handler measures by `context.metrics` comes with its batch's answer, in both servers' words."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from model_store.errors import CodeFailed
from server.code_messages import MAX_MEASURES, Measure
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from server.worker.sandbox.inside.handler_metrics import HandlerMetrics
from tests.server.worker.sandbox.code_archives import Asker, make_code_archive, start

MIB = 1024 * 1024
FILE = """
model_metrics:
  counter:
    - {name: Asked, unit: count, dimensions: [Kind]}
  histogram:
    - {name: Took, unit: ms, dimensions: []}
"""
HANDLER = """
def handle(data, context):
    metrics = context.metrics
    if data is None:
        metrics.add_time("LoadTime", 3)
        return None
    metrics.get_metric("Asked").add_or_update(2, ["x"])
    metrics.get_metric("Took", "histogram").add_or_update(0.5)
    metrics.get_metric("Took", "histogram").add_or_update(0.25)
    try:
        metrics.get_metric("Nowhere")
    except Exception as error:
        return [f"{type(error).__name__} {error}"]
"""


class Named:
    """A dimension, as both servers' packages have it."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def __repr__(self) -> str:
        """For example `<Named Kind>`."""
        return f"<Named {self.name}>"


def test_the_documented_methods_take_the_documented_arguments() -> None:
    """Counters of a batch are summed, of a gauge the last counts; the level is the model's unless it is said."""
    metrics: Any = HandlerMetrics()
    metrics.add_counter("Asked", 1, 0)
    metrics.add_counter("Asked", 2, dimensions=[Named("Level", "Host")])
    metrics.add_counter("Asked", 4)
    metrics.add_size("Size", 1, None, "MB")
    metrics.add_size("Size", 2, None, "kB")
    metrics.add_percent("Share", 50.0)
    metrics.add_error("Failed", "what happened")
    metrics.add_metric("Own", 3, "count", None, [Named("Kind", 7)], "gauge")
    assert metrics.take() == [
        Measure("Asked", "counter", {"Level": "Model"}, 5.0),
        Measure("Asked", "counter", {"Level": "Host"}, 2.0),
        Measure("Size", "gauge", {"Level": "Model"}, 2.0),
        Measure("Share", "gauge", {"Level": "Model"}, 50.0),
        Measure("Failed", "counter", {"Level": "Error"}, 1.0),
        Measure("Own", "gauge", {"Kind": "7", "Level": "Model"}, 3.0),
    ]
    metrics.set_request_ids({0: "id"})
    assert metrics.take() == []
    other: Any = HandlerMetrics(is_mms=True)
    other.add_metric("Own", 3, 0, "count", [Named("Kind", 7)])
    assert other.take() == [Measure("Own", "gauge", {"Kind": "7", "Level": "Model"}, 3.0)]


def test_only_known_metrics_are_found() -> None:
    """Those that the handler or the server's file has named."""
    metrics = HandlerMetrics()
    added = metrics.add_metric_to_cache("Asked", "count", ["Kind"])
    assert metrics.get_metric("Asked") is added
    with pytest.raises(Exception, match="Nowhere is no gauge of the server's code_metrics file"):
        metrics.get_metric("Nowhere", "gauge")


@pytest.mark.parametrize(
    "measure",
    [
        lambda metrics: metrics.add_counter("Asked", -1),
        lambda metrics: metrics.add_time("Took", float("nan")),
        lambda metrics: metrics.add_time("Took", "soon"),
        lambda metrics: metrics.add_metric_to_cache("Asked", dimension_names=["a"]).add_or_update(1, []),
    ],
)
def test_what_is_no_value_is_told_and_kept_nowhere(
    measure: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The handler goes on, as in TorchServe."""
    metrics = HandlerMetrics()
    measure(metrics)
    assert metrics.take() == []
    assert "metric " in capsys.readouterr().err


def test_a_batch_measures_so_much_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    """What is beyond the limit is counted in the log; texts are cut to what the worker takes."""
    metrics = HandlerMetrics()
    for i in range(MAX_MEASURES + 7):
        metrics.add_counter("n" * 500, 1, dimensions=[Named("k" * 100, f"{i:03} {'v' * 500}")])
    found = metrics.take()
    assert len(found) == MAX_MEASURES
    assert len(found[0].name) == 128
    assert "7 measurements of one batch were dropped" in capsys.readouterr().err


@pytest.mark.slow
def test_measurements_travel_with_answers() -> None:
    """Those of the load too; metrics of the server's file are found, and others are TorchServe's error."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, 10.0, metrics=FILE))

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(HANDLER)))
        assert (await child.one()).body.startswith(b"MetricsCacheKeyError")
        assert child.child.measures == [
            Measure("LoadTime", "gauge", {"Level": "Model"}, 3.0),
            Measure("Asked", "counter", {"Kind": "x", "Level": "Model"}, 2.0),
            Measure("Took", "histogram", {"Level": "Model"}, 0.5),
            Measure("Took", "histogram", {"Level": "Model"}, 0.25),
        ]
        assert 0 < child.child.load_s < host.policy.timeout_s
        await child.one()
        assert [each.name for each in child.child.measures] == ["Asked", "Took", "Took"]
        await child.close()

    try:
        asyncio.run(ask())
    finally:
        host.close()


@pytest.mark.slow
def test_a_damaged_file_of_metrics_is_named() -> None:
    """It is the server's, so that the message says which."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, 10.0, metrics="a: [unclosed"))
    try:
        with pytest.raises(CodeFailed, match="the server's code_metrics file is no YAML"):
            start(host, make_code_archive())
    finally:
        host.close()
