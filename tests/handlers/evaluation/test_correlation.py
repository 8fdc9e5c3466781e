"""Errors to correlations: what is estimated is what the errors were made with, and is always a correlation matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from handlers.codecs.features import Float64
from handlers.codecs.scenarios import Marginal, draw_scenarios, load_correlation
from handlers.evaluation.correlation import (
    TooFewErrors,
    compute_condition,
    compute_normal_scores,
    compute_pit,
    estimate_gaussian,
    estimate_schaake,
    repair_matrix,
    shrink_correlation,
)
from tests.handlers.codecs.test_scenarios import correlate_ranks, make_ar1

LEVELS = np.array([0.1, 0.5, 0.9])
PRODUCTS = ("a", "b", "c")
SYMMETRIC = st.integers(1, 6).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.floats(-1, 1)).map(lambda m: (m + m.T) / 2)
)
QUANTILES = st.lists(st.sampled_from([-5.0, 0.0, 1.0, 2.5, 300.0]), min_size=3, max_size=3).map(sorted).map(np.array)


def draw_errors(windows: int, seed: int = 0) -> Float64:
    """Errors [windows, 3, 8] with the correlation 0.7 ** distance of products and 0.9 ** distance of steps."""
    noise = np.random.default_rng(seed).normal(size=(windows, 3, 8))
    return np.linalg.cholesky(make_ar1(0.7, 3)) @ noise @ np.linalg.cholesky(make_ar1(0.9, 8)).T


@given(SYMMETRIC)
def test_any_symmetric_matrix_becomes_a_correlation(matrix: Float64) -> None:
    """Positive definite, so that Cholesky takes it, with a diagonal of ones: also from zeros and negative ones."""
    found = repair_matrix(matrix)
    np.testing.assert_array_equal(np.diag(found), np.ones(len(found)))
    np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-15)
    assert np.linalg.eigvalsh(found)[0] > 0
    assert (np.abs(found) <= 1 + 1e-12).all()
    np.linalg.cholesky(found)


@given(st.floats(-0.95, 0.95), st.integers(2, 8))
def test_a_sound_correlation_is_left_alone(rho: float, size: int) -> None:
    """Repairing changes nothing where nothing is broken."""
    np.testing.assert_allclose(repair_matrix(make_ar1(rho, size)), make_ar1(rho, size), rtol=0, atol=1e-14)


@pytest.mark.slow
@given(QUANTILES, st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).map(sorted))
def test_the_transform_rises_with_the_price(quantiles: Float64, prices: list[float]) -> None:
    """Whatever atoms a forecast has, a higher price never has a lower probability; all lie within [0, 1]."""
    found = compute_pit(LEVELS, np.tile(quantiles, (len(prices), 1)), np.array(prices))
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_the_transform_by_hand() -> None:
    """The level at a quantile, linear between, the middle of an atom, exponential beyond, NaN where unknown."""
    smooth, atom = np.array([0.0, 10.0, 30.0]), np.array([0.0, 0.0, 30.0])
    prices = np.array([0.0, 5.0, 20.0, 30.0, np.nan, 60.0, -30.0])
    expected = [0.1, 0.3, 0.7, 0.9, np.nan, 1 - 0.1 / np.e, 0.1 / np.e]
    np.testing.assert_allclose(compute_pit(LEVELS, np.tile(smooth, (7, 1)), prices), expected)
    np.testing.assert_allclose(compute_pit(LEVELS, atom[None], np.array([0.0])), [0.3])


def test_normal_scores_keep_order_ties_and_gaps() -> None:
    """Middle ranks over what is known, as normal quantiles; a margin without variation says nothing."""
    errors = np.array([[5.0, 1.0], [7.0, 1.0], [5.0, 1.0], [np.nan, np.nan], [-2.0, 1.0]])[:, :, None]
    found = compute_normal_scores(errors)[:, 0, 0]
    np.testing.assert_allclose(found[[0, 1, 2, 4]], [0.0, 1.15034938, 0.0, -1.15034938], atol=1e-8)
    assert np.isnan(found[3])
    np.testing.assert_array_equal(compute_normal_scores(errors)[:4, 1, 0], [0, 0, 0, np.nan])


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_correlation_that_made_the_errors_is_found(missing: float) -> None:
    """Both matrices, with the margins bent by any rising function, and with values missing at random."""
    errors = np.sinh(2 * draw_errors(3000))
    errors[np.random.default_rng(1).random(errors.shape) < missing] = np.nan
    products, steps = estimate_gaussian(errors, PRODUCTS).matrices
    np.testing.assert_allclose(products.correlation, make_ar1(0.7, 3), rtol=0, atol=0.03)
    np.testing.assert_allclose(steps.correlation, make_ar1(0.9, 8), rtol=0, atol=0.03)


def test_equal_and_constant_products_work() -> None:
    """A singular correlation: equal products go together in the scenarios, one that never moves goes with nobody."""
    errors = draw_errors(400)
    errors[:, 1], errors[:, 2] = errors[:, 0], 0.0
    estimate = estimate_gaussian(errors, PRODUCTS)
    products = estimate.matrices[0]
    assert products.condition_before == float("inf")
    assert products.condition < 1e7
    correlation = load_correlation(estimate.record, estimate.tensors)
    values = np.tile(np.array([1.0, 5.0, 20.0]), (8, 1))
    found = draw_scenarios([Marginal(name, LEVELS, values) for name in PRODUCTS], correlation, 500, 0)
    assert correlate_ranks(found[:, 0, 3], found[:, 1, 3]) > 0.97
    assert abs(correlate_ranks(found[:, 0, 3], found[:, 2, 3])) < 0.15


def test_pairs_that_contradict_each_other_are_repaired() -> None:
    """Products known at different times can have correlations that no prices have: their matrix is indefinite."""
    rng = np.random.default_rng(0)
    errors = np.full((300, 3, 1), np.nan)
    for part, (a, b, sign) in enumerate([(0, 1, 1), (1, 2, 1), (0, 2, -1)]):
        rows = slice(100 * part, 100 * part + 100)
        errors[rows, a, 0] = rng.normal(size=100)
        errors[rows, b, 0] = sign * errors[rows, a, 0]
    products = estimate_gaussian(errors, PRODUCTS).matrices[0]
    assert products.condition_before == float("inf")
    np.linalg.cholesky(products.correlation)


def test_shrinkage_falls_with_the_evidence() -> None:
    """Of independent series everything is taken for chance; of correlated ones the less, the more there is."""
    noise = np.asarray(np.corrcoef(np.random.default_rng(0).normal(size=(10, 30))))
    assert shrink_correlation(noise, 30).shrinkage > 0.8
    few, many = (shrink_correlation(make_ar1(0.8, 10), n).shrinkage for n in (20, 2000))
    assert 0 < 50 * many < few < 0.5
    assert shrink_correlation(make_ar1(0.8, 10), 2000, 0.01).shrinkage == pytest.approx(few)
    assert (shrink_correlation(np.eye(1), 50).shrinkage, shrink_correlation(np.eye(3), 50).shrinkage) == (0.0, 1.0)


def test_overlapping_windows_count_less() -> None:
    """Windows that share steps are no new evidence."""
    apart, shared = (estimate_gaussian(draw_errors(200), PRODUCTS, overlap).matrices[0] for overlap in (1.0, 4.0))
    assert shared.independent == pytest.approx(apart.independent / 4)
    assert shared.observations == apart.observations == 200 * 8


def test_the_condition_tells_a_singular_matrix() -> None:
    """Finite by eigenvalues, infinite where the smallest is none."""
    assert compute_condition(np.diag([4.0, 2.0])) == pytest.approx(2)
    assert compute_condition(np.ones((3, 3))) == float("inf")


def test_too_few_windows_are_refused() -> None:
    """Both methods say how many can be used; templates are whole windows only."""
    errors = draw_errors(20)
    with pytest.raises(TooFewErrors, match="7 of 7 windows"):
        estimate_gaussian(errors[:7], PRODUCTS)
    errors[6:, 1, 2] = np.nan
    assert estimate_gaussian(errors, PRODUCTS).record.windows == 20
    with pytest.raises(TooFewErrors, match="6 of 20 windows can be used, and 8 are the least"):
        estimate_schaake(errors, PRODUCTS)
