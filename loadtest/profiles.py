"""Load profiles: when requests are due and which model each asks for, as arrays. Pure: no clock, no I/O.

The same profile gives the same schedule to the last bit. Each part draws from a generator of its own, so that more
seconds or another rate do not change which models are popular.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MIN_REQUESTS, MAX_REQUESTS = 20, 5_000_000  #: fewer have no percentiles, more take hundreds of megabytes
_POPULARITY, _ARRIVALS, _CHOICES = range(3)


class Arrivals(StrEnum):
    """How requests follow each other."""

    POISSON = "poisson"  #: independent clients
    CONSTANT = "constant"  #: a metronome


@dataclass(frozen=True, slots=True)
class Profile:
    """A load over `models` models: `rate` requests a second on average, popularity of rank r as 1 / r ** `zipf`."""

    models: int
    rate: float
    zipf: float = 1.0
    arrivals: Arrivals = Arrivals.POISSON
    seed: int = 0

    def schedule(self, seconds: float, part: int = 0) -> "Schedule":
        """The load for so long; other parts, such as a warm-up, have other arrivals but the same popular models.

        Raises ValueError for fewer than MIN_REQUESTS or more than MAX_REQUESTS.
        """
        expected = self.rate * seconds
        if self.models < 1 or self.zipf < 0 or not MIN_REQUESTS <= expected <= MAX_REQUESTS:
            raise ValueError(
                f"{self.rate:g} requests/s for {seconds:g} s over {self.models} models, zipf {self.zipf:g}: a load has "
                f"{MIN_REQUESTS} to {MAX_REQUESTS} requests, at least one model, and zipf of at least 0"
            )
        at = constant(self.rate, seconds)
        if self.arrivals is Arrivals.POISSON:
            at = poisson(self.rate, seconds, np.random.default_rng([self.seed, _ARRIVALS, part]))
        popularity = zipf(self.models, self.zipf, np.random.default_rng([self.seed, _POPULARITY]))
        choices = np.random.default_rng([self.seed, _CHOICES, part])
        return Schedule(at, choices.choice(self.models, size=len(at), p=popularity), seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Requests: `at` [n] seconds from the start, never falling; `model` [n] which of the models; how long in all."""

    at: Float64
    model: Int64
    seconds: float


def constant(rate: float, seconds: float) -> Float64:
    """Arrivals every 1 / rate seconds from 0 on."""
    return np.arange(round(rate * seconds)) / rate


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> Float64:
    """A Poisson process: its number of arrivals is Poisson, and given that, they are independent and uniform."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def zipf(models: int, exponent: float, rng: np.random.Generator) -> Float64:
    """[models] how likely each is asked; who is popular is drawn, so that names next to each other are not."""
    weights = np.arange(1, models + 1, dtype=np.float64) ** -exponent
    return rng.permutation(weights / weights.sum())
