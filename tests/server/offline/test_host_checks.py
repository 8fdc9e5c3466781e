"""The checks of `doctor` give no advice for a sound machine, and advise what to change otherwise."""

import os
import re
import resource
from pathlib import Path

import pytest

from server.cli.setting_flags import settings_from
from server.host import Host, read_host
from server.offline.host_checks import (
    HostFact,
    check_accelerator,
    check_cores,
    check_disk_cache,
    check_machine,
    check_memory,
    check_number_reader,
    check_open_files,
    check_torch_build,
    check_workers,
)
from server.supervisor.worker_plan import plan_workers

GIB = 2**30
HOST = Host(cores=(0, 1, 2, 3), memory_bytes=16 * GIB, gpus=())


def test_a_good_machine_has_no_advice(tmp_path: Path) -> None:
    """Each fact of a machine with room says what there is and nothing else."""
    plans = plan_workers(settings_from({"store": "x"}), HOST)
    facts = [
        check_cores(HOST, 8, 0.5),
        check_torch_build("2.13.0", "AVX2", 4),
        check_accelerator(HOST, None, 0),
        check_workers(plans),
        check_memory(HOST, plans, 1),
        check_disk_cache(tmp_path / "not" / "made", 1),
        check_open_files(65536, 65536),
    ]
    assert [fact.advice for fact in facts] == [""] * 7
    assert [fact.text for fact in facts[:4]] == [
        "4 of 8 for this process (affinity and cgroup), load 0.5",
        "2.13.0, AVX2, 4 threads by default; a worker sets its own",
        "none: models run on the CPU",
        "3 on cpu, each 1 thread and 2.1 GiB for models",
    ]


def test_cores_that_are_few_or_busy() -> None:
    """One core is said to be few; a load of more than half of the cores makes times doubtful."""
    assert "two or more" in check_cores(Host((0,), GIB, ()), 8, 0.0).advice
    assert "quiet" in check_cores(HOST, 8, 2.5).advice


def test_a_reader_of_numbers_that_was_not_compiled() -> None:
    """It says what that costs and which package mends it."""
    assert not check_number_reader(compiled=True).advice
    assert "gcc" in check_number_reader(compiled=False).advice


def test_a_cpu_without_vector_instructions() -> None:
    """What torch calls such a CPU is turned into what to choose."""
    assert "AVX2" in check_torch_build("2.13.0", "DEFAULT", 1).advice


def test_gpus_that_torch_cannot_use() -> None:
    """A build for the CPU, and a driver that is too old, are told apart; a GPU that works is pointed at its bench."""
    gpu = Host((0, 1), GIB, ("0",))
    assert "--device cpu" in check_accelerator(gpu, None, 0).advice
    assert "CUDA 12.8" in check_accelerator(gpu, "12.8", 0).advice
    assert not check_accelerator(gpu, "12.8", 1).advice
    assert "fleetcast-load bench gpu" in check_accelerator(gpu, "12.8", 1).text


def test_memory_that_models_and_processes_overfill() -> None:
    """The budget that would fit beside the processes is named; without any, fewer workers are."""
    tight = plan_workers(settings_from({"store": "x", "model_cache_bytes": "15.5GiB"}), HOST)
    advice = check_memory(HOST, tight, 1).advice
    assert advice.startswith("3 workers need")
    (most,) = re.findall(r"--model-cache-bytes (\d+MiB) or less", advice)
    fits = plan_workers(settings_from({"store": "x", "model_cache_bytes": most}), HOST)
    assert not check_memory(HOST, fits, 1).advice
    small = Host((0, 1, 2, 3), GIB // 2, ())
    assert "fewer --workers" in check_memory(small, plan_workers(settings_from({"store": "x"}), small), 1).advice


def test_a_disk_that_is_smaller_than_its_cache(tmp_path: Path) -> None:
    """The limit that the disk can hold is named; a cache that is off is said to cost fetches."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(5000))
    fact = check_disk_cache(tmp_path, 2**60)
    assert "--disk-cache-bytes below" in fact.advice
    assert "4.9 KiB held" in fact.text
    assert "--disk-cache-bytes" in check_disk_cache(tmp_path, 0).advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The place where the cache would be made is named."""
    tmp_path.chmod(0o500)
    assert "--disk-cache" in check_disk_cache(tmp_path / "cache", 1).advice


def test_few_descriptors() -> None:
    """Both limits are said; only the hard one matters, since `serve` raises the other; no limit is fine."""
    few = check_open_files(1024, 2000)
    assert few.text.startswith("soft limit 1024, hard limit 2000: serve raises")
    assert "LimitNOFILE=65536" in few.advice
    assert not check_open_files(256, 4096).advice
    assert check_open_files(1024, resource.RLIM_INFINITY) == HostFact(
        "open files", "soft limit 1024, hard limit none: serve raises the soft limit to the hard one"
    )


def test_this_machine_as_it_is() -> None:
    """All facts can be read here, each once; settings that cannot be served become a fact instead of an error."""
    names = ["cores", "numbers", "torch", "accelerator", "workers", "memory", "disk cache", "open files"]
    assert [fact.name for fact in check_machine(settings_from({"store": "x"}), read_host())] == names
    too_small = settings_from({"store": "x", "model_cache_bytes": "1MiB", "device": "cpu"})
    facts = {fact.name: fact for fact in check_machine(too_small, read_host())}
    assert "slab_bytes" in facts["workers"].advice
    assert "memory" not in facts
