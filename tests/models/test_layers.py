"""The two steps of a layer against the paper's equations, written out token by token as columns."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, objective
from crate_jax.models import crate_bert, layers
from crate_jax.models.derivatives import attend
from crate_jax.models.layers import ista_step, mssa
from crate_jax.models.parameters import dictionary_init, linear_bias_init

B, N, d, K, p = 2, 5, 6, 3, 4
ETA, LMBDA = 0.2, 0.3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_columns(S):
    E = np.exp(S - S.max(axis=0))
    return E / E.sum(axis=0)


def paper_ssa(W_pxN):
    """One subspace: W softmax(p^{-1/2} Wᵀ W), the softmax down each column; and the attention."""
    A_NxN = softmax_columns(W_pxN.T @ W_pxN / np.sqrt(W_pxN.shape[0]))
    return W_pxN @ A_NxN, A_NxN


def paper_mssa(Z_dxN, U_dxKxp, W_out_Kxpxd=None, b_out_d=None):
    stacked = [paper_ssa(U_dxKxp[:, k].T @ Z_dxN)[0] for k in range(U_dxKxp.shape[1])]
    if W_out_Kxpxd is None:
        return np.concatenate(stacked)
    update_dxN = sum(W_pxd.T @ O_pxN for W_pxd, O_pxN in zip(W_out_Kxpxd, stacked, strict=True))
    return update_dxN + b_out_d[:, None]


def paper_ista(Y_dxN, D_dxd, eta, lmbda):
    """ReLU(Y − η ∇½‖Y − D A‖² at A = Y − η λ), a token at a time."""
    tokens = []
    for y in Y_dxN.T:
        slope = -(D_dxd.T @ y - D_dxd.T @ (D_dxd @ y))
        tokens.append(np.maximum(y - eta * slope - eta * lmbda, 0))
    return np.stack(tokens, axis=1)


def test_the_examples_of_the_docstrings():
    for module, functions in ((layers, 2), (objective, 1), (crate_bert, 1)):
        tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
        assert len(tests) == functions
        for test in tests:
            assert doctest.DocTestRunner().run(test).failed == 0


def test_subspace_tokens_are_the_coordinates_in_each_subspace():
    Z, U, W_out = normal(0, B, N, d), normal(1, d, K, p), normal(2, K, p, d)
    got = jax.jit(mssa)(Z, U, W_out).seen["subspace_tokens"]
    assert got.shape == (B, N, K, p)
    for b, n, k in np.ndindex(B, N, K):
        np.testing.assert_allclose(got[b, n, k], U[:, k].T @ Z[b, n], rtol=1e-5, atol=1e-5)


def test_mssa_is_the_papers():
    Z, U, W_out, b_out = normal(0, B, N, d), normal(1, d, K, p), normal(2, K, p, d), normal(3, d)
    got = jax.jit(mssa)(Z, U, W_out, b_out).update
    for b in range(B):
        np.testing.assert_allclose(got[b].T, paper_mssa(Z[b].T, U, W_out, b_out), atol=2e-5)


def test_mssa_of_one_full_subspace_needs_no_output_projection():
    Z, U = normal(0, B, N, d), normal(1, d, 1, d)
    got = jax.jit(mssa)(Z, U).update
    for b in range(B):
        np.testing.assert_allclose(got[b].T, paper_mssa(Z[b].T, U), atol=2e-5)


def test_attention_is_the_papers_and_its_rows_sum_to_one():
    V = normal(4, B, K, N, p)
    attended, attention = jax.jit(attend)(V)
    np.testing.assert_allclose(attention.sum(axis=-1), 1.0, rtol=1e-6)
    for b, k in np.ndindex(B, K):
        O_pxN, A_NxN = paper_ssa(V[b, k].T)
        np.testing.assert_allclose(attention[b, k], A_NxN.T, rtol=1e-5)  # rows here, columns there
        np.testing.assert_allclose(attended[b, k], O_pxN.T, atol=1e-5)


def test_scores_are_symmetric_before_the_softmax():
    """A = diag(c) exp(S) with S = Sᵀ just when A_ij A_jk A_ki = A_ik A_kj A_ji for all i, j, k."""
    _, attention = jax.jit(attend)(normal(5, B, K, N, p))
    L = np.log(np.asarray(attention, np.float64))
    round_trip = L[..., :, :, None] + L[..., None, :, :] + np.swapaxes(L, -1, -2)[..., :, None, :]
    np.testing.assert_allclose(round_trip, np.swapaxes(round_trip, -3, -1), atol=1e-5)
    assert np.abs(L - np.swapaxes(L, -1, -2)).max() > 0.1  # the attention itself is not symmetric


def test_half_precision_attention_has_a_float32_softmax():
    V = jnp.asarray(4 * normal(6, 1, 1, 16, 8)).astype(jnp.bfloat16)
    _, attention = jax.jit(attend)(V)
    assert attention.dtype == jnp.bfloat16
    _, A_NxN = paper_ssa(np.asarray(V[0, 0].astype(jnp.float32), np.float64).T)
    # Only the result is rounded: half a unit in the last of 8 bits, and no more.
    got = np.asarray(attention[0, 0].astype(jnp.float32))
    np.testing.assert_allclose(got, A_NxN.T, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_keep_the_dtype_of_the_tokens(dtype):
    Z, U, D = (
        jnp.asarray(a, dtype) for a in (normal(0, B, N, d), normal(1, d, 1, d), normal(2, d, d))
    )
    update, seen = mssa(Z, U)
    assert {update.dtype, *(array.dtype for array in seen.values())} == {jnp.dtype(dtype)}
    assert ista_step(Z, D, eta=ETA, lmbda=LMBDA).dtype == dtype


def test_ista_is_the_papers_and_not_negative():
    Y, D = normal(0, B, N, d), normal(1, d, d)
    got = jax.jit(lambda Y, D: ista_step(Y, D, eta=ETA, lmbda=LMBDA))(Y, D)
    for b in range(B):
        expected = paper_ista(Y[b].T.astype(np.float64), D.astype(np.float64), ETA, LMBDA)
        np.testing.assert_allclose(got[b].T, expected, atol=2e-5)
    assert got.min() == 0  # and it does threshold
    assert (np.asarray(got) > 0).any()


def test_ista_threshold_is_eta_times_lmbda():
    Y = jnp.asarray([[[0.05, 0.06, 0.07, -1.0]]])
    got = ista_step(Y, jnp.eye(4), eta=0.2, lmbda=0.3)  # D = I: no residual, ReLU(y − 0.06)
    np.testing.assert_allclose(got, [[[0.0, 0.0, 0.01, 0.0]]], atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_lasso_falls_when_the_step_is_short_enough(seed):
    """Proximal gradient: F(A¹) <= F(A⁰) − (1/η − ‖D‖²/2) ‖A¹ − A⁰‖² for η < 1/‖D‖².

    F = ½‖Y − D A‖² + λ‖A‖₁ over A >= 0, so that F(A⁰) is finite only from a Y >= 0.
    """
    Y, D = np.abs(normal(seed, 1, 8, d)), normal(seed + 100, d, d)
    Y64, D64 = Y[0].T.astype(np.float64), D.astype(np.float64)
    smoothness = np.linalg.norm(D64, 2) ** 2
    eta = 0.95 / smoothness
    F = lambda A: 0.5 * ((Y64 - D64 @ A) ** 2).sum(axis=0) + LMBDA * np.abs(A).sum(axis=0)  # noqa: E731
    got = jax.jit(lambda Y, D: ista_step(Y, D, eta=eta, lmbda=LMBDA))(Y, D)
    A = np.asarray(got, np.float64)[0].T
    promised = (1 / eta - smoothness / 2) * ((A - Y64) ** 2).sum(axis=0)
    assert (promised > 1e-3).all()
    assert (F(A) <= F(Y64) - promised * (1 - 1e-4) + 1e-5).all()


def test_steps_take_tokens_in_any_order():
    Z, order = normal(0, B, N, d), np.random.default_rng(9).permutation(N)
    U, W_out, b_out = normal(1, d, K, p), normal(2, K, p, d), normal(3, d)
    step = jax.jit(lambda *args: mssa(*args).update)
    straight = np.asarray(step(Z, U, W_out, b_out))
    np.testing.assert_allclose(step(Z[:, order], U, W_out, b_out), straight[:, order], atol=2e-5)
    assert np.abs(straight[:, order] - straight).max() > 0.1


@pytest.mark.parametrize("kernel", ["xla", None])
def test_a_mask_leaves_the_seen_tokens_to_themselves(kernel):
    """Two groups that do not see each other attend as if each were alone, backward too."""
    V = jnp.asarray(normal(8, 1, K, N, p))
    first = np.arange(N) < 2
    mask = jnp.asarray(first[:, None] == first)[None, None]

    def loss(V, mask):
        if kernel:
            return jnp.sum(jnp.sin(layers.attend_by(kernel, V.swapaxes(1, 2), mask)))
        attended, attention = layers.attend(V, mask)
        return jnp.sum(jnp.sin(attended)) + jnp.sum(attention**2)

    def apart(V):
        return loss(V[:, :, :2], None) + loss(V[:, :, 2:], None)

    _, attention = layers.attend(V, mask)
    np.testing.assert_array_equal(attention[:, :, :2, 2:], 0)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-6)
    together, alone = jax.grad(loss)(V, mask), jax.grad(apart)(V)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def assert_uniform(values, bound):
    """Kolmogorov and Smirnov's test at one in a thousand, and the bound itself."""
    x = np.sort(np.ravel(values)) / bound
    assert np.abs(x).max() <= 1
    steps = np.arange(x.size + 1) / x.size
    distance = max(np.abs((x + 1) / 2 - steps[:-1]).max(), np.abs((x + 1) / 2 - steps[1:]).max())
    assert distance < 1.95 / np.sqrt(x.size), f"{distance} of {x.size} values"


