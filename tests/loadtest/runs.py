"""Records of load runs from seeded random numbers in realistic shapes, for the tests of the report."""

from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, None)
#: What a slow machine may find on standard error beside nothing: see `server.shell.progress`.
PROGRESS_LINE = r"[\w ,-]+: \d+ (of \d+|done)"


def make_row(ms: Any) -> dict[str, Any]:
    """A latency row of the given milliseconds."""
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    for value in (np.asarray(ms) * 1e3).clip(1).astype(int).tolist():
        histogram.record_value(value)
    found = {f"p{p:g}_ms": histogram.get_value_at_percentile(p) / 1e3 for p in (50, 90, 99, 99.9)}
    return {"count": len(ms), **found, "max_ms": float(max(ms)), "hdr": histogram.encode().decode()}


def record(seed: int = 0, seconds: int = 60, rate: float = 200.0, slow: float = 1.0) -> dict[str, Any]:
    """A valid run that recorded everything: hits of about `slow` ms, some misses, a hiccup after a third."""
    rng = np.random.default_rng(seed)
    requests = int(rate * seconds)
    at = np.sort(rng.uniform(0, seconds, requests))
    kind = rng.choice(["hit", "miss", "coalesced"], requests, p=[0.8, 0.15, 0.05])
    ms = slow * rng.lognormal(0, 0.3, requests) + (kind != "hit") * rng.lognormal(2, 0.5, requests)
    ms[(at > seconds / 3) & (at < seconds / 3 + 1)] += 80 * slow
    failed = rng.random(requests) < 0.002
    good = {name: ms[~failed & (kind == name)] for name in ("hit", "miss", "coalesced")}
    slots = [ms[(at >= t) & (at < t + 1)] for t in range(seconds)]
    over_time = {
        "t_s": [float(t) for t in range(seconds)],
        "due_per_s": [rate] * seconds,
        "answered_per_s": [float(len(slot)) for slot in slots],
        "failed_per_s": rng.poisson(0.002 * rate, seconds).astype(float).tolist(),
        "p50_ms": [float(np.percentile(slot, 50)) if slot.size else None for slot in slots],
        "p99_ms": [float(np.percentile(slot, 99)) if slot.size else None for slot in slots],
        "max_ms": [float(slot.max()) if slot.size else None for slot in slots],
        "hit_ratio": rng.uniform(0.75, 0.85, seconds).tolist(),
    }
    results = {
        "title": f"{rate:g} requests/s, Poisson, Zipf 1, {seconds} s over 200 models",
        "subject": "200 models, room for 50, 1 worker",
        "profile": {"models": 200, "rate": rate, "zipf": 1.0, "arrivals": "poisson", "seed": seed},
        "dialect": "sagemaker",
        "body": "deepar",
        "body_bytes": 2600,
        "processes": 1,
        "invalid": [],
        "requests": requests,
        "seconds": float(seconds),
        "answered_per_s": float((~failed).sum() / seconds),
        "hit_ratio": 0.8,
        "latency": {"all": make_row(ms)} | {k: make_row(v) for k, v in good.items()} | {"failed": make_row(ms[failed])},
        "lag": make_row(rng.exponential(0.1, requests)),
        "worst_ms": [float(slot.max(initial=0)) for slot in slots],
        "over_time": over_time,
        "failures": {"status 503": int(failed.sum()) - 1, "connection refused or lost": 1},
        "checked": 200,
        "unsound": [],
        "slo": {
            "met": False,
            "checks": [
                {"what": "p99 latency", "limit": "150 ms", "found": f"{np.percentile(ms, 99):.1f} ms", "met": True},
                {"what": "failed requests", "limit": "0.1 %", "found": "0.2 %", "met": False},
            ],
        },
        "steps": None,
        **_make_watched(rng, seconds),
    }
    machine = {"cpu": "Xeon, 2 cores", "cores": 2, "memory_gib": 7.8, "packages": {"torch": "2.13.0", "numpy": "2.3"}}
    whole = {
        "name": "load",
        "date": "2026-11-21T05:00:00Z",
        "commit": "99cf585a1b2c3d4e5f60718293a4b5c6d7e8f901+changes",
    }
    return {**whole, "seed": seed, "machine": {**machine, "load_average_before": 0.12}, "results": results}


