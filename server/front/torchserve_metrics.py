"""The metrics of registered models under TorchServe's names, from what a front has counted. Read by its event loop."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, UntypedMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.front.registrations import Registrations

LABELS = ("model_name", "model_version", "hostname")


class RegisteredFamilies(Collector):
    """See the module. Nothing is shown while no registered model was asked; what is unregistered has no series.

    TorchServe's counters of microseconds have no `_total` in their names: they are shown without a type.
    """

    def __init__(self, registrations: Registrations, hostname: str) -> None:
        self._registrations, self._hostname = registrations, hostname

    def collect(self) -> Iterator[Metric]:
        """The families."""
        served = self._registrations.served
        if not served:
            return
        requests = CounterMetricFamily("ts_inference_requests", "Requests for registered models.", labels=LABELS)
        latency = UntypedMetricFamily(
            "ts_inference_latency_microseconds", "Time of requests for registered models (us).", labels=LABELS
        )
        queue = UntypedMetricFamily(
            "ts_queue_latency_microseconds", "Time that requests for registered models waited (us).", labels=LABELS
        )
        for (name, version), counted in served.items():
            labels = (name, version, self._hostname)
            requests.add_metric(labels, counted.requests)
            latency.add_metric(labels, counted.latency_us)
            queue.add_metric(labels, counted.queue_us)
        yield from (requests, latency, queue)
