"""Joint scenarios: draws quantile forecasts of many products together, by a correlation archive. No torch.

The samples of every margin are its quantiles at the midpoints of S equal parts of (0, 1): the S numbers that are
closest to its distribution in CRPS (Broecker 2012), for any seed. A scenario only decides which of them are combined
with which of another margin: their order is that of correlated scores. So margins are exact to the last bit, including
floors, caps and atoms. There are two sources of scores:

- `Gaussian`: normal scores Z = L_products E L_time', correlated as the Kronecker product of two small matrices that is
  never formed (Gaussian copula; stratified as in Latin hypercube sampling with dependence, Packham and Schmidt 2010).
- `Templates`: the ranks that past forecast errors had (Schaake shuffle, Clark et al. 2004, on errors).

Random numbers are counter-based, with a stream for each seed and product name. So the scenario of a product depends
only on seed, S and archive, not on other products in the call, on their order, or on the worker. 45 products x 300
steps x 100 scenarios take some 30 ms of one core.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from handlers.base import Float32
from handlers.codecs.deepar import MAX_SAMPLES
from handlers.codecs.deepar_schema import quote_names
from handlers.codecs.features import Float64
from handlers.codecs.tails import ExponentialTails
from handlers.errors import RequestError
from model_store.archives import manifest
from model_store.errors import ArchiveInvalid

LEAST_SAMPLES = 2  #: a single sample of every margin is its median, which is not a scenario
MAX_FLOPS = 10_000_000_000  #: most operations for the scores of one call, some seconds of a core
NOISE_FLOPS = 20  #: operations that a random number counts as
BLOCK_STEPS = 50  #: steps of a score that are computed together; half of a factor's zeros are left out thereby
NOISE_NUMBERS = 1 << 21  #: most normal numbers that are kept at once, 16 MB
NORMALS = 1 << 16  #: different normal numbers, as many as 16 bits count
BITS_PLACES = 4  #: numbers of 16 bits in one of 64
UNIT = 1e-4  #: largest deviation of the rows of a factor from unit length
TEMPLATES = "\0templates"  #: name of the stream that picks templates, which no product has


@dataclass(frozen=True, slots=True, eq=False)
class Marginal:
    """The forecast of one product: `values` [T, levels], sorted along the levels, at `levels` rising within (0, 1).

    The quantile function is linear between the levels, and outside them flat (the tail rule `clamp`) or as `tails`
    says. `name` is the name of the product in the correlation archive. Values within floor and cap give samples within
    them; a flat piece is an atom. `first`: the step of the call at which it starts, so that equal times are correlated.
    """

    name: str
    levels: Float64
    values: Float64
    first: int = 0
    tails: ExponentialTails | None = None

    def quantiles(self, u: Float64) -> Float32:
        """Return the quantiles [T, S] at rising probabilities u [S]; they rise too."""
        inside = np.clip(u, self.levels[0], self.levels[-1])
        above = np.clip(np.searchsorted(self.levels, inside), 1, max(1, len(self.levels) - 1))
        below = above - 1
        above = np.minimum(above, len(self.levels) - 1)  # a single level is an atom
        gap = self.levels[above] - self.levels[below]
        weight = np.divide(inside - self.levels[below], gap, out=np.zeros(len(u)), where=gap > 0)
        low, high = self.values.take(below, axis=1), self.values.take(above, axis=1)
        found = high - low
        found *= weight
        found += low
        np.minimum(found, high, out=found)
        return (found if self.tails is None else self._extend(found, u, self.tails)).astype(np.float32)

    def _extend(self, found: Float64, u: Float64, tails: ExponentialTails) -> Float64:
        """Move the quantiles [T, S] at probabilities outside the levels to where the tail rule has them."""
        under, over = np.searchsorted(u, self.levels[0]), np.searchsorted(u, self.levels[-1], side="right")
        widths = tails.measure_widths(self.values)[:, None]
        found[:, :under] -= tails.reach_below(widths, u[:under], self.levels[0])
        found[:, over:] += tails.reach_above(widths, u[over:], self.levels[-1])
        return tails.bound(found)


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Lower Cholesky factors of two correlation matrices: of N products and of T steps.

    INVARIANT: every product of matrices has a shape that only the archive and the number of samples decide: blocks of
    `BLOCK_STEPS` steps, whole also where a forecast ends within one, and groups of as many sources as `NOISE_NUMBERS`
    allows. So not even rounding depends on what else is wanted, or on how long it is.
    """

    product_factor: Float64  #: [N, N]
    time_factor: Float64  #: [T, T]

    def scores(
        self, names: Sequence[str], wanted: Sequence[tuple[int, int]], samples: int, seed: int
    ) -> Iterator[Float64]:
        """For each wanted (product, steps) its scores [steps, samples].

        A shorter forecast has the leading block of a longer one.
        """
        mixed = self._mix(names, wanted, samples, seed)
        for total, (_, steps) in zip(mixed, wanted, strict=True):
            found = np.empty_like(total)
            for block in self._cut_blocks(steps):
                np.matmul(self.time_factor[block, : block.stop], total[: block.stop], out=found[block])
            yield found[:steps]

    def count_steps(self, steps: int) -> int:
        """Count the steps of whole blocks that so many steps take."""
        return min(-(-steps // BLOCK_STEPS) * BLOCK_STEPS, len(self.time_factor))

    def _cut_blocks(self, steps: int) -> Iterator[slice]:
        """Yield the blocks of steps in which the first so many lie, each whole."""
        for start in range(0, steps, BLOCK_STEPS):
            yield slice(start, self.count_steps(start + BLOCK_STEPS))

    def _mix(
        self, names: Sequence[str], wanted: Sequence[tuple[int, int]], samples: int, seed: int
    ) -> Sequence[Float64]:
        """Return for each wanted (product, steps) its noise [steps of whole blocks, samples], correlated by product."""
        sources = 1 + max(product for product, _ in wanted)
        streams = [make_random_bits(seed, name) for name in names[:sources]]
        mixed = [np.empty((self.count_steps(steps), samples)) for _, steps in wanted]
        together = max(1, NOISE_NUMBERS // (BLOCK_STEPS * samples))
        for block in self._cut_blocks(max(steps for _, steps in wanted)):
            for first in range(0, sources, together):
                noise = draw_normals(streams[first : first + together], (block.stop - block.start) * samples)
                for total, (product, steps) in zip(mixed, wanted, strict=True):
                    if product >= first and steps > block.start:
                        weights = self.product_factor[product, first : min(first + together, product + 1)]
                        part = weights @ noise[: len(weights)]
                        into = total[block].reshape(-1)
                        np.copyto(into, part) if not first else np.add(into, part, out=into)
        return mixed


@dataclass(frozen=True, slots=True, eq=False)
class Templates:
    """Ranks [windows, N, T] of past windows in every margin."""

    ranks: Float32

    def scores(
        self, names: Sequence[str], wanted: Sequence[tuple[int, int]], samples: int, seed: int
    ) -> Iterator[Float64]:
        """For each wanted (product, steps) its scores [steps, samples].

        Windows are drawn without repetition until all have been drawn, then again; ties between equal windows are
        broken at random.
        """
        rounds = -(-samples // len(self.ranks))
        pick = make_random_stream(seed, TEMPLATES)
        chosen = np.concatenate([pick.permutation(len(self.ranks)) for _ in range(rounds)])[:samples]
        for product, steps in wanted:
            apart = make_random_stream(seed, names[product]).random((steps, samples))
            yield self.ranks[chosen, product, :steps].T + apart


class CorrelationModel:
    """A loaded correlation archive. Immutable, shared by all calls that name it."""

    def __init__(self, record: manifest.CorrelationSpec, dependence: Gaussian | Templates) -> None:
        self.products, self.horizon = record.products, record.horizon
        self.dependence = dependence
        self._places = {name: place for place, name in enumerate(record.products)}

    def __repr__(self) -> str:
        """For example `<CorrelationModel Gaussian of 45 products, 300 steps>`."""
        dependence = type(self.dependence).__name__
        return f"<CorrelationModel {dependence} of {len(self.products)} products, {self.horizon} steps>"

    @property
    def charge_bytes(self) -> int:
        """The bytes that the archive takes in memory."""
        found = self.dependence
        arrays = (found.ranks,) if isinstance(found, Templates) else (found.product_factor, found.time_factor)
        return sum(array.nbytes for array in arrays) + sum(200 + len(name) for name in self.products)

    def flops(self, wanted: Sequence[tuple[int, int]], samples: int) -> int:
        """Estimate the floating-point operations for the scores of these (product, steps)."""
        numbers = samples * sum(steps for _, steps in wanted)
        if isinstance(self.dependence, Templates):
            return NOISE_FLOPS * numbers
        whole = [(product, self.dependence.count_steps(steps)) for product, steps in wanted]
        longest = max(steps for _, steps in whole)
        noise = NOISE_FLOPS * (1 + max(product for product, _ in whole)) * longest * samples
        mixing = sum(2 * (product + 1) * steps + 2 * steps * steps for product, steps in whole)
        return noise + mixing * samples

    def place(self, marginal: Marginal, instance: int) -> tuple[int, int]:
        """Return the index of the product and the steps up to its last. Raises RequestError that names both sides."""
        place, steps = self._places.get(marginal.name), marginal.first + len(marginal.values)
        if place is None:
            what = f"the correlation knows nothing of {marginal.name!r}; it has {len(self.products)} products"
            raise RequestError(what + quote_names(self.products), instance=instance, field="configuration.joint")
        if steps > self.horizon:
            until = f"forecasts {steps} steps" if not marginal.first else f"ends {steps} steps after the earliest start"
            what = f"{marginal.name} {until}, but the correlation covers {self.horizon}"
            raise RequestError(what, instance=instance, field="configuration.joint")
        return place, steps


def load_correlation(record: manifest.CorrelationSpec, tensors: Mapping[str, Float32]) -> CorrelationModel:
    """Load and verify the contents of an archive of kind correlation.

    Raises ArchiveInvalid for tensors other than those of `record.tensors`, for factors that do not give a correlation
    matrix, and for ranks that are not ranks.
    """
    for name, shape in record.tensors.items():
        if name not in tensors or tensors[name].shape != shape:
            there = list(tensors[name].shape) if name in tensors else "missing"
            raise ArchiveInvalid(f"the tensor {name!r} is {there}; the record's products and horizon say {list(shape)}")
    if record.method == "schaake":
        ranks = tensors["ranks"]
        if not (np.sort(ranks, axis=0) == np.arange(record.windows, dtype=np.float32)[:, None, None]).all():
            what = f"a margin does not have the ranks 0 to {record.windows - 1}, each once"
            raise ArchiveInvalid(f"the tensor 'ranks': {what}; estimate it again")
        return CorrelationModel(record, Templates(ranks))
    return CorrelationModel(
        record, Gaussian(*(_check_factor(name, tensors[name]) for name in ("product_factor", "time_factor")))
    )


def draw_scenarios(marginals: Sequence[Marginal], correlation: CorrelationModel, samples: int, seed: int) -> Float32:
    """Draw scenarios [S, N, T] of forecasts of equal length; sample s is the same scenario in every product.

    Raises RequestError for a product that is unknown, named twice or too long, for different lengths, for too few or
    too many samples, and for too much work.
    """
    wanted = match_marginals(marginals, correlation, samples, equal_steps=True)
    found = np.empty((samples, len(marginals), len(marginals[0].values)), np.float32)
    for place, block in enumerate(_draw_blocks(marginals, correlation, wanted, samples, seed)):
        found[:, place] = block.T
    return found


def draw_scenarios_each(
    marginals: Sequence[Marginal], correlation: CorrelationModel, samples: int, seed: int
) -> list[Float32]:
    """Draw scenarios [S, T] of each forecast as `draw_scenarios` does, for forecasts of any lengths."""
    wanted = match_marginals(marginals, correlation, samples)
    return [np.ascontiguousarray(block.T) for block in _draw_blocks(marginals, correlation, wanted, samples, seed)]


def make_random_bits(seed: int, name: str) -> np.random.Philox:
    """Make the random bits of a seed and a product: Philox (Salmon et al. 2011), keyed by both."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Philox(key=np.array([seed, key], np.uint64))


def make_random_stream(seed: int, name: str) -> np.random.Generator:
    """Make the random numbers of a seed and a product, see `make_random_bits`."""
    return np.random.Generator(make_random_bits(seed, name))


def draw_normals(streams: Sequence[np.random.Philox], numbers: int) -> Float64:
    """Draw so many normal numbers of each stream: [streams, numbers].

    A normal number is one of `NORMALS` quantiles at the midpoints of equal parts of (0, 1), four of each 64 bits.
    """
    found = np.empty((len(streams), numbers))
    words = -(-numbers // BITS_PLACES)
    for row, stream in zip(found, streams, strict=True):
        bits = stream.random_raw(words).astype("<u8", copy=False).view("<u2")[:numbers]
        _list_normals().take(bits, out=row, mode="wrap")  # all are in range, which other modes look for first
    return found


def compute_midpoints(samples: int) -> Float64:
    """Return the probabilities [S] at which every margin is sampled."""
    found: Float64 = (np.arange(samples) + 0.5) / samples
    return found


def match_marginals(
    marginals: Sequence[Marginal], correlation: CorrelationModel, samples: int, *, equal_steps: bool = False
) -> list[tuple[int, int]]:
    """Return for each marginal its product and the steps up to its last. Raises RequestError as `draw_scenarios`."""
    if samples < LEAST_SAMPLES:
        what = f"joint scenarios need at least {LEAST_SAMPLES} samples: one would be the median of every forecast"
        raise RequestError(what, field="configuration.num_samples")
    wanted = [correlation.place(marginal, i) for i, marginal in enumerate(marginals)]
    numbers = samples * sum(steps for _, steps in wanted)
    if numbers > MAX_SAMPLES:
        what = f"{numbers} numbers of samples are more than {MAX_SAMPLES}; ask for fewer"
        raise RequestError(what, field="configuration.num_samples")
    refuse_repeated((i, marginal.name) for i, marginal in enumerate(marginals))
    if (flops := correlation.flops(wanted, samples)) > MAX_FLOPS:
        what = f"these forecasts take {flops / 1e9:.3g} thousand million floating-point operations to correlate"
        message = f"{what}, {MAX_FLOPS / 1e9:g} are allowed; ask for fewer samples or products"
        raise RequestError(message, field="configuration.num_samples")
    first, (_, steps) = marginals[0], wanted[0]
    for marginal, (_, other) in zip(marginals, wanted, strict=True):
        if equal_steps and marginal.first != first.first:
            what = f"{first.name} and {marginal.name} start at different times; one array cannot hold both"
            raise RequestError(f"{what}: ask for JSON", field="configuration.joint")
        if equal_steps and other != steps:
            what = f"{first.name} forecasts {steps} steps and {marginal.name} {other}; one array cannot hold both"
            raise RequestError(f"{what}: ask for JSON", field="configuration.joint")
    return wanted


def refuse_repeated(names: Iterable[tuple[int, str]]) -> None:
    """Check that no product is named twice, as both would get the same scenarios. Raises RequestError."""
    seen = set[str]()
    for instance, name in names:
        if name in seen:
            message = f"{name} is named twice; a joint call names each product once"
            raise RequestError(message, instance=instance, field="configuration.joint")
        seen.add(name)


def _draw_blocks(
    marginals: Sequence[Marginal],
    correlation: CorrelationModel,
    wanted: Sequence[tuple[int, int]],
    samples: int,
    seed: int,
) -> Iterator[Float32]:
    """Yield the scenarios [T, S] of each marginal: its samples in the order of the scores."""
    u = compute_midpoints(samples)
    scores = correlation.dependence.scores(correlation.products, wanted, samples, seed)
    for marginal, every in zip(marginals, scores, strict=True):
        score = every[marginal.first :]
        block = np.empty(score.shape, np.float32)
        order: npt.NDArray[np.intp] = np.argsort(score, axis=1)
        order += np.arange(0, score.size, samples)[:, None]  # places in the whole block
        block.reshape(-1)[order] = marginal.quantiles(u)
        yield block


@lru_cache(maxsize=1)
def _list_normals() -> Float64:
    """List the `NORMALS` quantiles of the normal distribution, rising."""
    invert = NormalDist().inv_cdf
    lower = np.array([invert((place + 0.5) / NORMALS) for place in range(NORMALS // 2)])
    found: Float64 = np.concatenate([lower, -lower[::-1]])
    found.setflags(write=False)
    return found


def _check_factor(name: str, stored: Float32) -> Float64:
    """Check that a factor is lower triangular with unit rows, that is, of a correlation matrix; returns float64."""
    factor = stored.astype(np.float64)
    lengths = np.sqrt((factor**2).sum(axis=1))
    problem = ""
    if np.triu(factor, 1).any() or (np.diag(factor) <= 0).any():
        problem = "is not lower triangular with a positive diagonal"
    elif (np.abs(lengths - 1) > UNIT).any():
        row = int(np.abs(lengths - 1).argmax())
        problem = f"has a row {row} of length {lengths[row]:.6g}, so the correlation's diagonal is not 1"
    if problem:
        raise ArchiveInvalid(f"the tensor {name!r} {problem}; give the Cholesky factor of a correlation matrix")
    scaled: Float64 = factor / lengths[:, None]
    return scaled
