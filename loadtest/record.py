"""Benchmark records: what was measured, where, of which commit, with what spread. JSON files that are committed."""

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("records")
PACKAGES = ("torch", "onnxruntime", "numpy", "uvicorn", "uvloop", "obstore")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
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
        "packages": {name: version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg()[0],
    }


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    root = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    return (found.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def save(name: str, seed: int, before: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write a dated record; `before` is `machine()` as it was before the run."""
    now = dt.datetime.now(dt.UTC)
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{now:%Y-%m-%d}-{name}.json"
    record = {
        "name": name,
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "commit": commit(),
        "seed": seed,
        "machine": before,
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
