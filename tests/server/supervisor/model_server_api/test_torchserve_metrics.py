"""TorchServe's names for the metrics of the whole server."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from server.metrics import FrontMetrics, MergedMetrics
from server.supervisor.model_server_api.torchserve_metrics import CpuClock, HostFamilies, NamedFamilies


def make_registry(folder: Path) -> CollectorRegistry:
    """A server's metrics after two answers and a refusal, in two fronts."""
    merged = MergedMetrics()
    for process, codes in (("front 0", (200, 404)), ("front 1", (200,))):
        front = FrontMetrics()
        for code in codes:
            front.bind_answers("sagemaker", code).answers.inc()
        merged.update(process, front.text())
    registry = CollectorRegistry()
    registry.register(merged)
    registry.register(HostFamilies(merged, folder / "not" / "there", CpuClock()))
    return registry


def test_answers_count_by_class_and_the_host_is_measured(tmp_path: Path) -> None:
    """Answers of all fronts and protocols; a folder that is not there yet is where it will be made."""
    shown = generate_latest(make_registry(tmp_path)).decode()
    counts = [line.rpartition(" ")[2] for line in shown.splitlines() if line.startswith("Requests")]
    assert counts == ["2.0", "1.0", "0.0"]
    for name in ("MemoryUsed", "MemoryAvailable", "MemoryUtilization", "DiskUsage", "DiskAvailable", "CPUUtilization"):
        (value,) = (line.rpartition(" ")[2] for line in shown.splitlines() if line.startswith(f"{name}{{"))
        assert float(value) >= 0


def test_only_named_families_are_shown(tmp_path: Path) -> None:
    """By the family's name or a series'."""
    named = CollectorRegistry()
    named.register(NamedFamilies(make_registry(tmp_path), ["Requests4XX", "fleetcast_inference_requests_total"]))
    shown = generate_latest(named).decode()
    names = {line.partition("{")[0] for line in shown.splitlines() if not line.startswith("#")}
    assert names == {"Requests4XX", "fleetcast_inference_requests_total"}


def test_processor_time_is_of_the_time_between_two_questions(tmp_path: Path) -> None:
    """Idle time and waiting for a disk are not in use."""
    (tmp_path / "proc").mkdir()
    stat, clock = tmp_path / "proc" / "stat", CpuClock(tmp_path)
    stat.write_text("cpu  10 0 10 70 10 0 0 0 0 0\ncpu0 1 1\n")
    assert clock.read_percent() == 20.0
    assert clock.read_percent() == 0.0
    stat.write_text("cpu  40 0 10 80 10 0 0 0 0 0\n")
    assert clock.read_percent() == 75.0
