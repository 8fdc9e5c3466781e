"""Joint scenarios keep every margin, carry the archive's dependence, and depend on nothing but seed, S and archive."""

import gzip
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import scoringrules

from handlers.codecs.features import Float64
from handlers.codecs.scenarios import (
    CorrelationModel,
    Gaussian,
    Marginal,
    compute_midpoints,
    draw_scenarios,
    draw_scenarios_each,
    load_correlation,
)
from handlers.errors import RequestError
from handlers.evaluation.correlation import compute_pit, estimate_gaussian, estimate_schaake
from handlers.training.time_series import read_csv
from model_store.archives import manifest
from model_store.errors import ArchiveInvalid

LEVELS = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
SNAPSHOT = "nem/nem_5region_9product_1000intervals_2019.csv.gz"
HOURLY = "nem/nsw_vic_hourly_2020_2024.csv.gz"


def find_real(file: str) -> Path:
    """A file of real prices, or the test is skipped."""
    path = Path(os.environ.get("FLEETCAST_DATA", ""), file)
    if not path.is_file():
        pytest.skip(f"FLEETCAST_DATA names no folder with {file}")
    return path


def make_ar1(rho: float, size: int) -> Float64:
    """The correlation matrix with entries rho ** distance."""
    steps = np.arange(size)
    return np.asarray(rho ** np.abs(steps[:, None] - steps))


def gaussian_of(products: Float64, steps: Float64, names: Sequence[str] = ()) -> CorrelationModel:
    """An archive's correlation made by hand."""
    names = tuple(names) or tuple(f"p{i}" for i in range(len(products)))
    record = manifest.CorrelationSpec(products=names, horizon=len(steps), method="gaussian", windows=100)
    factors = [np.linalg.cholesky(matrix).astype(np.float32) for matrix in (products, steps)]
    return load_correlation(record, dict(zip(("product_factor", "time_factor"), factors, strict=True)))


def marginals_of(correlation: CorrelationModel, steps: int = 0, seed: int = 0) -> list[Marginal]:
    """Different margins for every product and step."""
    rng = np.random.default_rng(seed)
    shape = (len(correlation.products), steps or correlation.horizon, len(LEVELS))
    values = np.cumsum(rng.random(shape), axis=-1) * 20 + rng.normal(50, 20, (*shape[:2], 1))
    return [Marginal(name, LEVELS, each) for name, each in zip(correlation.products, values, strict=True)]


@pytest.mark.slow
def test_work_is_bounded_before_it_starts() -> None:
    """What the scores of many products over many steps take is known from shapes, and refused with the numbers."""
    correlation = gaussian_of(np.eye(40), make_ar1(0.5, 1500))
    asked = marginals_of(correlation)
    with pytest.raises(RequestError, match=r"[\d.]+ thousand million.*, 10 are allowed") as caught:
        draw_scenarios_each(asked, correlation, 60, 0)
    assert caught.value.field == "configuration.num_samples"
    assert len(draw_scenarios_each(asked[:2], correlation, 2, 0)) == 2


def shuffle_margins(samples: Any, seed: int = 0) -> Any:
    """The same margins [S, N, T] without any dependence."""
    return np.random.default_rng(seed).permuted(samples, axis=0)


def score_scenarios(actual: Any, samples: Any) -> tuple[float, float, Any]:
    """Energy and variogram score of scenarios [S, ...] against what came [...], and the CRPS of every margin."""
    flat, truth = samples.reshape(len(samples), -1).astype(np.float64), actual.ravel().astype(np.float64)
    crps = scoringrules.crps_ensemble(truth, flat.T, backend="numpy")
    energy = scoringrules.es_ensemble(truth, flat, backend="numpy")
    return float(energy), float(scoringrules.vs_ensemble(truth, flat, backend="numpy")), crps