def assert_standard_normal(values):
    x = np.ravel(values)
    assert abs(x.mean()) < 3.3 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 3.3 / np.sqrt(2 * x.size)
    assert abs((np.abs(x) < 1).mean() - 0.6827) < 3.3 * 0.4655 / np.sqrt(x.size)


def test_parameters_start_as_the_official_ones_in_distribution():
    """Every fan_in differs from every other size, so that no wrong axis gives the right bound."""
    width, heads, dim, depth, classes, patch = 48, 5, 16, 3, 40, 3 * 4 * 6
    model = Crate(
        image_size=(32, 48),
        patch_size=(4, 6),
        num_classes=classes,
        width=width,
        depth=depth,
        num_heads=heads,
        head_dim=dim,
    )
    images = jnp.zeros((1, 32, 48, 3))
    init = jax.jit(lambda key: model.init(key, images, train=False)["params"])
    params = init(jax.random.key(3))
    stacked = {"U": [], "W_out": [], "b_out": [], "D": []}
    for layer in range(depth):
        for name in stacked:
            module = "ista" if name == "D" else "mssa"
            stacked[name].append(np.asarray(params["blocks"][module][name][layer]))
    for layer in range(depth):
        assert_uniform(stacked["U"][layer], width**-0.5)
        assert_uniform(stacked["W_out"][layer], (heads * dim) ** -0.5)
        assert_uniform(stacked["b_out"][layer], (heads * dim) ** -0.5)
        assert_uniform(stacked["D"][layer], (6 / width) ** 0.5)
    for name, each in stacked.items():
        assert (
            each[0].shape
            == {
                "U": (width, heads, dim),
                "W_out": (heads, dim, width),
                "b_out": (width,),
                "D": (width, width),
            }[name]
        )
        # Each layer draws its own values.
        assert abs(np.corrcoef(each[0].ravel(), each[1].ravel())[0, 1]) < 0.4
        assert abs(np.corrcoef(each[1].ravel(), each[2].ravel())[0, 1]) < 0.4
    embedding = params["embedding"]
    assert_uniform(embedding["projection"]["kernel"], patch**-0.5)
    assert_uniform(embedding["projection"]["bias"], patch**-0.5)
    assert_uniform(params["head"]["kernel"], width**-0.5)
    assert_uniform(params["head"]["bias"], width**-0.5)
    assert_standard_normal(embedding["cls_token"])
    assert_standard_normal(embedding["pos_embedding"])
    for norm in (
        embedding["patch_norm"],
        embedding["token_norm"],
        params["blocks"]["mssa_norm"],
        params["blocks"]["ista_norm"],
        params["head_norm"],
    ):
        np.testing.assert_array_equal(norm["scale"], 1.0)
        np.testing.assert_array_equal(norm["bias"], 0.0)


def test_initialisers_fill_their_bounds():
    bias = linear_bias_init(25)(jax.random.key(0), (4000,))
    assert_uniform(bias, 0.2)
    assert np.abs(bias).max() > 0.199
    D = dictionary_init(jax.random.key(1), (150, 150), jnp.float32)
    assert_uniform(D, 0.2)
    np.testing.assert_allclose(D.std(), 0.2 / np.sqrt(3), rtol=0.02)
