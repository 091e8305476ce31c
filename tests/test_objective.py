"""The objective against the paper's formulas in float64, tokens as columns as in the paper."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import objective
from crate_jax.objective import projected_coding_rate, sparsity

# Compiled, which is how they are used and faster to test; one test below compares with eager.
coding_rate = jax.jit(objective.coding_rate, static_argnames="eps")
subspace_coding_rate = jax.jit(objective.subspace_coding_rate, static_argnames="eps")
class_coding_rate = jax.jit(objective.class_coding_rate, static_argnames="eps")
rate_reduction = jax.jit(objective.rate_reduction, static_argnames="eps")
sparse_rate_reduction = jax.jit(objective.sparse_rate_reduction, static_argnames=("lmbda", "eps"))

GOLDEN = Path(__file__).parent / "golden"
EPS = 0.5
# (N, d, K, p): fewer and more tokens than d, fewer and more than p, and the two ties.
SHAPES = [(5, 8, 2, 3), (13, 8, 2, 4), (8, 8, 3, 2), (4, 12, 2, 6), (6, 12, 2, 6), (9, 4, 5, 2)]


def half_logdet(M):
    sign, value = np.linalg.slogdet(M)
    assert sign == 1
    return value / 2


def paper_R(Z_dxN, eps):
    d, N = Z_dxN.shape
    return half_logdet(np.eye(N) + d / (N * eps**2) * Z_dxN.T @ Z_dxN)


def paper_Rc(Z_dxN, U_Kxdxp, eps):
    _, N = Z_dxN.shape
    total = 0.0
    for U_dxp in U_Kxdxp:
        p = U_dxp.shape[1]
        projected_pxN = U_dxp.T @ Z_dxN
        total += half_logdet(np.eye(N) + p / (N * eps**2) * projected_pxN.T @ projected_pxN)
    return total


def grad(f, argnums=0):
    return jax.jit(jax.grad(f, argnums=argnums))


def draw(N, d, K, p, seed=0):
    """Tokens and bases as float32 rows for the code, and as float64 columns for the paper."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(N, d)).astype(np.float32)
    U = (rng.normal(size=(d, K, p)) / np.sqrt(d)).astype(np.float32)
    columns = Z.astype(np.float64).T, np.moveaxis(U, 1, 0).astype(np.float64)
    return jnp.asarray(Z), jnp.asarray(U), *columns


def orthogonal(n, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0].astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_rates_are_the_papers(shape):
    Z, U, Z_dxN, U_Kxdxp = draw(*shape)
    R, Rc = paper_R(Z_dxN, EPS), paper_Rc(Z_dxN, U_Kxdxp, EPS)
    np.testing.assert_allclose(coding_rate(Z, eps=EPS), R, rtol=1e-5)
    np.testing.assert_allclose(subspace_coding_rate(Z, U, eps=EPS), Rc, rtol=1e-5)
    np.testing.assert_allclose(rate_reduction(Z, U, eps=EPS), R - Rc, atol=2e-5 * (R + Rc))


@pytest.mark.parametrize("eps", [0.1, 2.0])
def test_precision_enters_squared(eps):
    Z, U, Z_dxN, U_Kxdxp = draw(7, 6, 2, 3)
    np.testing.assert_allclose(coding_rate(Z, eps=eps), paper_R(Z_dxN, eps), rtol=1e-5)
    np.testing.assert_allclose(
        subspace_coding_rate(Z, U, eps=eps), paper_Rc(Z_dxN, U_Kxdxp, eps), rtol=1e-5
    )


def test_projected_rate_takes_what_the_model_taps():
    _, _, Z_dxN, U_Kxdxp = draw(6, 8, 3, 4)
    W_NxKxp = jnp.asarray(np.einsum("kdp,dn->nkp", U_Kxdxp, Z_dxN).astype(np.float32))
    np.testing.assert_allclose(
        projected_coding_rate(W_NxKxp, eps=EPS), paper_Rc(Z_dxN, U_Kxdxp, EPS), rtol=1e-5
    )