def correlate_ranks(a: Any, b: Any) -> float:
    """Rank correlation of two samples."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


FOUR = gaussian_of(make_ar1(0.8, 4), make_ar1(0.9, 6))


def test_margins_are_kept_to_the_bit() -> None:
    """Whatever the seed, every product and step has exactly the quantiles at the midpoints, each once."""
    marginals = marginals_of(FOUR)
    for seed in (1, 2):
        found = draw_scenarios(marginals, FOUR, 50, seed)
        assert (found.shape, str(found.dtype), found.flags.c_contiguous) == ((50, 4, 6), "float32", True)
        for place, marginal in enumerate(marginals):
            np.testing.assert_array_equal(np.sort(found[:, place], axis=0).T, marginal.quantiles(compute_midpoints(50)))


def test_quantiles_are_linear_between_levels_and_flat_outside() -> None:
    """The same quantile function that single models are sampled by (tail rule clamp)."""
    values = np.array([[1.0, 2.0, 3.0, 5.0, 9.0], [-4.0, -4.0, 0.0, 0.0, 1.0]])
    u = np.sort(np.concatenate([np.linspace(0.001, 0.999, 97), LEVELS]))
    expected = np.stack([np.interp(u, LEVELS, row) for row in values])
    np.testing.assert_allclose(Marginal("p", LEVELS, values).quantiles(u), expected, rtol=1e-6)
    single = Marginal("p", np.array([0.5]), np.array([[7.0]]))
    np.testing.assert_array_equal(single.quantiles(u), np.full((1, len(u)), 7.0))


def test_floor_cap_and_zero_prices_survive() -> None:
    """No sample leaves [floor, cap]; half of the probability at exactly zero is half of the samples at exactly zero."""
    floor, cap = -1000.0, 17_500.0
    values = np.tile(np.array([floor, 0.0, 0.0, 0.0, cap]), (6, 1))
    found = draw_scenarios([Marginal(name, LEVELS, values) for name in FOUR.products], FOUR, 200, 5)
    assert (found.min(), found.max()) == (floor, cap)
    assert ((found == 0).sum(axis=0) == 100).all()


def test_the_dependence_is_the_archives() -> None:
    """Rank correlations are those of the Kronecker product: 6 / pi asin(r / 2) of the normal ones (Pearson 1907)."""
    found = draw_scenarios(marginals_of(FOUR), FOUR, 4000, 3).reshape(4000, 24)
    whole = np.kron(make_ar1(0.8, 4), make_ar1(0.9, 6))
    for a, b in ((0, 1), (0, 5), (0, 6), (3, 9), (0, 23), (7, 20)):
        assert correlate_ranks(found[:, a], found[:, b]) == pytest.approx(
            6 / np.pi * np.arcsin(whole[a, b] / 2), abs=0.04
        )


@pytest.mark.slow
def test_a_seed_means_the_same_in_every_call_and_process() -> None:
    """A product's scenario does not change with the order of requests, with what else is asked, or with the worker."""
    marginals = marginals_of(FOUR)
    found = draw_scenarios(marginals, FOUR, 64, 11)
    np.testing.assert_array_equal(draw_scenarios(marginals[::-1], FOUR, 64, 11), found[:, ::-1])
    for place, marginal in enumerate(marginals):
        np.testing.assert_array_equal(draw_scenarios([marginal], FOUR, 64, 11)[:, 0], found[:, place])
    assert (draw_scenarios(marginals, FOUR, 64, 12) != found).any()
    code = (
        "import sys; from tests.handlers.codecs.test_scenarios import *; "
        "sys.stdout.buffer.write(draw_scenarios(marginals_of(FOUR), FOUR, 64, 11)[:, 1:].tobytes())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert other.stdout == found[:, 1:].tobytes()


def test_a_shorter_forecast_has_the_leading_block() -> None:
    """Its scenarios are those of the longer one's first steps, also beside one that is longer."""
    long, short = marginals_of(FOUR), [Marginal(m.name, m.levels, m.values[:4]) for m in marginals_of(FOUR)]
    found = draw_scenarios(long, FOUR, 40, 2)
    np.testing.assert_array_equal(draw_scenarios(short, FOUR, 40, 2), found[..., :4])
    mixed = draw_scenarios_each([short[0], long[1]], FOUR, 40, 2)
    np.testing.assert_array_equal(mixed[0], found[:, 0, :4])
    np.testing.assert_array_equal(mixed[1], found[:, 1])


LONG = gaussian_of(make_ar1(0.8, 5), make_ar1(0.95, 130))  #: three blocks of steps, the last of 30


def list_scores(wanted: Sequence[tuple[int, int]], samples: int, seed: int = 6) -> list[Float64]:
    """The scores of `LONG` for (product, steps)."""
    return list(LONG.dependence.scores(LONG.products, wanted, samples, seed))


@pytest.mark.parametrize("samples", [2, 7, 100, 9001])  # of 9001, four sources' noise is kept at once
def test_scores_do_not_depend_on_what_else_is_wanted(samples: int) -> None:
    """Not even in the last bit: alone or beside others, in any order, and of whatever length."""
    whole = list_scores([(product, 130) for product in range(5)], samples)
    lengths = (1, 49, 50, 51, 99, 100, 101, 130)
    for product in (0, 3, 4):
        for steps in lengths[:: 1 if samples < 1000 else 3]:
            (alone,) = list_scores([(product, steps)], samples)
            np.testing.assert_array_equal(alone, whole[product][:steps], strict=True)
    mixed = list_scores([(4, 51), (1, 130), (2, 3)], samples)
    for found, (product, steps) in zip(mixed, [(4, 51), (1, 130), (2, 3)], strict=True):
        np.testing.assert_array_equal(found, whole[product][:steps], strict=True)


def test_scores_are_the_product_of_both_factors_and_noise() -> None:
    """Blocks and groups change rounding alone. Unit factors show the noise."""
    samples = 9001
    plain = gaussian_of(np.eye(5), np.eye(130), LONG.products)
    noise = np.stack(list(plain.dependence.scores(LONG.products, [(each, 130) for each in range(5)], samples, 6)))
    factors = LONG.dependence
    assert isinstance(factors, Gaussian)
    expected = np.einsum("nm,tu,mus->nts", factors.product_factor, factors.time_factor, noise, optimize=True)
    found = np.stack(list_scores([(each, 130) for each in range(5)], samples))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_noise_is_normal_and_independent() -> None:
    """Its quantiles are those of the normal distribution, as far as so many numbers can tell."""
    plain = gaussian_of(np.eye(3), np.eye(60))
    noise = np.stack(list(plain.dependence.scores(plain.products, [(each, 60) for each in range(3)], 4001, 9)))
    flat = np.sort(noise.ravel())
    u = (np.arange(flat.size) + 0.5) / flat.size
    expected = np.vectorize(NormalDist().cdf)(flat[::97])
    assert np.abs(expected - u[::97]).max() < 1.95 / flat.size**0.5  # Kolmogorov: passed by one in a thousand
    assert abs(flat.std() - 1) < 0.005
    rows = np.corrcoef(noise.reshape(180, -1)) - np.eye(180)
    assert np.abs(rows).max() < 0.09


@pytest.mark.slow
def test_joint_beats_independent_margins_on_correlated_prices() -> None:
    """Energy and variogram score fall, CRPS does not move, where prices come from the copula itself."""
    correlation, rng = gaussian_of(make_ar1(0.9, 6), make_ar1(0.9, 12)), np.random.default_rng(4)
    spread = np.quantile(rng.normal(size=100_000), LEVELS) * 10
    marginals = [Marginal(name, LEVELS, np.tile(spread, (12, 1))) for name in correlation.products]
    factor = np.linalg.cholesky(np.kron(make_ar1(0.9, 6), make_ar1(0.9, 12)))
    pairs = []
    for seed in range(40):
        found = draw_scenarios(marginals, correlation, 100, seed)
        actual = 10 * factor @ rng.normal(size=72)
        pairs.append((*score_scenarios(actual, found)[:2], *score_scenarios(actual, shuffle_margins(found, seed))[:2]))
        np.testing.assert_allclose(
            score_scenarios(actual, found)[2],
            score_scenarios(actual, shuffle_margins(found, seed))[2],
            rtol=0,
            atol=1e-12,
        )
    energy, variogram, loose_energy, loose_variogram = np.mean(pairs, axis=0)
    assert energy < 0.98 * loose_energy
    assert variogram < 0.75 * loose_variogram


def test_schaake_gives_the_order_of_past_windows() -> None:
    """As many scenarios as windows: each has one window's ranks in every margin; fewer keep the order among them."""
    errors = np.random.default_rng(0).normal(size=(30, 4, 6)).cumsum(axis=2)
    estimate = estimate_schaake(errors, FOUR.products)
    correlation = load_correlation(estimate.record, estimate.tensors)
    found = draw_scenarios(marginals_of(FOUR), correlation, 30, 9).argsort(axis=0).argsort(axis=0)
    windows = {window.tobytes() for window in errors.argsort(axis=0).argsort(axis=0)}
    assert {scenario.tobytes() for scenario in found} == windows
    fewer = draw_scenarios(marginals_of(FOUR), correlation, 20, 9)
    assert correlate_ranks(fewer[:, 0, 4], fewer[:, 0, 5]) > 0.5
    assert (draw_scenarios(marginals_of(FOUR), correlation, 20, 10) != fewer).any()
    more = draw_scenarios(marginals_of(FOUR), correlation, 1000, 9)
    expected = correlate_ranks(errors[:, 1, 4], errors[:, 1, 5])
    assert correlate_ranks(more[:, 1, 4], more[:, 1, 5]) == pytest.approx(expected, abs=0.1)
    np.testing.assert_array_equal(draw_scenarios(marginals_of(FOUR)[2:3], correlation, 1000, 9)[:, 0], more[:, 2])


@pytest.mark.parametrize(
    ("lengths", "samples", "said"),
    [
        ([("QLD1.mar", 6)], 10, "knows nothing of 'QLD1.mar'; it has 4 products (p0, p1, p2, p3)"),
        ([("p0", 7)], 10, "p0 forecasts 7 steps, but the correlation covers 6"),
        ([("p0", 6), ("p1", 5)], 10, "p0 forecasts 6 steps and p1 5; one array cannot hold both"),
        ([("p0", 6)], 1, "at least 2 samples"),
        ([("p0", 6)] * 100, 10_000, "6000000 numbers of samples are more than 4000000"),
    ],
)
def test_a_wrong_call_is_told(lengths: list[tuple[str, int]], samples: int, said: str) -> None:
    """The message names both sides of what does not fit, and the field."""
    marginals = [Marginal(name, LEVELS, np.zeros((steps, len(LEVELS)))) for name, steps in lengths]
    with pytest.raises(RequestError) as caught:
        draw_scenarios(marginals, FOUR, samples, 0)
    assert said in caught.value.message
    assert str(caught.value.field).startswith("configuration.")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"time_factor": np.ones((2, 2))}, "'time_factor' is not lower triangular"),
        ({"time_factor": np.eye(3)}, r"'time_factor' is \[3, 3\]; the record's products and horizon say \[2, 2\]"),
        ({"time_factor": np.array([[1.0, 0.0], [1.0, 0.0]])}, "'time_factor' is not lower triangular"),
        ({"product_factor": np.array([[1.0, 0.0], [0.5, 0.5]])}, "'product_factor' has a row 1 of length 0.707"),
    ],
)
def test_factors_of_no_correlation_are_refused(changed: dict[str, Any], said: str) -> None:
    """An archive made by hand is told which tensor is wrong and how."""
    record = manifest.CorrelationSpec(products=("a", "b"), horizon=2, method="gaussian", windows=9)
    sound = {"product_factor": np.eye(2), "time_factor": np.eye(2)}
    tensors = {name: each.astype(np.float32) for name, each in {**sound, **changed}.items()}
    with pytest.raises(ArchiveInvalid, match=said):
        load_correlation(record, tensors)


