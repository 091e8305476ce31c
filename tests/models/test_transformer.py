"""Multi-head self-attention and the MLP, a token at a time; MSSA is a case of the former."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models.layers import mssa
from crate_jax.models.transformer import MHSA, MLP, mhsa, mlp

B, N, d, K, p, m = 2, 5, 6, 3, 4, 7
CAUSAL = np.tril(np.ones((N, N), bool))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Y = normal(0, B, N, d)
W_QKV, B_QKV = normal(1, d, 3, K, p), normal(2, 3, K, p)
W_OUT, B_OUT = normal(3, K, p, d), normal(4, d)
MLP_WEIGHTS = normal(5, d, m), normal(6, m), normal(7, m, d), normal(8, d)


def slow_mhsa(Y_Nxd, W_qkv, b_qkv, W_out, b_out, sees):
    """Update (N, d) and attention (K, N, N); `sees[n][m]`: whether token n sees token m."""
    Y_Nxd = np.asarray(Y_Nxd, np.float64)
    update, attention = np.tile(b_out.astype(np.float64), (N, 1)), np.zeros((K, N, N))
    for k in range(K):
        q, key, v = ([W_qkv[:, s, k].T @ y + b_qkv[s, k] for y in Y_Nxd] for s in range(3))
        for n in range(N):
            weight = np.array(
                [math.exp(q[n] @ key[j] / math.sqrt(p)) if sees[n][j] else 0 for j in range(N)]
            )
            attention[k, n] = weight / weight.sum()
            update[n] += sum(a * x for a, x in zip(attention[k, n], v, strict=True)) @ W_out[k]
    return update, attention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
def test_mhsa_is_the_one_written_out(bias, mask):
    b_qkv = B_QKV if bias else None
    update, seen = jax.jit(mhsa)(Y, W_QKV, b_qkv, W_OUT, B_OUT, mask=mask)
    assert set(seen) == set(MHSA.TAPS)
    for b in range(B):
        sees = np.ones((N, N), bool) if mask is None else mask
        expected = slow_mhsa(Y[b], W_QKV, B_QKV * bias, W_OUT, B_OUT, sees)
        np.testing.assert_allclose(update[b], expected[0], atol=3e-5)
        np.testing.assert_allclose(seen["attention"][b], expected[1], atol=1e-6)


def test_what_a_mask_hides_changes_nothing():
    changed = Y.copy()
    changed[:, 3:] += 1
    before, after = (
        mhsa(y, W_QKV, B_QKV, W_OUT, B_OUT, mask=jnp.asarray(CAUSAL)).update for y in (Y, changed)
    )
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 0.1


def test_mssa_is_mhsa_with_three_equal_maps():
    U = normal(9, d, K, p)
    ours = mssa(Y, U, W_OUT, B_OUT)
    theirs = mhsa(Y, np.stack([U] * 3, axis=1), None, W_OUT, B_OUT)
    np.testing.assert_allclose(ours.update, theirs.update, atol=2e-5)
    np.testing.assert_allclose(ours.seen["attention"], theirs.seen["attention"], atol=1e-6)


def test_mlp_is_the_one_written_out():
    W_in, b_in, W_out, b_out = MLP_WEIGHTS
    got = jax.jit(mlp)(Y, *MLP_WEIGHTS)
    for b, n in np.ndindex(B, N):
        expected = b_out.astype(np.float64)
        for j in range(m):
            x = float(Y[b, n].astype(np.float64) @ W_in[:, j] + b_in[j])
            expected = expected + x * (1 + math.erf(x / math.sqrt(2))) / 2 * W_out[j]
        np.testing.assert_allclose(got[b, n], expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_keep_the_dtype_of_the_tokens(dtype):
    def cast(*arrays):
        return [jnp.asarray(array, dtype) for array in arrays]

    update, seen = mhsa(*cast(Y, W_QKV, B_QKV, W_OUT, B_OUT))
    assert {update.dtype, seen["attention"].dtype} == {jnp.dtype(dtype)}
    assert mlp(*cast(Y, *MLP_WEIGHTS)).dtype == dtype


def test_half_precision_attention_has_a_float32_softmax():
    """Of scores up to 40 a softmax in bfloat16 would lose whole factors; only its result rounds."""
    y, W = (jnp.asarray(a, jnp.bfloat16) for a in (2 * Y, W_QKV))
    q, k, _ = (np.asarray(jnp.einsum("bnd,dkp->bknp", y, W[:, s]), np.float64) for s in range(3))
    scores = np.einsum("bknp,bkmp->bknm", q, k) / math.sqrt(p)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    W_out, b_out = jnp.asarray(W_OUT, jnp.bfloat16), jnp.asarray(B_OUT, jnp.bfloat16)
    got = mhsa(y, W, None, W_out, b_out).seen["attention"].astype(jnp.float32)
    assert np.abs(scores).max() > 20
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_module_of_mhsa_owns_its_parameters(qkv_bias):
    module = MHSA(K, p, qkv_bias=qkv_bias)
    params = module.init(jax.random.key(0), Y)["params"]
    shapes = {name: leaf.shape for name, leaf in params.items()}
    bias = {"b_qkv": (3, K, p)} if qkv_bias else {}
    assert shapes == {"W_qkv": (d, 3, K, p), "W_out": (K, p, d), "b_out": (d,)} | bias
    weights = {"W_qkv": W_QKV, "W_out": W_OUT, "b_out": B_OUT} | ({"b_qkv": B_QKV} if bias else {})
    got = module.apply({"params": weights}, Y, jnp.asarray(CAUSAL))
    expected = mhsa(Y, W_QKV, weights.get("b_qkv"), W_OUT, B_OUT, mask=jnp.asarray(CAUSAL))
    np.testing.assert_array_equal(got.update, expected.update)


def test_the_module_of_the_mlp_owns_its_parameters():
    module = MLP(m)
    params = module.init(jax.random.key(0), Y)["params"]
    names = ("W_in", "b_in", "W_out", "b_out")
    assert {name: leaf.shape for name, leaf in params.items()} == {
        name: array.shape for name, array in zip(names, MLP_WEIGHTS, strict=True)
    }
    weights = dict(zip(names, map(jnp.asarray, MLP_WEIGHTS), strict=True))
    got = module.apply({"params": weights}, jnp.asarray(Y))
    np.testing.assert_allclose(got, mlp(Y, *weights.values()), rtol=1e-6)
    half = MLP(m, jnp.bfloat16).apply({"params": weights}, jnp.asarray(Y))
    assert half.dtype == jnp.bfloat16
