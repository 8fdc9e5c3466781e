"""Hit ratios of the eviction policies at equal cache size, in the server's own cache, and their CPU cost.

Requests come one after another, and a model that is not resident is always loaded: a cache for 90 % of a fleet can hit
at most 90 % of a tick. Loads take no time, because only the choice of victims is judged. Saves a record.
"""

import gc
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest import record
from loadtest.driver.profiles import Profile, Schedule, Tick
from model_store.cache.cache import Cache, Placed
from model_store.cache.eviction import POLICIES, make_policy
from model_store.cache.victim_selection import Evict, Moves
from model_store.names import ModelName

FLEET, TICKS, EVERY_S = 640, 15, 300.0
SHARES = (0.9, 0.5, 0.1)
SLAB, ROW = 2**20, 2**16  #: sixteen rows to a slab
MIXED_SLAB, MIXED_BYTES = 4 * 2**20, 16 * 2**20
MIXED = {"mlp": (10, 1_800_000), "tcn": (40, 70_000), "lear": (40, 71_000), "dlinear": (40, 72_000)}  #: models, bytes

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


class CachedModel(NamedTuple):
    """A model as a cache sees it."""

    name: ModelName
    charge: int
    family: str


@dataclass(frozen=True, slots=True, eq=False)
class CacheTrace:
    """Requests and their times in seconds. The first `warm` requests only fill the cache."""

    asked: Sequence[CachedModel]
    at: Sequence[float]
    warm: int


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    seed: Annotated[int, typer.Option(help="random seed of the traces")] = 0,
    rounds: Annotated[int, typer.Option(min=3, help="number of alternating measurements of the cost")] = 7,
) -> None:
    """Measure every policy."""
    before = record.describe_machine()
    found: dict[str, Any] = {"hits": {}, "after_change": {}}
    for name, trace in track(make_traces(seed).items(), "hits", transient=True, console=CONSOLE):
        found["hits"][name] = {
            str(share): _judge_policies(trace, compute_share_bytes(trace, share), SLAB) for share in SHARES
        }
    for name, trace in make_mixed_traces(seed).items():
        found["hits"][name] = {"16 MiB": _judge_policies(trace, MIXED_BYTES, MIXED_SLAB)}
    for name, shuffled in (("fixed order", False), ("shuffled", True)):
        found["after_change"][name] = {
            policy: measure_recovery(policy, shuffled=shuffled, seed=seed) for policy in POLICIES
        }
    found["us_a_request"] = measure_costs(seed, rounds)
    for table in _make_result_tables(found):
        CONSOLE.print(table)
    CONSOLE.print(f"record: {record.save_record('policies', seed, before, found)}")


# --- traces ---------------------------------------------------------------------------------------------------------


def make_models(models: int, family: str = "tcn", charge: int = ROW) -> list[CachedModel]:
    """Make models of one family."""
    return [CachedModel(ModelName(f"{family}/{i:05}.mar"), charge, family) for i in range(models)]


def make_traces(seed: int = 0, models: int = FLEET) -> dict[str, CacheTrace]:
    """Make three deciding traces (a tick in fixed order, a shuffled one, Zipf with drift), and other plausible ones."""
    half, known = models // 2, make_models(models)
    often = _make_ticks(half, 48, seed, shuffled=True)
    seldom = Tick(half, 12 * EVERY_S, 1.0, shuffled=True, seed=seed + 1).schedule(48 * EVERY_S)
    tick, zipf = (
        _make_ticks(half, TICKS, seed, shuffled=True),
        _draw_zipf(half, TICKS * half, seed, drift_s=1000, rate=1.0),
    )
    shuffled = _make_ticks(models, TICKS, seed, shuffled=True)
    return {
        "tick, fixed order": _make_trace(known, _make_ticks(models, TICKS)),
        "tick, shuffled": _make_trace(known, shuffled),
        "Zipf with drift": _make_trace(known, _draw_zipf(models, TICKS * models, seed, drift_s=20)),
        "Zipf with much drift": _make_trace(known, _draw_zipf(models, TICKS * models, seed, drift_s=2)),
        "fixed order, no pauses": _make_trace(known, _make_ticks(models, TICKS, pauses=False)),
        "shuffled, no pauses": _make_trace(known, _make_ticks(models, TICKS, seed, shuffled=True, pauses=False)),
        "tick, each five times": _make_trace(known, _merge_schedules(*[shuffled] * 5)),
        "two ticks, one twelve times as often": _make_trace(
            known, _merge_schedules(often, _shift_models(seldom, half))
        ),
        "tick over Zipf": _make_trace(known, _merge_schedules(tick, _shift_models(zipf, half))),
    }


