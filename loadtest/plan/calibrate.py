"""Measures the costs that the planner needs in about twenty seconds: loads, hits and the highest rate.

It measures as a client: latencies from the intended time, by the open-loop driver, and the counters of /metrics. Loads
and hits are measured while hits arrive at the planned rate, because a core that is rarely used enters sleep states: a
hit takes 0.9 ms at 100 requests a second, but 0.7 ms at 150.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from loadtest.driver.open_loop import LoadTarget, send_schedule
from loadtest.driver.profiles import Float64, Schedule, draw_poisson
from loadtest.driver.run_result import CACHE, Run
from loadtest.observe.metrics_sampler import MetricSums, parse_metrics
from loadtest.plan.costs import DEFAULT, Costs, make_sample, subtract_samples
from server import contract

LOAD_RATE, LOADED = 25.0, 80  #: loads a second, so few that no two overlap; maximum number of loads
HIT_RATE, HIT_S, HOT = 100.0, 2.5, 5  #: requests a second, seconds, and models that stay loaded
TIMES, TAIL = 3, 95  #: repetitions, of which the one with the median p95 counts, because a machine has slow moments
#: seconds, requests a second (more than can be answered) and connections of the measurement at full load
FULL_S, FULL_RATE, CONNECTIONS = 1.5, 40_000.0, 32
PATIENCE_S = 10.0
PARTS = 5  #: of a calibration: warming up, loads from the store, loads from disk, hits, full load


@dataclass(frozen=True, slots=True)
class MetricsReading:
    """The counters of /metrics at one moment; empty if there is no metrics address."""

    counts: MetricSums | None
    device: str

    @classmethod
    def at(cls, scrape: Callable[[], str] | None) -> "MetricsReading":
        """Read the metrics now. `scrape` returns the text of /metrics; what it raises is raised."""
        if scrape is None:
            return cls(None, DEFAULT.device)
        text = scrape()
        found = re.search(r'device="(\w+)', text)
        return cls(parse_metrics(text)[0], found[1] if found else DEFAULT.device)

    def gained(self, before: "MetricsReading", name: str) -> float:
        """Return by how much a counter has increased since."""
        if self.counts is None or before.counts is None:
            return 0.0
        return self.counts[name, ""] - before.counts[name, ""]


def calibrate(
    to: LoadTarget,
    scrape: Callable[[], str] | None,
    forget: Callable[[int], None] | None,
    where: str,
    rate: float = HIT_RATE,
    look: Callable[[], None] = lambda: None,
) -> Costs:
    """Measure the costs of a server that has no other load. Loads are measured only for models not loaded yet.

    `forget` unloads a model by its number, so that its next load is from disk; without it such loads are not measured.
    `rate` is the rate of hits meanwhile, in requests a second. `look` is called after each of the PARTS. Raises
    ValueError if no hit is answered, and what `scrape` and `forget` raise.
    """
    hot = range(len(to.requests))[-HOT:] if len(to.requests) > HOT else range(0)
    _warm_up(to, hot)
    look()
    first = _measure_loads(to, hot, rate)
    look()
    again = _choose_middle([_measure_reloads(to, hot, rate, forget) for _ in range(TIMES)]) if forget else first[:0]
    look()
    hot = hot or range(len(to.requests))
    _warm_up(to, hot)
    before = MetricsReading.at(scrape)
    hits = _measure_hits(to, hot, rate)
    look()
    if not len(hits):
        raise ValueError(f"{where}: no request for {len(hot)} models was answered from a loaded model")
    between = MetricsReading.at(scrape)
    full = _measure_full_rate(to, hot)
    look()
    after = MetricsReading.at(scrape)
    workers = after.counts[contract.WORKER_UP.series, ""] if after.counts else 1.0
    step_s, row_s = _compute_step(before, between, after, per_request=max(1.0, workers) / full)
    alone = step_s + row_s
    usual = float(np.median(hits))
    build = make_sample(np.maximum(again - usual, 0)) if len(again) else DEFAULT.build
    get = subtract_samples(make_sample(np.maximum(first - usual, 0)), build) if len(first) else DEFAULT.get
    seen = (
        f"{len(first)} loads from the store, {len(again)} from disk, {len(hits)} hits, {full:,.0f} requests/s at most"
    )
    return Costs(
        said=f"{where}: {seen}",
        device=after.device,
        step_s=step_s,
        row_s=row_s,
        overhead=make_sample(np.maximum(hits - alone, 0)),
        get=get,
        build=build,
    )


def _warm_up(to: LoadTarget, hot: Sequence[int]) -> None:
    """Request each of the models three times, so that they are loaded."""
    if hot:
        _send_requests(to, np.arange(3 * len(hot)) / LOAD_RATE, [*hot] * 3)


def _measure_loads(to: LoadTarget, hot: Sequence[int], rate: float) -> Float64:
    """Measure the seconds of requests that load a model, one for each of the first models, beside `hot` requests."""
    first = np.arange(_count_loaded(to))
    at = first / LOAD_RATE
    beside = draw_poisson(rate, float(at[-1]) + 1 / LOAD_RATE, np.random.default_rng(0)) if hot else np.empty(0)
    models = np.concatenate([first, np.resize(np.array(hot, np.int64), len(beside))])
    order = np.argsort(whole := np.concatenate([at, beside]), kind="stable")
    return _select_latencies(_send_requests(to, whole[order], models[order].tolist()), "miss")


def _measure_reloads(to: LoadTarget, hot: Sequence[int], rate: float, forget: Callable[[int], None]) -> Float64:
    """Measure as `_measure_loads` does, for models that have been loaded before."""
    for model in range(_count_loaded(to)):
        forget(model)
    return _measure_loads(to, hot, rate)


def _measure_hits(to: LoadTarget, hot: Sequence[int], rate: float) -> Float64:
    """Measure the seconds of hits."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(TIMES):
        at = draw_poisson(rate, HIT_S, rng)
        seen.append(_select_latencies(_send_requests(to, at, rng.choice(list(hot), len(at)).tolist()), "hit"))
    return _choose_middle(seen)


