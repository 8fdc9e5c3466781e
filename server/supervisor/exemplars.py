"""Exemplars: buckets of the time of requests show the id of one of theirs, where the scraper asks for OpenMetrics.

Prometheus does. The text format, in which processes give their metrics, has no place for them, so that fronts are asked
for them beside it, and only then.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as BucketExemplar

from server import contract
from server.contract import METRIC_PREFIX
from server.ipc.operations import Exemplar

OPEN_METRICS = "application/openmetrics-text"
MOST_CHARACTERS = 128  #: of an exemplar's names and values together
_FAMILY = METRIC_PREFIX + contract.INFERENCE_SECONDS.name
_BUCKET = f"{contract.INFERENCE_SECONDS.series}_bucket"

Labels = frozenset[tuple[str, str]]


class WithExemplars(Collector):
    """The families of a registry, with the newest exemplar on each bucket of the time of requests."""

    def __init__(self, registry: CollectorRegistry, exemplars: Iterable[Exemplar]) -> None:
        self._registry = registry
        self._newest: dict[Labels, Exemplar] = {}
        for each in sorted(exemplars, key=lambda each: each.at):
            self._newest[frozenset(each.labels.items())] = each

    def __repr__(self) -> str:
        """For example `<WithExemplars 12>`."""
        return f"<WithExemplars {len(self._newest)}>"

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        for family in self._registry.collect():
            if family.name == _FAMILY:
                family.samples = [
                    sample._replace(exemplar=self._find(sample.labels)) if sample.name == _BUCKET else sample
                    for sample in family.samples
                ]
            yield family

    def _find(self, labels: dict[str, str]) -> BucketExemplar | None:
        found = self._newest.get(frozenset(labels.items()))
        return None if found is None else BucketExemplar(choose_labels(found), found.seconds, found.at)


def choose_labels(exemplar: Exemplar) -> dict[str, str]:
    """The trace's id where there is one, and the request's unless both are longer than OpenMetrics allows. Pure."""
    request = {"request_id": exemplar.request_id}
    if not exemplar.trace_id:
        return request
    both = {"trace_id": exemplar.trace_id, **request}
    if sum(len(name) + len(value) for name, value in both.items()) <= MOST_CHARACTERS:
        return both
    return {"trace_id": exemplar.trace_id}


def wants_open_metrics(accept: str) -> bool:
    """Whether a scraper takes OpenMetrics. Pure."""
    return any(each.partition(";")[0].strip() == OPEN_METRICS for each in accept.split(","))


def render_open_metrics(registry: CollectorRegistry, exemplars: Iterable[Exemplar]) -> tuple[bytes, str]:
    """The exposition with exemplars, and its media type."""
    shown = CollectorRegistry(auto_describe=False)
    shown.register(WithExemplars(registry, exemplars))
    body: bytes = generate_latest(shown)  # type: ignore[no-untyped-call]
    return body, CONTENT_TYPE_LATEST
