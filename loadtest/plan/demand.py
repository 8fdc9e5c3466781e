"""The demand to plan for: requests, models and their sizes, as arrays. A million models take some megabytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, TypeAdapter, ValidationError

from loadtest.driver.profiles import Int64, Load, Schedule
from loadtest.driver.trace import Trace, read_trace
from loadtest.fleets.fleet import list_fleet_names, parse_sizes
from model_store.names import ModelName

UInt64 = npt.NDArray[np.uint64]

CLASSES = 5  #: number of model sizes; models of one size are one family, which shares memory and batches
WARM_SHARE = 0.2  #: share of a trace that only fills the caches and is not counted
WARMUP = 1  #: number of the part of a profile that only fills the caches


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Requests of `schedule` for the models `names` [m], of `charge` [m] bytes of cache each; `warm` comes before.

    Models of one charge are one family. `said` describes the demand in a sentence.
    """

    schedule: Schedule
    warm: Schedule | None
    names: Sequence[ModelName]
    charge: Int64
    said: str

    def __repr__(self) -> str:
        return f"<Demand of {len(self.schedule.at)} requests for {len(self.names)} models>"

    @property
    def rate(self) -> float:
        """The number of requests a second."""
        return len(self.schedule.at) / self.schedule.seconds

    @property
    def fleet_bytes(self) -> int:
        """The bytes of all models together."""
        return int(self.charge.sum())

    def asked(self) -> Int64:
        """Count the requests [m] of each model, including those of `warm`."""
        counts = np.bincount(self.schedule.model, minlength=len(self.names))
        if self.warm is not None:
            counts = counts + np.bincount(self.warm.model, minlength=len(self.names))
        return counts

    def keys(self) -> UInt64:
        """Hash each name: keys [m] that are the same in every run and on every machine."""
        digest = hashlib.blake2b
        found = b"".join(digest(name.encode(), digest_size=8).digest() for name in self.names)
        return np.frombuffer(found, np.uint64)


def mix_keys(keys: UInt64, salt: int) -> UInt64:
    """Hash keys again, independently for every salt, by splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def make_trace_demand(path: Path, size: str | None) -> Demand:
    """Make the demand of a trace; `size` (see `draw_charges`) is used for models whose size it does not contain.

    The first WARM_SHARE of its time fills the caches. Raises TraceInvalid, OSError, ValueError.
    """
    trace = read_trace(path)
    whole = trace.recording()
    cut = int(np.searchsorted(whole.at, whole.seconds * WARM_SHARE))
    if cut in (0, len(whole.at)):
        raise ValueError(f"{path}: {len(whole.at)} requests are too few to plan from")
    start = float(whole.at[cut])
    warm = Schedule(whole.at[:cut], whole.model[:cut], start)
    counted = Schedule(whole.at[cut:] - start, whole.model[cut:], whole.seconds - start)
    said = f"{path.name}: {len(counted.at):,} requests in {counted.seconds:,.0f} s after {cut:,} that fill the caches"
    return Demand(counted, warm, trace.names, _charges_of(trace, size), said)


def make_profile_demand(load: Load, seconds: float, warmup: float, size: str) -> Demand:
    """Make the demand of a profile, with the names of a test fleet. Raises ValueError for a wrong profile or size."""
    schedule = load.schedule(seconds)
    warm = load.schedule(warmup, WARMUP) if warmup else None
    said = f"{load.models:,} models, {len(schedule.at) / seconds:,.4g} requests/s for {seconds:g} s"
    return Demand(schedule, warm, list_fleet_names(load.models), draw_charges(size, load.models), said)


def draw_charges(size: str, models: int) -> Int64:
    """Draw the bytes [models] of models: `70KB` each, or `70KB:1` lognormal around that median, in CLASSES sizes.

    Raises ValueError.
    """
    if ":" not in size:
        try:
            each = int(TypeAdapter(ByteSize).validate_python(size))
        except ValidationError:
            each = 0
        if each <= 0:
            raise ValueError(f"the model size {size!r}: give bytes such as 70KB, or MEDIAN:SIGMA such as 70KB:1")
        return np.full(models, each, np.int64)
    median, sigma = parse_sizes(size)
    law = NormalDist(0, sigma)
    sizes = [round(median * np.exp(law.inv_cdf((i + 0.5) / CLASSES))) for i in range(CLASSES)]
    return np.array(sizes, np.int64)[np.arange(models) % CLASSES]


def _charges_of(trace: Trace, size: str | None) -> Int64:
    """Return the last size of each model in the trace."""
    found = np.zeros(len(trace.names), np.int64)
    known = trace.size > 0
    found[trace.model[known]] = trace.size[known]
    unknown = found == 0
    if unknown.any():
        if size is None:
            first = trace.names[int(unknown.argmax())]
            raise ValueError(f"the trace has no size of {unknown.sum()} models, such as {first}: give --model-size")
        found[unknown] = draw_charges(size, int(unknown.sum()))
    return found
