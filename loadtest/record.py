"""Benchmark records: JSON files of results, spread, machine and commit, which are kept in the repository."""

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("records")
PACKAGES = ("torch", "onnxruntime", "numpy", "uvicorn", "uvloop", "obstore")


def summarise_spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest of repeated measurements, and their number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def describe_machine() -> dict[str, Any]:
    """Return what measurements depend on: hardware, versions, and the load average before the run."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: find_version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg()[0],
    }


def find_version(package: str) -> str:
    """Return the version of an installed package, or of its build for GPUs, whose name says so."""
    try:
        return version(package)
    except PackageNotFoundError:
        return f"{version(f'{package}-gpu')} (gpu)"


def find_commit(root: Path = RECORDS.parent) -> str:
    """Return the commit of a checkout, by default this one's, with a mark if files but records differ from it."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    code = ["git", "status", "--porcelain", "--", ":/", ":(exclude,top)loadtest/records"]
    dirty = subprocess.run(code, cwd=root, capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def make_record(name: str, seed: int, before: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Make a record dated now; `before` is what `describe_machine` returned before the run."""
    return {
        "name": name,
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "commit": find_commit(),
        "seed": seed,
        "machine": before,
        "results": results,
    }


def format_record(record: Mapping[str, Any]) -> str:
    """Format a record as it is stored: indented JSON."""
    return json.dumps(record, indent=1) + "\n"


def save_record(name: str, seed: int, before: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Write a dated record into `records` and return its path. The arguments are those of `make_record`."""
    record = make_record(name, seed, before, results)
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{record['date'][:10]}-{name}.json"
    path.write_text(format_record(record))
    return path
