"""CBSA against its equation written out in double precision, and its pooling against PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models.cbsa import CBSA, average_pool, cbsa, contract_and_broadcast
from crate_jax.models.derivatives import attend
from crate_jax.models.layers import mssa

B, N, d, K, p, m = 2, 7, 6, 3, 4, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_rows(S):
    E = np.exp(S - S.max(axis=-1, keepdims=True))
    return E / E.sum(axis=-1, keepdims=True)


def equation(W_Nxp, R_mxp, step_r, step_x):
    """One subspace: r ← r + s_r A W, then s_x Aᵀ softmax(r rᵀ p^{-1/2}) r; and A."""
    W, R = W_Nxp.astype(np.float64), R_mxp.astype(np.float64)
    A = softmax_rows(R @ W.T / np.sqrt(p))
    R = R + step_r * A @ W
    return step_x * A.T @ (softmax_rows(R @ R.T / np.sqrt(p)) @ R), A


def test_it_is_the_equation():
    Y, U, W_out, b_out = normal(0, B, N, d), normal(1, d, K, p), normal(2, K, p, d), normal(3, d)
    steps, P_mxN = (normal(4, K), normal(5, K)), normal(6, m, N)
    pool = functools.partial(jnp.einsum, "mn,bnkp->bmkp", P_mxN)
    got, seen = jax.jit(functools.partial(cbsa, pool=pool))(Y, U, *steps, W_out, b_out)
    for b in range(B):
        V = np.einsum("nd,dkp->nkp", Y[b], U)
        np.testing.assert_allclose(seen["subspace_tokens"][b], V, rtol=1e-4, atol=1e-5)
        update = np.zeros((N, d)) + b_out
        for k in range(K):
            attended, A = equation(V[:, k], P_mxN @ V[:, k], steps[0][k], steps[1][k])
            np.testing.assert_allclose(seen["contraction"][b, k], A, rtol=1e-3, atol=1e-6)
            update += attended @ W_out[k]
        np.testing.assert_allclose(got[b], update, rtol=1e-4, atol=1e-4)


def test_with_a_representative_a_token_the_contraction_is_the_attention_of_mssa():
    Y, U, W_out = normal(0, B, N, d), normal(1, d, K, p), normal(2, K, p, d)
    steps, whole = (normal(4, K), normal(5, K)), lambda V: V
    contraction = cbsa(Y, U, *steps, W_out, pool=whole).seen["contraction"]
    np.testing.assert_allclose(contraction, mssa(Y, U, W_out).seen["attention"], rtol=1e-5)


def test_representatives_that_do_not_move_are_attended_as_mssa_attends_them():
    V, R = normal(0, B, N, K, p), normal(1, B, m, K, p)
    attended, A = contract_and_broadcast(V, R, jnp.zeros(K), jnp.ones(K))
    settled = attend(R.swapaxes(1, 2))[0]
    expected = np.einsum("bkmn,bkmp->bnkp", A, settled)
    np.testing.assert_allclose(attended, expected, rtol=1e-4, atol=1e-6)


def test_half_precision_has_a_float32_softmax():
    V, R = (jnp.asarray(4 * normal(i, 1, n, K, p), jnp.bfloat16) for i, n in enumerate((N, m)))
    attended, A = contract_and_broadcast(V, R, jnp.ones(K), jnp.ones(K))
    assert attended.dtype == A.dtype == jnp.bfloat16
    wide = (V.astype(jnp.float32), R.astype(jnp.float32))
    exact = contract_and_broadcast(*wide, jnp.ones(K), jnp.ones(K))[1]
    np.testing.assert_allclose(A.astype(jnp.float32), exact, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (2, 3)])
@pytest.mark.parametrize("cells", [(2, 3), (3, 2), (4, 5)])
def test_pooling_is_pytorchs(grid, cells):
    torch = pytest.importorskip("torch")
    rows, columns = grid
    V = normal(0, B, rows * columns + 1, K, p)  # the last token is in no cell
    on_grid = torch.from_numpy(V[:, :-1]).reshape(B, rows, columns, K * p).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(on_grid, cells)
    expected = expected.permute(0, 2, 3, 1).reshape(B, -1, K, p)
    np.testing.assert_allclose(average_pool(V, grid, cells), expected, rtol=1e-5, atol=1e-6)


def test_the_module_pools_from_the_first_token_on():
    Y = jnp.asarray(normal(0, B, N, d))
    module = CBSA(K, p, grid=(2, 3), cells=(1, 3))
    params = module.init(jax.random.key(0), Y)["params"]
    shapes = {name: leaf.shape for name, leaf in params.items()}
    steps = {"step_r": (K,), "step_x": (K,)}
    assert shapes == {"U": (d, K, p), "W_out": (K, p, d), "b_out": (d,)} | steps
    got = module.apply({"params": params}, Y).update
    pool = functools.partial(average_pool, grid=(2, 3), cells=(1, 3))
    steps = (params["step_r"], params["step_x"])
    expected = cbsa(Y, params["U"], *steps, params["W_out"], params["b_out"], pool=pool).update
    np.testing.assert_array_equal(got, expected)


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be None for CBSA; got one"):
        CBSA(K, p, grid=(2, 3), cells=(1, 3)).init(
            jax.random.key(0), jnp.zeros((B, N, d)), jnp.ones((N, N), bool)
        )
