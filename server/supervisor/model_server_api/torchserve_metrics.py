"""The metrics of the whole server under TorchServe's names, for dashboards that were made for it.

They are shown from the first registration on: those who never speak TorchServe's API have its names nowhere.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, UntypedMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server import contract
from server.metrics import MergedMetrics

LABELS = ("Level", "Hostname")
GIB = 1024**3
CLASSES = ("2XX", "4XX", "5XX")


class CpuClock:
    """The share of the host's processor time that was used since it was asked last."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._stat, self._before = root / "proc/stat", (0, 0)

    def __repr__(self) -> str:
        """For example `<CpuClock>`."""
        return "<CpuClock>"

    def read_percent(self) -> float:
        """0 to 100; of the time since the start, when it is asked first."""
        ticks = [int(text) for text in self._stat.read_text().split("\n", 1)[0].split()[1:]]
        total, idle = sum(ticks[:8]), sum(ticks[3:5])
        spent, unused = total - self._before[0], idle - self._before[1]
        self._before = total, idle
        return 100.0 * (spent - unused) / spent if spent > 0 else 0.0


class HostFamilies(Collector):
    """See the module. `merged`: of all processes; `folder`: whose file system is the disk."""

    def __init__(self, merged: MergedMetrics, folder: Path, clock: CpuClock) -> None:
        self._merged, self._folder, self._clock = merged, folder, clock

    def collect(self) -> Iterator[Metric]:
        """The families."""
        labels = ("Host", os.uname().nodename)
        for name, text, value in (
            ("CPUUtilization", "Processor time in use (percent).", self._clock.read_percent()),
            *_measure_memory(),
            *_measure_disk(self._folder),
        ):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        counts = self._count_statuses()
        for each in CLASSES:
            answers = UntypedMetricFamily(f"Requests{each}", f"Answers with a status of {each}.", labels=LABELS)
            answers.add_metric(labels, counts.get(each[0], 0.0))
            yield answers

    def _count_statuses(self) -> dict[str, float]:
        """Answers of all protocols by the first digit of their status."""
        counts: dict[str, float] = {}
        for family in self._merged.collect():
            for sample in family.samples:
                if sample.name == contract.INFERENCE_REQUESTS.series:
                    first = sample.labels["code"][:1]
                    counts[first] = counts.get(first, 0.0) + sample.value
        return counts


class NamedFamilies(Collector):
    """The families that are asked for by their name or by that of a series."""

    def __init__(self, registry: CollectorRegistry, names: Collection[str]) -> None:
        self._registry, self._names = registry, set(names)

    def collect(self) -> Iterator[Metric]:
        """Those of the registry."""
        for family in self._registry.collect():
            if family.name in self._names or any(sample.name in self._names for sample in family.samples):
                yield family


def _measure_memory() -> Iterator[tuple[str, str, float]]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, available = kib["MemTotal"] / 1024, kib["MemAvailable"] / 1024
    yield "MemoryAvailable", "Memory that is free (MiB).", available
    yield "MemoryUsed", "Memory in use (MiB).", total - available
    yield "MemoryUtilization", "Memory in use (percent).", 100.0 * (total - available) / total


def _measure_disk(folder: Path) -> Iterator[tuple[str, str, float]]:
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    yield "DiskAvailable", "Disk space that is free (GiB).", free / GIB
    yield "DiskUsage", "Disk space in use (GiB).", (size - free) / GIB
    yield "DiskUtilization", "Disk space in use (percent).", 100.0 * (size - free) / size
