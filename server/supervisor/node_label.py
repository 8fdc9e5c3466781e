"""The label `node` on all series of a node of a cluster, by which one scrape of all nodes tells them apart. Pure."""

from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.ipc.operations import Exemplar

NODE = "node"


class LabelledFamilies(Collector):
    """The families of a registry, with the node's name on every series."""

    def __init__(self, registry: CollectorRegistry, node: str) -> None:
        self._registry, self._node = registry, node

    def __repr__(self) -> str:
        return f"<LabelledFamilies of {self._node}>"

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        for family in self._registry.collect():
            family.samples = [sample._replace(labels={**sample.labels, NODE: self._node}) for sample in family.samples]
            yield family


def label_registry(registry: CollectorRegistry, node: str) -> CollectorRegistry:
    """The registry as this node shows it; as it is for a server that is none."""
    if not node:
        return registry
    shown = CollectorRegistry(auto_describe=False)
    shown.register(LabelledFamilies(registry, node))
    return shown


def label_exemplars(exemplars: Iterable[Exemplar], node: str) -> Iterator[Exemplar]:
    """Exemplars with the labels that their buckets have then."""
    for each in exemplars:
        yield msgspec.structs.replace(each, labels={**each.labels, NODE: node}) if node else each