def _choose_middle(times: Sequence[Float64]) -> Float64:
    return sorted(times, key=lambda each: float(np.percentile(each, TAIL)) if len(each) else inf)[TIMES // 2]


def _count_loaded(to: LoadTarget) -> int:
    """Count the models to load: the first ones, without the hot ones."""
    count = len(to.requests)
    return min(count - HOT if count > HOT else count, LOADED)


def _measure_full_rate(to: LoadTarget, hot: Sequence[int]) -> float:
    """Measure how many requests a second are answered when more are sent."""
    count = int(FULL_S * FULL_RATE)
    schedule = Schedule(np.arange(count) / FULL_RATE, np.resize(np.array(hot), count), FULL_S)
    run = send_schedule(schedule, to, connections=CONNECTIONS, patience_s=0.0)
    return max(1.0, float((run.status == 200).sum()) / run.ended)  # noqa: PLR2004


def _compute_step(
    before: MetricsReading, between: MetricsReading, after: MetricsReading, per_request: float
) -> tuple[float, float]:
    """Compute the seconds of a step and of each request in it, from steps of about one request and from full steps.

    `per_request` is all the time that a request costs a saturated server, not only its share of a step.
    """
    steps = between.gained(before, contract.BATCH_ROWS.count)
    full_steps = after.gained(between, contract.BATCH_ROWS.count)
    if not steps or not full_steps:
        return 0.0, per_request
    alone = between.gained(before, contract.STEP_SECONDS.series) / steps
    rows_a_step = max(1.0, after.gained(between, contract.BATCH_ROWS.sum) / full_steps)
    if rows_a_step < 2 or alone <= per_request:  # noqa: PLR2004 -- steps that never met more than one request
        return 0.0, per_request
    step_s = min(alone, (alone - per_request) / (1 - 1 / rows_a_step))
    return step_s, max(per_request - step_s / rows_a_step, 1e-9)


def _send_requests(to: LoadTarget, at: Float64, models: list[int]) -> Run:
    seconds = float(at[-1]) + 1e-3
    return send_schedule(Schedule(at, np.array(models), seconds), to, patience_s=PATIENCE_S)


def _select_latencies(run: Run, cache: str) -> Float64:
    """Return the latencies [n], in seconds, of the answers with this cache result and tier."""
    found: Float64 = run.latency[(run.status == 200) & (run.cache == CACHE.index(cache))]  # noqa: PLR2004
    return found