def make_ramp(seed: int = 0) -> dict[str, Any]:
    """A ramp that breaks at its last rate."""
    made = record(seed, seconds=40, rate=100.0)
    made["results"]["title"] = "A ramp from 100 to 800 requests/s over 200 models"
    made["results"]["steps"] = [
        {
            "rate": rate,
            "answered_per_s": min(rate, 620.0),
            "p50_ms": rate / 100,
            "p99_ms": 8 * rate / (900 - rate),
            "failed": 0 if rate < 800 else 311,
            "sustained": rate < 800,
            "why": "" if rate < 800 else "answered 620 of 800 requests/s",
        }
        for rate in (100.0, 200.0, 400.0, 600.0, 800.0)
    ]
    return made


def make_bare(seed: int = 0) -> dict[str, Any]:
    """A run of which nothing was watched, and to which nothing was answered."""
    made = record(seed, seconds=10)
    results = made["results"]
    for name in ("metrics", "server_over_time", "load_time", "memory", "memory_over_time", "slo"):
        results[name] = None
    failed = make_row(np.full(2000, 10_000.0))
    nothing: list[None] = [None] * 10
    results |= {"answered_per_s": 0.0, "hit_ratio": 0.0, "latency": {"all": failed, "failed": failed}}
    results |= {"failures": {"connection refused or lost": 2000}, "checked": 0}
    over = results["over_time"]
    over |= {
        "answered_per_s": [0.0] * 10,
        "hit_ratio": nothing,
        "p50_ms": nothing,
        "p99_ms": nothing,
        "max_ms": nothing,
    }
    return made


def make_hostile(text: str) -> dict[str, Any]:
    """A run in which every text, and every name the server or the user chose, is `text`."""
    made = record(seconds=5)
    results = made["results"]
    for name in ("title", "subject", "dialect", "body"):
        results[name] = text
    results |= {"invalid": [text], "unsound": [text], "failures": {text: 3}, "profile": {text: text}}
    results["slo"]["checks"][0] |= {"what": text, "limit": text, "found": text}
    results["memory"] = {text: 1e6}
    results["memory_over_time"] = {"t_s": [0.0, 1.0], text: [1e6, 2e6]}
    results["steps"] = [{**make_ramp()["results"]["steps"][0], "why": text}]
    for over in ("loads_per_s", "load_ms"):
        results["server_over_time"][over][text] = results["server_over_time"][over].pop("disk")
    results["load_time"][text] = results["load_time"].pop("disk")
    return made | {"date": text, "commit": text, "machine": {text: {text: text}}}


def _make_watched(rng: np.random.Generator, seconds: int) -> dict[str, Any]:
    """What the server's metrics and the processes' memory said every second."""
    at = (np.arange(seconds) + 0.5).tolist()
    filled = (50 * (1 - np.exp(-np.arange(seconds) / 8))).round()
    over_time = {
        "t_s": at,
        "hit_ratio": rng.uniform(0.75, 0.85, seconds).tolist(),
        "loads_per_s": {
            tier: rng.poisson(mean, seconds).astype(float).tolist() for tier, mean in (("store", 5), ("disk", 25))
        },
        "load_ms": {
            "store": rng.lognormal(2.5, 0.2, seconds).tolist(),
            "disk": [None, *rng.lognormal(0.5, 0.2, seconds - 1).tolist()],
        },
        "evictions_per_s": np.where(filled >= 49, rng.poisson(28, seconds), 0.0).astype(float).tolist(),
        "loaded_models": filled.tolist(),
        "cache_bytes": (filled * 71_000).tolist(),
        "queue_ms": rng.lognormal(-1, 0.3, seconds).tolist(),
        "batch_rows": rng.uniform(1, 3, seconds).tolist(),
    }
    metrics = {"hit_ratio": 0.8, "evictions": 1400.0}
    metrics |= {"loads_from_store": 300.0, "load_seconds_from_store": 3.9}
    metrics |= {"loads_from_disk": 1500.0, "load_seconds_from_disk": 2.6}
    memory = {"t_s": at, "front 0": [6e7] * seconds, "worker 0": (2.4e8 + 1e6 * filled).tolist()}
    return {
        "metrics": metrics,
        "server_over_time": over_time,
        "load_time": {
            "store": {"le_s": [*BUCKETS], "count": [0, 0, 2, 20, 98, 120, 40, 15, 4, 1, 0]},
            "disk": {"le_s": [*BUCKETS], "count": [20, 400, 900, 150, 20, 10, 0, 0, 0, 0, 0]},
        },
        "memory": {"front 0": 6e7, "worker 0": 2.9e8},
        "memory_over_time": memory,
    }