def test_ranks_that_are_none_are_refused() -> None:
    """Each margin of templates has every rank once."""
    record = manifest.CorrelationSpec(products=("a",), horizon=1, method="schaake", windows=3)
    with pytest.raises(ArchiveInvalid, match="the ranks 0 to 2, each once"):
        load_correlation(record, {"ranks": np.array([0, 1, 1], np.float32).reshape(3, 1, 1)})


def test_it_says_what_it_is_and_holds() -> None:
    """The honest line, and the bytes that the cache is charged."""
    assert repr(FOUR) == "<CorrelationModel Gaussian of 4 products, 6 steps>"
    assert FOUR.charge_bytes == 8 * (16 + 36) + 4 * 202


def test_real_45_prices_whose_correlation_is_singular() -> None:
    """5 regions x 9 products, some of them equal: every other interval's order makes scenarios of the others better."""
    lines = [line.split(",") for line in _unpack(find_real(SNAPSHOT))]
    prices = np.array([[float(cell or "nan") for cell in row[1:]] for row in lines[1:]])
    past, future, names = prices[::2], prices[1::2], tuple(lines[0][1:])
    raw = np.nan_to_num(np.corrcoef(past.T))
    assert np.linalg.eigvalsh(raw)[0] < 1e-9
    estimate = estimate_gaussian(past[:, :, None], names)
    correlation = load_correlation(estimate.record, estimate.tensors)
    levels = np.linspace(0.05, 0.95, 19)
    quantiles = np.quantile(past, levels, axis=0).T
    marginals = [Marginal(name, levels, each[None]) for name, each in zip(names, quantiles, strict=True)]
    found = draw_scenarios(marginals, correlation, 200, 1)
    center, scale = np.median(past, axis=0), np.maximum(quantiles[:, 14] - quantiles[:, 4], 1.0)
    samples, actual = (np.arcsinh((each - center) / scale) for each in (found[..., 0], future))  # spikes drown all else
    apart_samples = shuffle_margins(samples)
    tied = np.mean([score_scenarios(row, samples)[:2] for row in actual[::5]], axis=0)
    apart = np.mean([score_scenarios(row, apart_samples)[:2] for row in actual[::5]], axis=0)
    np.testing.assert_allclose(
        score_scenarios(actual[0], samples)[2], score_scenarios(actual[0], apart_samples)[2], rtol=0, atol=1e-12
    )
    assert (tied / apart <= (0.985, 0.9)).all()