def make_mixed_traces(seed: int = 0) -> dict[str, CacheTrace]:
    """Make traces of families of very different row sizes, for a cache of few slabs."""
    models = [model for family, (count, charge) in MIXED.items() for model in make_models(count, family, charge)]
    asked = np.random.default_rng(seed).integers(0, len(models), 60 * len(models))
    return {
        "four families, by chance": _make_trace(models, Schedule(np.arange(len(asked)) / 10, asked, len(asked) / 10)),
        "four families, tick": _make_trace(models, _make_ticks(len(models), 60)),
    }


def make_change_trace(at: int, ticks: int, *, shuffled: bool, seed: int = 0, models: int = FLEET) -> CacheTrace:
    """Make ticks; from tick `at` on, a drawn fifth of the fleet is replaced by other models."""
    ticking = _make_ticks(models, ticks, seed, shuffled=shuffled)
    gone = np.random.default_rng(seed).permutation(models)[: models // 5]
    asked = ticking.model.copy()
    asked[at * models :] += models * np.isin(asked[at * models :], gone)
    return _make_trace(make_models(2 * models), Schedule(ticking.at, asked, ticking.seconds))


def _make_trace(models: Sequence[CachedModel], due: Schedule) -> CacheTrace:
    return CacheTrace([models[i] for i in due.model.tolist()], due.at.tolist(), len(due.at) // 3)


def _make_ticks(models: int, ticks: int, seed: int = 0, *, shuffled: bool = False, pauses: bool = True) -> Schedule:
    return Tick(models, EVERY_S, 1.0 if pauses else EVERY_S, shuffled, seed).schedule(ticks * EVERY_S)


def _draw_zipf(models: int, requests: int, seed: int, drift_s: float, rate: float = 100.0) -> Schedule:
    profile = Profile(models, rate=rate, zipf=0.9, seed=seed, drift_s=drift_s, drift_share=0.02)
    return profile.schedule(requests / rate)


def _shift_models(due: Schedule, first: int) -> Schedule:
    """Shift the model numbers so that they start at `first`."""
    return Schedule(due.at, first + due.model, due.seconds)


def _merge_schedules(*loads: Schedule) -> Schedule:
    """Merge schedules into one."""
    at = np.concatenate([due.at for due in loads])
    order = np.argsort(at, kind="stable")
    return Schedule(at[order], np.concatenate([due.model for due in loads])[order], loads[0].seconds)


# --- what is measured -----------------------------------------------------------------------------------------------


def compute_share_bytes(trace: CacheTrace, share: float) -> int:
    """Compute the bytes of a share of all requested models, in whole slabs."""
    total = sum(model.charge for model in set(trace.asked))
    return int(share * total) // SLAB * SLAB


def serve_request(cache: Cache, trace: CacheTrace) -> Iterator[bool]:
    """Serve each request from start to end; yields whether its model was resident."""
    for model, now in zip(trace.asked, trace.at, strict=True):
        slot = cache.lease(model.name, now)
        if slot is not None:
            cache.release(slot)
        else:
            cache.want(model.name, now)
            load_model(cache, model, now)
        yield slot is not None


def load_model(cache: Cache, model: CachedModel, now: float) -> None:
    """Load a model, from `want` to `ready`. No slot is leased, so the cache finds room."""
    while not isinstance(placement := cache.place(model.name, "", model.charge, now, model.family), Placed):
        assert isinstance(placement, Evict | Moves), f"{cache!r} has no room for {model.name}: {placement}"
        if isinstance(placement, Evict):
            for victim in placement.victims:
                cache.retired(victim)
        else:
            for slot, offset in placement.moves:
                cache.moved(slot, offset)
    cache.ready(placement.slot, now)


def compute_hit_ratio(policy: str, trace: CacheTrace, cache_bytes: int, slab_bytes: int = SLAB) -> float:
    """Compute the hit ratio of the requests after the warm-up."""
    cache = Cache(cache_bytes, slab_bytes, policy=make_policy(policy))
    hits = list(serve_request(cache, trace))
    return statistics.fmean(hits[trace.warm :])


def measure_recovery(policy: str, *, shuffled: bool, seed: int = 0, models: int = FLEET) -> list[float]:
    """Return the hit ratio of the tick before a fifth of the fleet changes, of that tick and the next four, at 90 %."""
    trace = make_change_trace(8, 13, shuffled=shuffled, seed=seed, models=models)
    cache = Cache(int(0.9 * models * ROW) // SLAB * SLAB, SLAB, policy=make_policy(policy))
    hits = np.fromiter(serve_request(cache, trace), float).reshape(13, models).mean(axis=1)
    return [float(ratio) for ratio in hits[7:]]


def measure_costs(seed: int, rounds: int) -> Mapping[str, Mapping[str, Any]]:
    """Measure the microseconds of cache and policy per request, and their ratio to those of LRU in the same round."""
    cases = {name: trace for name, trace in make_traces(seed).items() if name in ("tick, shuffled", "Zipf with drift")}
    found: dict[str, Mapping[str, Any]] = {}
    for name, trace in cases.items():
        seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for _ in track(range(rounds), f"cost, {name}", transient=True, console=CONSOLE):
            for policy, times in seconds.items():
                times.append(_time_policy(policy, trace))
        found[name] = {
            policy: {
                "us": record.summarise_spread([1e6 * each / len(trace.asked) for each in times]),
                "ratio": record.summarise_spread([each / lru for each, lru in zip(times, seconds["lru"], strict=True)]),
            }
            for policy, times in seconds.items()
        }
    return found


def _time_policy(policy: str, trace: CacheTrace) -> float:
    gc.collect()
    started = time.perf_counter()
    compute_hit_ratio(policy, trace, compute_share_bytes(trace, 0.9))
    return time.perf_counter() - started


def _judge_policies(trace: CacheTrace, cache_bytes: int, slab_bytes: int) -> dict[str, float]:
    return {policy: compute_hit_ratio(policy, trace, cache_bytes, slab_bytes) for policy in POLICIES}


# --- what is shown --------------------------------------------------------------------------------------------------


def _make_result_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    table = Table("trace", "cache", *POLICIES, title="hit ratio")
    for name, sizes in found["hits"].items():
        for size, ratios in sizes.items():
            table.add_row(name, size, *(f"{ratios[policy]:.3f}" for policy in POLICIES))
    yield table
    table = Table("tick", "policy", "before", "change", "1", "2", "3", "4", title="hit ratio after a fifth is replaced")
    for name, rows in found["after_change"].items():
        for policy, ratios in rows.items():
            table.add_row(name, policy, *(f"{ratio:.3f}" for ratio in ratios))
    yield table
    table = Table("trace", "policy", "us a request", "of LRU's", title="cost of the cache's decisions, at 90 %")
    for name, rows in found["us_a_request"].items():
        for policy, row in rows.items():
            table.add_row(name, policy, f"{row['us']['median']:.2f}", f"{row['ratio']['median']:.2f}")
    yield table
