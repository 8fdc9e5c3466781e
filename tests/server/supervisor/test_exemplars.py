"""Exemplars on the buckets of request times, through the library's strict parser of OpenMetrics."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from server import contract
from server.ipc.operations import Exemplar
from server.metrics import FrontMetrics, HostMetrics, MergedMetrics, WorkerMetrics
from server.supervisor.exemplars import render_open_metrics, wants_open_metrics

PROMETHEUS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def render(*fronts: FrontMetrics) -> list[Sample]:
    """What a scraper that takes OpenMetrics reads of these fronts, a worker and a supervisor."""
    merged, exemplars = MergedMetrics(), list[Exemplar]()
    merged.update("worker-0", WorkerMetrics(0, "cpu").text())
    merged.update("host", HostMetrics("1.2.3").text())
    for i, front in enumerate(fronts):
        merged.update(f"front-{i}", front.text())
        for labels, example in front.list_examples():
            exemplars.append(Exemplar(labels, example.request_id.decode("ascii", "replace"), example.value, example.at))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(merged)
    body, media_type = render_open_metrics(registry, exemplars)
    assert media_type.startswith("application/openmetrics-text; version=1.0.0")
    families = text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    return [sample for family in families for sample in family.samples]


def test_buckets_of_all_fronts_have_their_newest_exemplar() -> None:
    """Counts are summed as ever; where two fronts have one for a bucket, the later stands; others have none."""
    fronts = (FrontMetrics(), FrontMetrics())
    fronts[0].bind_answers("sagemaker", 200).seconds.observe_request(0.002, b"first")
    fronts[1].bind_answers("sagemaker", 200).seconds.observe_request(0.0021, b"second")
    fronts[1].bind_answers("v2", 200).seconds.observe_request(7, b'with "quotes" and \xff')
    samples = render(*fronts)
    found = {
        (sample.labels["protocol"], sample.labels["le"]): sample.exemplar
        for sample in samples
        if sample.exemplar is not None
    }
    assert {where: (each.labels["request_id"], each.value) for where, each in found.items()} == {
        ("sagemaker", "0.0025"): ("second", 0.0021),
        ("v2", "10.0"): ('with "quotes" and \ufffd', 7.0),
    }
    counts = [each for each in samples if each.name == contract.INFERENCE_SECONDS.count]
    assert {each.labels["protocol"]: each.value for each in counts} == {"sagemaker": 2, "v2": 1}


@pytest.mark.parametrize(("accept", "wanted"), [(PROMETHEUS, True), ("text/plain", False), ("*/*", False), ("", False)])
def test_only_who_asks_for_open_metrics_gets_it(accept: str, wanted: bool) -> None:
    """As Prometheus does; a browser or curl reads plain text."""
    assert wants_open_metrics(accept) is wanted