def test_real_prices_of_two_regions_and_24_hours() -> None:
    """NSW1 and VIC1, quantiles of each hour's last four weeks: 2023 teaches the order, 2024 is better by it."""
    series = read_csv(find_real(HOURLY), "nem_hour", ["NSW1", "VIC1"])
    days = np.stack([each.values[-2 * 365 * 24 :].reshape(-1, 24) for each in series], axis=1)  # [day, product, hour]
    levels = np.linspace(0.1, 0.9, 9)
    quantiles = np.stack([np.quantile(days[day - 28 : day], levels, axis=0) for day in range(28, len(days))])
    quantiles, days = np.moveaxis(quantiles, 1, -1), days[28:]
    errors = compute_pit(levels, quantiles[:330], days[:330])
    estimate = estimate_gaussian(errors, ("NSW1", "VIC1"))
    correlation = load_correlation(estimate.record, estimate.tensors)
    ratios = []
    for day in range(340, len(days), 5):
        marginals = [Marginal(name, levels, quantiles[day, i]) for i, name in enumerate(("NSW1", "VIC1"))]
        found = draw_scenarios(marginals, correlation, 100, day)
        tied, loose = score_scenarios(days[day], found), score_scenarios(days[day], shuffle_margins(found, day))
        np.testing.assert_allclose(tied[2], loose[2], rtol=1e-12)
        ratios.append((tied[0] / loose[0], tied[1] / loose[1]))
    energy, variogram = np.mean(ratios, axis=0)
    assert energy < 0.99
    assert variogram < 0.96


def _unpack(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()