def test_rate_by_class_is_the_papers():
    """Memberships of one and of shares; a class without tokens adds nothing."""
    rng = np.random.default_rng(7)
    Z = rng.normal(size=(9, 5)).astype(np.float32)
    certain = np.eye(4, dtype=np.float32)[np.arange(9) % 3]
    shares = rng.dirichlet(np.ones(4), size=9).astype(np.float32)
    for Pi in (certain, shares):
        expected = 0.0
        for members in Pi.T.astype(np.float64):
            if m_j := members.sum():
                G = Z.T.astype(np.float64) @ np.diag(members) @ Z
                expected += m_j / 9 * half_logdet(np.eye(5) + 5 / (m_j * EPS**2) * G)
        found = class_coding_rate(jnp.asarray(Z), jnp.asarray(Pi), eps=EPS)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        gradient = grad(lambda Z, Pi=Pi: class_coding_rate(Z, jnp.asarray(Pi), eps=EPS))(Z)
        assert np.isfinite(gradient).all()
    batched = class_coding_rate(jnp.stack([Z, 2 * Z]), jnp.asarray(shares), eps=EPS)
    alone = class_coding_rate(jnp.asarray(2 * Z), jnp.asarray(shares), eps=EPS)
    np.testing.assert_allclose(batched[1], alone, rtol=1e-6)
    everyone = class_coding_rate(jnp.asarray(Z), jnp.ones((9, 1)), eps=EPS)
    np.testing.assert_allclose(everyone, coding_rate(Z, eps=EPS), rtol=1e-6)


@pytest.mark.parametrize("setting", [0, 1])
def test_rates_by_class_are_the_official_ones(setting):
    """Of MCR²'s code, where ``eps`` stands for ε²; the loss is −ΔR."""
    eps = json.loads((GOLDEN / "mcr2.json").read_text())["settings"][setting]["eps"] ** 0.5
    with np.load(GOLDEN / "mcr2.npz") as file:
        expected = {key: file[key] for key in file}
    Z, Pi = jnp.asarray(expected["features"]), jax.nn.one_hot(expected["labels"], 3)

    def loss(Z):
        return class_coding_rate(Z, Pi, eps=eps) - coding_rate(Z, eps=eps)

    R, Rc = expected[f"s{setting}/theoretical"]
    np.testing.assert_allclose(coding_rate(Z, eps=eps), R, rtol=1e-5)
    np.testing.assert_allclose(class_coding_rate(Z, Pi, eps=eps), Rc, rtol=1e-5)
    np.testing.assert_allclose(loss(Z), expected[f"s{setting}/loss"], rtol=1e-5)
    theirs = expected[f"s{setting}/grad"]
    np.testing.assert_allclose(grad(loss)(Z), theirs, atol=1e-5 * np.abs(theirs).max())


