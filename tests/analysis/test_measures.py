"""The measures of one set of tokens, against the equations and in bad cases."""

import numpy as np
import pytest

from crate_jax.analysis.measures import (
    coherence,
    coherence_between,
    coherence_within,
    effective_rank,
    mean_angle,
    rates,
    rates_by_gram,
)


def rate(X_Nxd):
    """½ logdet(I + d/(N ε²) XᵀX) with ε² = 0.01."""
    N, d = X_Nxd.shape
    return np.linalg.slogdet(np.eye(d) + d / (N * 0.01) * X_Nxd.T @ X_Nxd)[1] / 2


def test_tokens_that_are_nearly_one_direction_have_a_rate():
    """Where a float32 Cholesky factor is NaN: eigenvalues of 1 and of 10⁹."""
    rng = np.random.default_rng(0)
    X = np.outer(rng.normal(size=40), rng.normal(size=30)) * 100
    X = (X + 1e-3 * rng.normal(size=X.shape)).astype(np.float32)
    assert np.isfinite(rates(X, eps=0.1))
    np.testing.assert_allclose(rates(X, eps=0.1), rate(X.astype(np.float64)), rtol=1e-7)
    np.testing.assert_allclose(rates(X.T, eps=0.1), rate(X.T.astype(np.float64)), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e5, 1e6, 1e10, 1e19])
@pytest.mark.parametrize("spread", [0, 1e-3])
def test_large_tokens_that_are_nearly_equal_have_a_rate(scale, spread):
    """Where a float64 Cholesky factor is of rounding alone, or is none."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(2, 1, 24)) + spread * rng.normal(size=(2, 40, 24))
    X = (scale * X).astype(np.float32)
    with np.errstate(over="ignore"):
        G = X.swapaxes(1, 2) @ X
    values = np.linalg.svd(X.astype(np.float64), compute_uv=False)
    exact = np.log1p(24 / (40 * 0.01) * values**2).sum(axis=1) / 2
    np.testing.assert_allclose(rates(X, eps=0.1), exact, rtol=1e-6)
    np.testing.assert_allclose(rates_by_gram(G, X, eps=0.1), exact, rtol=1e-5)


def test_tokens_that_are_not_finite_have_no_rate_and_no_rank():
    """The other sets of the batch keep theirs."""
    X = np.random.default_rng(1).normal(size=(3, 7, 4)).astype(np.float32)
    X[0, 2, 1], X[1, 0, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        G = X.swapaxes(1, 2) @ X
    for found in (rates(X, eps=0.1), rates_by_gram(G, X, eps=0.1)):
        np.testing.assert_allclose(found, [np.nan, np.nan, rate(X[2].astype(float))], rtol=1e-6)
    found = effective_rank(X)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2], effective_rank(X[2]), rtol=1e-12)


def test_ranks_angles_and_coherence():
    rng = np.random.default_rng(1)
    line = np.outer([1.0, 2.0, -3.0], [1.0, 1.0])
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((3, 2))) == 0
    assert mean_angle(line) == pytest.approx((0 + 180 + 180) / 3)
    assert np.isnan(mean_angle(line[:1]))
    assert mean_angle(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])) == pytest.approx(60)
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert coherence(Q) == pytest.approx((0, 0), abs=1e-12)
    assert coherence(np.array([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx((0.5**0.5,) * 2)
    assert coherence(Q[:, :1]) == (0.0, 0.0)
    U = Q.reshape(6, 2, 3)
    assert coherence_between(U) == pytest.approx((0, 0), abs=1e-12)
    same = np.stack([Q[:, :3], Q[:, :3]], axis=1)  # of nine pairs three are equal
    assert coherence_between(same) == pytest.approx((1 / 3, 1.0))
    assert coherence_within(same) == pytest.approx((0, 0), abs=1e-12)
    skew = np.stack([Q[:, :2], Q[:, :2] @ [[1, 1], [0, 1]]], axis=1)  # one basis has 45 degrees
    assert coherence_within(skew) == pytest.approx((0.5**0.5 / 2, 0.5**0.5))
    assert coherence_between(U[:, :1]) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(3, 9, 4), (3, 4, 9), (2, 3, 9, 4)])
def test_rates_by_a_gram_matrix_in_float32(shape):
    """Of tokens in general position the matrix is exact enough, and they are not looked at."""
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    G = X.swapaxes(-2, -1) @ X if shape[-1] < shape[-2] else X @ X.swapaxes(-2, -1)
    absent = np.full_like(X, np.nan)
    np.testing.assert_allclose(
        rates_by_gram(G, absent, eps=0.1), rates(X, eps=0.1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("spread", [0, 1e-3, 1e-2])
def test_rates_of_tokens_that_float32_cannot_tell_apart(spread):
    """Nearly equal tokens: the rounding of their Gram matrix hides what is left, or kills it."""
    rng = np.random.default_rng(1)
    X = (30 * rng.normal(size=(2, 1, 24)) + spread * rng.normal(size=(2, 40, 24))).astype("f")
    G = X.swapaxes(1, 2) @ X
    found = rates_by_gram(G, X, eps=0.1)
    np.testing.assert_allclose(found, [rate(tokens.astype(float)) for tokens in X], rtol=1e-7)
    if spread < 1e-2:
        scaled = np.eye(24) + 24 / (40 * 0.01) * G.astype(float)
        assert not np.allclose(np.linalg.slogdet(scaled)[1] / 2, found, rtol=1e-4)
