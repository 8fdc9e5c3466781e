"""What the supervisor reads of processes and certificates, from real processes and real files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme

from server import contract
from server.supervisor.host_measures import HostMeasures, measure_processes
from tests.patience import wait_until

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc is Linux's")


def read_values(measures: HostMeasures) -> dict[tuple[str, str], float]:
    """Values by series and label."""
    return {
        (sample.name, next(iter(sample.labels.values()))): sample.value
        for family in measures.collect()
        for sample in family.samples
    }


@linux
def test_processes_are_measured_as_the_kernel_counts_them() -> None:
    """This process: its memory, start and descriptors are plausible, and its processor time is its own clock's."""
    spent = time.process_time()
    found = measure_processes({"supervisor": os.getpid()})["supervisor"]
    assert spent - 0.1 <= found.cpu_s <= time.process_time() + 0.1  # the kernel counts in hundredths
    assert 2**20 < found.memory < 2**40
    assert found.started < time.time()
    wait_until(is_counted, "an open file is one more: what other tests have left may close meanwhile")
    assert found.open_files < found.most_files


def is_counted() -> bool:
    """Whether a file that is opened here is one more."""
    me = {"me": os.getpid()}
    before = measure_processes(me)["me"].open_files
    with Path("/dev/null").open():
        return measure_processes(me)["me"].open_files == before + 1


@linux
def test_a_process_that_has_ended_is_left_out() -> None:
    """It ends between the list of children and the look at it."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    measures = HostMeasures({})
    measures.read({"supervisor": os.getpid(), "worker-0": child.pid})
    assert {name for _, name in read_values(measures)} == {"supervisor"}


def test_without_proc_nothing_is_shown(tmp_path: Path) -> None:
    """On other systems."""
    assert measure_processes({"supervisor": os.getpid()}, tmp_path) == {}


def test_a_certificate_that_cannot_be_read_keeps_its_end(tmp_path: Path) -> None:
    """While it is replaced the alert must not see it vanish; the new one counts once it is there."""
    path, ca, series = tmp_path / "server.pem", trustme.CA(), (contract.CERTIFICATE_EXPIRY.series, "tls_certificate")
    path.write_bytes(ca.cert_pem.bytes())
    measures = HostMeasures({"tls_certificate": path})
    assert series not in read_values(measures)
    measures.read({})
    before = read_values(measures)[series]
    assert before > time.time()
    path.write_text("half a file")
    measures.read({})
    assert read_values(measures)[series] == before


@linux
def test_processor_time_does_not_decrease_when_a_process_is_replaced() -> None:
    """Its successor of the same name goes on counting where it ended, also after a reading without either."""
    measures = HostMeasures({})
    key = (f"{contract.METRIC_PREFIX}{contract.PROCESS_CPU.name}_total", "front-0")
    measures.read({"front-0": os.getpid()})
    first = read_values(measures)[key]
    assert first > 0
    measures.read({})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as successor:
        measures.read({"front-0": successor.pid})
        assert read_values(measures)[key] >= first
        successor.communicate(b"\n")
