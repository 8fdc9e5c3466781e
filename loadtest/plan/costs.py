"""The costs of hits, steps and loads as measured on a machine; the simulation draws its times from them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtest.driver.profiles import Float64

POINTS = 201  #: most values of a distribution

Sample = tuple[float, ...]  #: seconds, sorted: evenly spaced quantiles from the smallest to the largest


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each operation alone on an idle server. A distribution is the sorted sample, at most POINTS values.

    A hit takes `overhead` (client, network, front) and a step of `step_s` + `row_s` for every request in it. A load
    takes `get` if the store is asked, then `build` (read, verify, place), a part of which needs the worker's
    interpreter as steps do.
    """

    said: str
    device: str = "cpu"
    step_s: float
    row_s: float
    overhead: Sample
    get: Sample
    build: Sample

    def __post_init__(self) -> None:
        for name in ("overhead", "get", "build"):
            values = getattr(self, name)
            if not values or min(values) < 0 or any(b < a for a, b in pairwise(values)):
                raise ValueError(f"the costs' `{name}` must be seconds from the smallest to the largest")
        if self.step_s < 0 or self.row_s <= 0:
            raise ValueError("the costs' `row_s` must be above 0 seconds, `step_s` at least 0")

    def faster(self, speed: float) -> "Costs":
        """Return the costs on cores `speed` times as fast, with the same store."""
        quick = {name: tuple(v / speed for v in getattr(self, name)) for name in ("overhead", "build")}
        return msgspec.structs.replace(self, step_s=self.step_s / speed, row_s=self.row_s / speed, **quick)


#: The medians of our records of November 2026 (two cores of an AMD EPYC, JSON bodies of 11 KB, 17,528 parameters):
#: `warm`, 0.148 ms at one connection and 19,168 requests/s at 32; `cold`, 1.3 ms from a GET's end to the answer. The
#: store is Amazon S3 as its user guide describes it, "consistent small object latencies of roughly
#: 100-200 milliseconds".
DEFAULT = Costs(
    said="our records of 2026-11 (2 cores of an AMD EPYC), Amazon S3 at 100-200 ms a GET: measure yours",
    step_s=30e-6,
    row_s=52e-6,
    overhead=(66e-6, 70e-6, 80e-6, 120e-6, 400e-6),
    get=(0.1, 0.12, 0.15, 0.2),
    build=(0.9e-3, 1.3e-3, 1.5e-3, 2.5e-3),
)


def make_sample(seconds: Sequence[float] | Float64) -> Sample:
    """Make a distribution of measured values. Raises ValueError if there are none."""
    values = np.sort(np.asarray(seconds, np.float64))
    if not len(values):
        raise ValueError("nothing was measured")
    if len(values) > POINTS:
        values = np.quantile(values, np.linspace(0, 1, POINTS))
    return tuple(float(f"{value:.4g}") for value in values)


def subtract_samples(longer: Sample, shorter: Sample) -> Sample:
    """Subtract a distribution from a longer one, percentile by percentile; negative differences become zero."""
    levels = np.linspace(0, 1, POINTS)
    difference = _interpolate_levels(longer, levels) - _interpolate_levels(shorter, levels)
    return make_sample(np.maximum.accumulate(np.maximum(difference, 0.0)))


def draw_seconds(seen: Sample, count: int, rng: np.random.Generator) -> Float64:
    """Draw seconds [count] from a distribution."""
    return _interpolate_levels(seen, rng.random(count))


def _interpolate_levels(seen: Sample, levels: Float64) -> Float64:
    return np.interp(levels, np.linspace(0, 1, len(seen)), seen)


# --- files ----------------------------------------------------------------------------------------------------------


def read_costs(path: Path) -> Costs:
    """Read costs from a file of `calibrate --out` or of a load run. Raises ValueError that names the file, OSError."""
    data = path.read_bytes()
    try:
        found: Mapping[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        return make_run_costs(found, path.name) if "results" in found else msgspec.convert(found, Costs)
    except (msgspec.MsgspecError, ValueError) as wrong:
        message = f"{path} holds neither the costs that `fleetcast-load calibrate` writes nor a load run: {wrong}"
        raise ValueError(message) from wrong


def make_run_costs(record: Mapping[str, Any], name: str) -> Costs:
    """Derive costs from a load run: the latency of its hits, and the server's load times by tier. Raises ValueError.

    The hits and loads of a run delay each other, so that the result is pessimistic. A run does not measure the time of
    a step, which is taken from DEFAULT.
    """
    from loadtest.report.results_schema import check_record, decode_histogram  # noqa: PLC0415 -- hdrhistogram, for this way alone

    run = check_record(record)["results"]
    if "hit" not in run["latency"]:
        raise ValueError("no request of the run was a hit")
    hits = decode_histogram(run["latency"]["hit"]).get_percentile_to_value_dict([*np.linspace(0, 100, POINTS).tolist()])
    alone = DEFAULT.step_s + DEFAULT.row_s
    overhead = make_sample([max(0.0, us / 1e6 - alone) for us in hits.values()])
    loads = (run["load_time"] or {}).items()
    times = {tier: _sample_buckets(each["le_s"], each["count"]) for tier, each in loads if any(each["count"][:-1])}
    build = times.get("disk", DEFAULT.build)
    get = subtract_samples(times["store"], build) if "store" in times else DEFAULT.get
    said = f"the load run {name}: its hits and loads; a step as in our records of 2026-11"
    return Costs(said=said, step_s=DEFAULT.step_s, row_s=DEFAULT.row_s, overhead=overhead, get=get, build=build)


def _sample_buckets(bounds: Sequence[float | None], counts: Sequence[float]) -> Sample:
    """Turn a histogram into a distribution, evenly between its bounds; the last bound, None, is ignored."""
    filled = np.flatnonzero(counts[:-1])
    first, last = int(filled[0]), int(filled[-1])
    ends = np.array([0.0, *bounds[:-1]], np.float64)[first : last + 2]
    share = np.cumsum([0.0, *counts[first : last + 1]]) / sum(counts[first : last + 1])
    return make_sample(np.interp(np.linspace(0, 1, POINTS), share, ends))
