"""What the supervisor reads from its host at each scrape: what the server's processes use, and when certificates end.

It reads `/proc` for its children, so that a process too busy to answer is measured too: memory, processor time, start
and open descriptors. Elsewhere than on Linux these are not shown.
"""

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import contract
from server.access.certificates import read_first_end
from server.contract import METRIC_PREFIX

# In /proc/PID/stat, counted from the field behind the name (proc(5): 14, 15, 22).
_USER_TICKS, _SYSTEM_TICKS, _START_TICKS = 11, 12, 19
_LIMIT_LINE = "Max open files"


class ProcessMeasure(NamedTuple):
    """One process: resident bytes, seconds of processor time, Unix time of its start, descriptors it has and may."""

    memory: float
    cpu_s: float
    started: float
    open_files: float
    most_files: float


#: In the order of ProcessMeasure's fields.
_SPECS = (
    contract.PROCESS_MEMORY,
    contract.PROCESS_CPU,
    contract.PROCESS_START,
    contract.PROCESS_OPEN_FILES,
    contract.PROCESS_MOST_FILES,
)


class HostMeasures(Collector):
    """The latest of these measures. `read` touches files, so it runs on a thread; `collect` on the event loop.

    `certificates`: files in PEM by the setting that names them.
    """

    def __init__(self, certificates: Mapping[str, Path]) -> None:
        self._certificates = dict(certificates)
        self._ends: Mapping[str, float] = {}
        self._processes: Mapping[str, ProcessMeasure] = {}
        self._last: dict[str, ProcessMeasure] = {}  #: of each name, also while no process has it
        self._ended_s: dict[str, float] = {}  #: processor time of the processes that ended, by the name they had

    def __repr__(self) -> str:
        """For example `<HostMeasures of 5 processes, 1 certificates>`."""
        return f"<HostMeasures of {len(self._processes)} processes, {len(self._certificates)} certificates>"

    def read(self, pids: Mapping[str, int]) -> None:
        """Measure these processes, and look at the certificates. What cannot be read keeps its last measure."""
        self._processes = measure_processes(pids)
        for name, measure in self._processes.items():  # INVARIANT: no counter decreases when a process is replaced
            last = self._last.get(name)
            if last is not None and last.started != measure.started:
                self._ended_s[name] = self._ended_s.get(name, 0.0) + last.cpu_s
            self._last[name] = measure
        ends = dict(self._ends)
        for setting, path in self._certificates.items():
            with suppress(OSError, ValueError):  # it is being replaced; the listener logs a file that is bad
                ends[setting] = read_first_end(path)
        self._ends = ends

    def collect(self) -> Iterator[Metric]:
        """Metrics with the label `process` or `setting`."""
        for at, spec in enumerate(_SPECS):
            make = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
            family = make(METRIC_PREFIX + spec.name, spec.help, labels=spec.labels)
            for name, measure in self._processes.items():
                ended_s = self._ended_s.get(name, 0.0) if spec is contract.PROCESS_CPU else 0.0
                family.add_metric([name], measure[at] + ended_s)
            yield family
        spec = contract.CERTIFICATE_EXPIRY
        expiry = GaugeMetricFamily(METRIC_PREFIX + spec.name, spec.help, labels=spec.labels)
        for setting, end in self._ends.items():
            expiry.add_metric([setting], end)
        yield expiry


def measure_processes(pids: Mapping[str, int], proc: Path = Path("/proc")) -> dict[str, ProcessMeasure]:
    """The measures of these processes by name, without those that have ended; of none where there is no `/proc`."""
    found = dict[str, ProcessMeasure]()
    try:
        booted = _read_boot_time(proc)
    except (OSError, ValueError):
        return found
    for name, pid in pids.items():
        try:
            found[name] = _measure(proc / str(pid), booted)
        except (OSError, ValueError, IndexError):
            continue
    return found


def _measure(folder: Path, booted: float) -> ProcessMeasure:
    ticks = os.sysconf("SC_CLK_TCK")
    fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
    resident = int((folder / "statm").read_text().split()[1]) * resource.getpagesize()
    limits = (folder / "limits").read_text().splitlines()
    limit = next(line for line in limits if line.startswith(_LIMIT_LINE)).removeprefix(_LIMIT_LINE).split()[0]
    return ProcessMeasure(
        memory=resident,
        cpu_s=(int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / ticks,
        started=booted + int(fields[_START_TICKS]) / ticks,
        open_files=sum(1 for _ in os.scandir(folder / "fd")),
        most_files=float("inf") if limit == "unlimited" else int(limit),
    )


def _read_boot_time(proc: Path) -> float:
    line = next((each for each in (proc / "stat").read_text().splitlines() if each.startswith("btime ")), "")
    return float(line.removeprefix("btime "))
