"""Each rule on a made situation: it speaks there, says its numbers, and is silent on a server that is well."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from server.cli.fleet import diagnosis
from server.cli.fleet.diagnosis import Observation, diagnose
from server.cli.fleet.rates import Change

SECONDS = 60.0
Reading = dict[str, Any]
Spoil = Callable[[Reading], None]


def make_buckets(bounds: list[float], counts: list[float], total: float) -> Reading:
    """A histogram as `GET /fleet/overview` gives it."""
    return {"bounds": bounds, "counts": counts, "sum": total}


def make_reading(at: float) -> Reading:
    """A server with two workers after `at` seconds of 100 requests a second: all hits, batches of four."""
    return {
        "at": at,
        "requests": {"200": 100 * at, "503": 0},
        "cache_requests": {"hit": 100 * at, "miss": 0.0, "coalesced": 0.0},
        "cache_bytes": {"device": 90e6, "disk": 5e9},
        "cache_capacity_bytes": {"device": 100e6, "disk": 10e9},
        "evictions": {},
        "load_seconds": {"store": make_buckets([0.1, 1.0], [0, 0, 0], 0)},
        "prefetch": {},
        "restarts": {"0": 0.0, "1": 0.0},
        "quarantined_models": {"": 0.0},
        "step_seconds": {"decode": 0.1 * at, "forward": 0.1 * at, "encode": 0.05 * at},
        "batch_rows": make_buckets([1, 4], [0, 25 * at, 25 * at], 100 * at),
        "download_seconds": make_buckets([1, 10], [0, 0, 0], 0),
        "eviction_age_seconds": make_buckets([60, 600], [0, 0, 0], 0),
        "shortfall_bytes": make_buckets([2**20, 2**21, 2**22], [0, 0, 0, 0], 0),
        "process_cpu_seconds": {"front-0": 0.3 * at, "worker-0": 0.3 * at, "worker-1": 0.3 * at, "supervisor": 0.0},
        "process_open_files": {"front-0": 100},
        "process_most_files": {"front-0": 1024},
    }


def make_rows(answers: Mapping[str, int], families: int = 2) -> dict[str, Any]:
    """Resident models with what they have answered."""
    return {
        name: {"model": name, "holders": [{"worker": 0, "family": f"f{i % families}", "usage": {"answers": count}}]}
        for i, (name, count) in enumerate(answers.items())
    }


def observe(spoil: Spoil | None = None, rows: Mapping[str, Any] | None = None) -> Observation:
    """A minute of that server, its second reading spoilt."""
    before, now = make_reading(1000.0), make_reading(1000.0 + SECONDS)
    if spoil is not None:
        spoil(now)
    listed = make_rows(dict.fromkeys("abcdefgh", 700)) if rows is None else rows
    return Observation(Change(before, now), {}, listed)


def add(*path: str, by: float) -> Spoil:
    """Raise one number of a reading."""

    def spoil(reading: Reading) -> None:
        *folders, last = path
        for folder in folders:
            reading = reading[folder]
        reading[last] = reading.get(last, 0.0) + by

    return spoil


def put(name: str, value: Reading) -> Spoil:
    """Replace one family of a reading."""
    return lambda reading: reading.update({name: value})


def spoil_all(*spoils: Spoil) -> Spoil:
    """One after another."""

    def spoil(reading: Reading) -> None:
        for each in spoils:
            each(reading)

    return spoil


BUSY_WORKER = add("process_cpu_seconds", "worker-0", by=0.6 * SECONDS)
SITUATIONS: Mapping[str, tuple[Spoil, str]] = {
    "requests fail": (add("requests", "503", by=600), "9.09 % of 6600 requests failed (600 with 503)"),
    "models are in quarantine": (add("quarantined_models", "", by=2), "2 models"),
    "workers die": (add("restarts", "1", by=1), "1 workers"),
    "the fronts are the limit": (add("process_cpu_seconds", "front-0", by=0.65 * SECONDS), "95 % of a core"),
    "the workers are the limit, mostly to decode": (
        spoil_all(BUSY_WORKER, add("step_seconds", "decode", by=30)),
        "worker-0 used 90 % of a core (70 % is much): 80 % of its steps decode",
    ),
    "batches are small": (
        spoil_all(BUSY_WORKER, put("batch_rows", make_buckets([1, 4], [25e3, 31e3, 31e3], 106e3))),
        "1.0 rows a batch",
    ),
    "the cache is too small": (
        spoil_all(add("cache_requests", "miss", by=2000), add("evictions", "device", by=1900)),
        "75 % of 8000 requests found their model loaded (95 % is good), and 1900 models were evicted",
    ),
    "models are evicted before they are asked again": (
        put("eviction_age_seconds", make_buckets([60, 600], [90, 100, 100], 3000)),
        "half of 100 evicted models were loaded less than 33 s before",
    ),
    "the store is slow": (put("download_seconds", make_buckets([1, 10], [1, 20, 20], 90)), "half of 20 downloads"),
    "the disk tier is too small": (
        spoil_all(
            add("cache_bytes", "disk", by=4.5e9),
            add("evictions", "disk", by=7),
            put("load_seconds", {"store": make_buckets([0.1, 1.0], [9, 9, 9], 1)}),
        ),
        "95 % of 9.3 GiB are used, 7 archives were dropped and 9 fetched",
    ),
    "models come late at the tick": (
        spoil_all(add("prefetch", "used", by=80), add("prefetch", "late", by=40)),
        "40 of 120 prefetched models",
    ),
    "the workers are uneven": (
        spoil_all(BUSY_WORKER, add("process_cpu_seconds", "worker-1", by=-0.2 * SECONDS)),
        "worker-0 used 90 % of a core and worker-1 10 %",
    ),
    "descriptors are nearly used up": (add("process_open_files", "front-0", by=900), "front-0 has 97.7 %"),
}


def test_a_server_that_is_well_has_no_findings() -> None:
    """Nor has one that nobody asks."""
    assert list(diagnose(observe())) == []
    idle = Observation(Change(make_reading(1.0), make_reading(1.0)), {}, {})
    assert list(diagnose(idle)) == []


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_limits_is_found(name: str) -> None:
    """With its numbers, its threshold and advice."""
    spoil, numbers = SITUATIONS[name]
    found = {each.name: each for each in diagnose(observe(spoil))}
    assert name in found, sorted(found)
    assert numbers in found[name].numbers
    assert found[name].advice


def test_a_hot_model_and_many_families_are_seen_in_the_list() -> None:
    """A model loaded meanwhile began at zero: its answers before do not count."""
    (hot,) = diagnose(observe(rows=make_rows({"hot.mar": 900, "b": 50, "c": 50})))
    assert (hot.name, "hot.mar gave 90 %" in hot.numbers) == ("one model is most of the load", True)
    (many,) = diagnose(observe(rows=make_rows(dict.fromkeys("abcdefghijkl", 10), families=12)))
    assert (many.name, "12 models of 12 families" in many.numbers) == ("there are many families", True)
    before = make_rows({"hot.mar": 860, "b": 0, "c": 0})
    seen = observe(rows=make_rows({"hot.mar": 900, "b": 50, "c": 50}))
    assert list(diagnose(Observation(seen.change, before, seen.now))) == []


def test_every_rule_has_a_situation() -> None:
    """A rule that no test makes speak may never speak."""
    assert len(diagnosis.RULES) == len(SITUATIONS) + 2


def test_a_small_cache_comes_with_what_room_would_buy() -> None:
    """Two workers' shares: half of 1,600 evicted and missed models would fit with 2 MiB more each, nearly all with 4.

    Misses of models that were never there are no hits with any memory.
    """
    spoiled = spoil_all(
        add("cache_requests", "miss", by=2000),
        add("evictions", "device", by=1900),
        put("shortfall_bytes", make_buckets([2**20, 2**21, 2**22], [100, 900, 1600, 1600], 3e9)),
    )
    (found,) = (each for each in diagnose(observe(spoiled)) if each.name == "the cache is too small")
    assert "at least 86.2 % with 4 MiB and 95 % with 8 MiB more would have been hits" in found.advice
    far = make_buckets([2**20], [0, 1600], 3e12)
    (found,) = (
        each
        for each in diagnose(observe(spoil_all(spoiled, put("shortfall_bytes", far))))
        if each.name == "the cache is too small"
    )
    assert "would have been hits" not in found.advice