def test_rates_of_complex_tokens():
    """Z Zᵀ with the conjugate: a frequency of signals is such a token."""
    rng = np.random.default_rng(8)
    for N, d in ((4, 7), (7, 4)):
        Z = (rng.normal(size=(N, d)) + 1j * rng.normal(size=(N, d))).astype(np.complex64)
        G = np.eye(N) + d / (N * EPS**2) * Z.astype(np.complex128) @ Z.conj().T
        expected = np.linalg.slogdet(G)[1] / 2
        np.testing.assert_allclose(coding_rate(Z, eps=EPS), expected, rtol=1e-5)
        assert coding_rate(Z, eps=EPS).dtype == jnp.float32
        everyone = class_coding_rate(jnp.asarray(Z), jnp.ones((N, 1)), eps=EPS)
        np.testing.assert_allclose(everyone, expected, rtol=1e-5)
        move = (rng.normal(size=(N, d)) + 1j * rng.normal(size=(N, d))).astype(np.complex64)
        _, slope = jax.jvp(lambda Z: coding_rate(Z, eps=EPS), (jnp.asarray(Z),), (move,))
        alpha, H = d / (N * EPS**2), Z.astype(np.complex128).conj().T
        exact = alpha * np.trace(np.linalg.inv(G) @ move.astype(np.complex128) @ H).real
        np.testing.assert_allclose(slope, exact, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_objective_pays_lmbda_for_each_non_zero_entry(shape):
    Z, U, Z_dxN, U_Kxdxp = draw(*shape)
    keep = np.random.default_rng(3).random(Z.shape) < 0.6
    assert not keep.all()
    Z, Z_dxN = jnp.where(keep, Z, 0.0), Z_dxN * keep.T
    expected = paper_R(Z_dxN, EPS) - paper_Rc(Z_dxN, U_Kxdxp, EPS) - 0.3 * keep.sum()
    got = sparse_rate_reduction(Z, U, lmbda=0.3, eps=EPS)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sparsity_is_the_share_of_exact_zeros():
    Z = jnp.asarray([[[0.0, -0.0, 1e-30], [2.0, 0.0, -1.0]], [[1.0] * 3, [0.0] * 3]])
    np.testing.assert_allclose(sparsity(Z), [3 / 6, 3 / 6])
    np.testing.assert_allclose(sparsity(Z[0, :1]), 2 / 3)
    assert sparsity(Z.astype(jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(sparsity(jnp.asarray([[0, 1, 2, 3]])), 0.25)


@pytest.mark.parametrize(("N", "d"), [(5, 9), (9, 5)])
def test_determinant_is_of_the_smaller_matrix(N, d, equations):
    program = jax.make_jaxpr(lambda Z: coding_rate(Z, eps=EPS))(jnp.ones((N, d)))
    shapes = {out.aval.shape[-2:] for e, _ in equations(program.jaxpr) for out in e.outvars}
    assert (5, 5) in shapes
    assert (9, 9) not in shapes


@pytest.mark.parametrize("spread", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("norm", [1.0, 30.0])
def test_nearly_equal_tokens_are_measured_as_exactly_as_scattered_ones(spread, norm):
    """Compression drives tokens together, where a float32 Gram matrix is no longer definite."""
    rng = np.random.default_rng(8)
    Z = norm * (np.abs(rng.normal(size=(1, 96))) + spread * rng.normal(size=(60, 96)))
    Z = Z.astype(np.float32)
    U = (rng.normal(size=(96, 3, 32)) / 10).astype(np.float32)
    Z_dxN, U_Kxdxp = Z.astype(np.float64).T, np.moveaxis(U, 1, 0).astype(np.float64)
    np.testing.assert_allclose(coding_rate(jnp.asarray(Z), eps=0.1), paper_R(Z_dxN, 0.1), rtol=5e-5)
    got = subspace_coding_rate(jnp.asarray(Z), jnp.asarray(U), eps=0.1)
    # Here the projection's own rounding counts: a millionth of the common part of the tokens.
    np.testing.assert_allclose(got, paper_Rc(Z_dxN, U_Kxdxp, 0.1), rtol=1e-3)


def test_rates_do_not_change_when_space_is_rotated_or_tokens_permuted():
    Z, U, _, _ = draw(7, 6, 2, 3)
    Q, order = orthogonal(6), np.random.default_rng(4).permutation(7)
    rotated_U = jnp.einsum("dkp,de->ekp", U, Q)
    R, Rc = coding_rate(Z, eps=EPS), subspace_coding_rate(Z, U, eps=EPS)
    np.testing.assert_allclose(coding_rate(Z @ Q, eps=EPS), R, rtol=1e-5)
    np.testing.assert_allclose(subspace_coding_rate(Z @ Q, rotated_U, eps=EPS), Rc, rtol=1e-5)
    np.testing.assert_allclose(coding_rate(Z[order], eps=EPS), R, rtol=1e-5)
    np.testing.assert_allclose(subspace_coding_rate(Z[order], U, eps=EPS), Rc, rtol=1e-5)
    # A rotation of the tokens alone is another set of tokens to the subspaces.
    assert abs(subspace_coding_rate(Z @ Q, U, eps=EPS) - Rc) > 0.01


def test_one_full_orthonormal_subspace_reduces_nothing():
    Z, _, Z_dxN, _ = draw(7, 6, 2, 3)
    U = jnp.asarray(orthogonal(6))[:, None, :]
    np.testing.assert_allclose(rate_reduction(Z, U, eps=EPS), 0.0, atol=2e-5)
    assert paper_R(Z_dxN, EPS) > 1.0


def test_leading_axes_are_a_loop():
    rng = np.random.default_rng(5)
    Z_2x3xNxd = jnp.asarray(rng.normal(size=(2, 3, 5, 8)).astype(np.float32))
    Z_2x3xNxd = jnp.maximum(Z_2x3xNxd, 0.0)
    _, U, _, _ = draw(5, 8, 2, 3)
    for batched, one in [
        (coding_rate(Z_2x3xNxd, eps=EPS), lambda Z: coding_rate(Z, eps=EPS)),
        (
            sparse_rate_reduction(Z_2x3xNxd, U, lmbda=0.1, eps=EPS),
            lambda Z: sparse_rate_reduction(Z, U, lmbda=0.1, eps=EPS),
        ),
        (sparsity(Z_2x3xNxd), sparsity),
    ]:
        looped = [[one(Z_NxD) for Z_NxD in Z_3] for Z_3 in Z_2x3xNxd]
        np.testing.assert_allclose(batched, np.asarray(looped), rtol=1e-5, atol=1e-5)


def test_compiled_is_eager_and_eps_may_be_traced():
    Z, U, Z_dxN, U_Kxdxp = draw(6, 8, 2, 3)
    compiled = jax.jit(lambda Z, U, e: objective.sparse_rate_reduction(Z, U, lmbda=0.1, eps=e))
    eager = objective.sparse_rate_reduction(Z, U, lmbda=0.1, eps=EPS)
    np.testing.assert_allclose(compiled(Z, U, EPS), eager, rtol=1e-5)
    expected = paper_R(Z_dxN, 0.7) - paper_Rc(Z_dxN, U_Kxdxp, 0.7) - 0.1 * 48
    np.testing.assert_allclose(compiled(Z, U, 0.7), expected, rtol=1e-5)


def central_differences(f, x, h=1e-5):
    slope = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = h
        slope[i] = (f(x + step) - f(x - step)) / (2 * h)
    return slope


@pytest.mark.parametrize("shape", [(4, 6, 2, 3), (7, 5, 2, 2), (3, 6, 2, 4)])
def test_gradients_are_the_slopes_of_the_papers_function(shape):
    Z, U, Z_dxN, U_Kxdxp = draw(*shape)
    to_Z = grad(lambda Z: sparse_rate_reduction(Z, U, lmbda=0.1, eps=EPS))(Z)
    slope = central_differences(lambda Z: paper_R(Z, EPS) - paper_Rc(Z, U_Kxdxp, EPS), Z_dxN.copy())
    np.testing.assert_allclose(to_Z, slope.T, atol=1e-4 * np.abs(slope).max())
    to_U = grad(lambda U: subspace_coding_rate(Z, U, eps=EPS))(U)
    slope = central_differences(lambda U: paper_Rc(Z_dxN, U, EPS), U_Kxdxp.copy())
    np.testing.assert_allclose(jnp.moveaxis(to_U, 1, 0), slope, atol=1e-4 * np.abs(slope).max())


@pytest.mark.parametrize("Z", [np.zeros((4, 6)), np.ones((4, 6)), np.ones((9, 6)) * 1e3])
def test_gradients_stay_finite_where_the_tokens_have_no_rank(Z):
    Z = jnp.asarray(Z, jnp.float32)
    _, U, _, _ = draw(4, 6, 2, 3)
    for slope in grad(lambda Z, U: rate_reduction(Z, U, eps=0.1), argnums=(0, 1))(Z, U):
        assert np.isfinite(slope).all()


def test_a_small_step_down_the_gradient_compresses():
    """What MSSA approximates: Z − κ ∇R^c(Z; U) has a lower R^c, Z + κ ∇R(Z) a higher R."""
    Z, U, Z_dxN, U_Kxdxp = draw(9, 8, 2, 3)
    step_dxN = np.asarray(grad(lambda Z: subspace_coding_rate(Z, U, eps=EPS))(Z)).T
    before, after = (paper_Rc(z, U_Kxdxp, EPS) for z in (Z_dxN, Z_dxN - 0.01 * step_dxN))
    # To first order the step lowers R^c by κ times the squared length of the gradient.
    np.testing.assert_allclose(before - after, 0.01 * (step_dxN**2).sum(), rtol=0.05)
    step_dxN = np.asarray(grad(lambda Z: coding_rate(Z, eps=EPS))(Z)).T
    assert paper_R(Z_dxN + 0.01 * step_dxN, EPS) > paper_R(Z_dxN, EPS)


def test_half_precision_tokens_are_measured_in_float32():
    Z, U, _, _ = draw(9, 8, 2, 3)
    Z, U = Z.astype(jnp.bfloat16), U.astype(jnp.bfloat16)
    Z_dxN = np.asarray(Z.astype(jnp.float32), np.float64).T
    U_Kxdxp = np.moveaxis(np.asarray(U.astype(jnp.float32), np.float64), 1, 0)
    for got, expected in [
        (coding_rate(Z, eps=EPS), paper_R(Z_dxN, EPS)),
        (subspace_coding_rate(Z, U, eps=EPS), paper_Rc(Z_dxN, U_Kxdxp, EPS)),
        (
            sparse_rate_reduction(Z, U, lmbda=0.1, eps=EPS),
            paper_R(Z_dxN, EPS) - paper_Rc(Z_dxN, U_Kxdxp, EPS) - 0.1 * 72,
        ),
    ]:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda Z, U: coding_rate(Z[0], eps=0.1), r"^Z must be \(\.\.\., N, d\); got shape \(8,\)"),
        (lambda Z, U: coding_rate(Z, eps=0.0), r"^eps must be > 0; got 0\.0"),
        (lambda Z, U: coding_rate(Z, eps=float("nan")), r"^eps must be > 0; got nan"),
        (lambda Z, U: subspace_coding_rate(Z, U, eps=-1), r"^eps must be > 0; got -1"),
        (lambda Z, U: subspace_coding_rate(Z, U[0], eps=0.1), r"^U must be \(d, K, p\) with d = 8"),
        (
            lambda Z, U: rate_reduction(Z[:, 1:], U, eps=0.1),
            r"^U must be .* d = 7 .*got \(8, 2, 3\)",
        ),
        (lambda Z, U: subspace_coding_rate(Z, U[None], eps=0.1), r"^U must be .*Take one layer"),
        (lambda Z, U: projected_coding_rate(Z, eps=0.1), r"^V must be \(\.\.\., N, K, p\); got"),
        (lambda Z, U: projected_coding_rate(U, eps=0), r"^eps must be > 0; got 0\."),
        (
            lambda Z, U: class_coding_rate(Z, Z[:1], eps=0.1),
            r"^Pi must be \(N, J\) with N = \d+ as in Z; got \(1, 8\)\. Make it",
        ),
        (lambda Z, U: sparsity(Z[0]), r"^Z must be \(\.\.\., N, d\); got shape \(8,\)"),
    ],
)
def test_errors_name_the_rule(call, message):
    Z, U, _, _ = draw(5, 8, 2, 3)
    with pytest.raises(ValueError, match=message):
        call(Z, U)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_no_token_has_no_rate(shape):
    Z, message = jnp.zeros(shape), r"^Z must hold tokens; got shape"
    for measure in (lambda: objective.coding_rate(Z, eps=0.1), lambda: sparsity(Z)):
        with pytest.raises(ValueError, match=message):
            measure()
    none = jnp.zeros((0, 5, 4))  # no image, each of five tokens
    assert objective.coding_rate(none, eps=0.1).shape == sparsity(none).shape == (0,)
