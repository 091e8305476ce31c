"""TSSA against its equation, and its causal form against the official code and its own pieces."""

import doctest
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models import tssa as module
from crate_jax.models.causal_tssa import attend_by_past_statistics, no_sums
from crate_jax.models.derivatives import normalise
from crate_jax.models.tssa import TSSA, attend_by_statistics, tssa

GOLDEN = Path(__file__).parent.parent / "golden"
B, N, d, K, p = 2, 5, 6, 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def equation(V_NxKxp, tau_K):
    """−Π V / (1 + s), a token and a subspace at a time, in double precision."""
    V, tau = np.asarray(V_NxKxp, np.float64), np.asarray(tau_K, np.float64)
    columns = np.sqrt((V**2).sum(axis=0))
    scores = np.array([[tau[k] * ((v[k] / columns[k]) ** 2).sum() for k in range(K)] for v in V])
    Pi = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    attended = np.empty_like(V)
    for k in range(K):
        s = sum(Pi[n, k] * V[n, k] ** 2 for n in range(len(V))) / Pi[:, k].sum()
        for n in range(len(V)):
            attended[n, k] = -Pi[n, k] * V[n, k] / (1 + s)
    return attended, Pi


def test_the_example_of_the_docstring():
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(tests) == 1
    assert doctest.DocTestRunner().run(tests[0]).failed == 0


def test_it_is_the_equation():
    Y, U, W_out = normal(0, B, N, d), normal(1, d, K, p), normal(2, K, p, d)
    b_out, b, tau = normal(3, d), normal(4, K, p), np.exp(normal(5, K))
    got, seen = jax.jit(functools.partial(tssa, b_Kxp=b))(Y, U, tau, W_out, b_out)
    for i in range(B):
        V = np.einsum("nd,dkp->nkp", Y[i], U) + b
        np.testing.assert_allclose(seen["subspace_tokens"][i], V, rtol=1e-4, atol=1e-5)
        attended, Pi = equation(V, tau)
        np.testing.assert_allclose(seen["membership"][i], Pi.T, rtol=1e-4)
        np.testing.assert_allclose(
            got[i], np.einsum("nkp,kpd->nd", attended, W_out) + b_out, atol=2e-5
        )


def test_one_subspace_has_a_closed_form():
    """Every token belongs to it wholly: −V / (1 + mean V²)."""
    V = normal(0, B, N, 1, p)
    attended, membership = attend_by_statistics(V, jnp.full(1, 3.0))
    np.testing.assert_array_equal(membership, 1.0)
    np.testing.assert_allclose(attended, -V / (1 + (V**2).mean(axis=1, keepdims=True)), rtol=1e-5)


def test_the_update_is_a_descent_on_the_bound_of_the_coding_rate():
    """With Π and s held, −Π V / (1 + s) is minus the gradient of ½ Σ_k n_k Σ_p log(1 + s_kp)."""
    V, tau = normal(1, 1, N, K, p), jnp.ones(K)
    Pi = attend_by_statistics(V, tau)[1]

    def bound(V):
        weights = Pi.sum(axis=1)
        s = (Pi[..., None] * V**2).sum(axis=1) / weights[..., None]
        return 0.5 * jnp.sum(weights[..., None] * jnp.log1p(s))

    np.testing.assert_allclose(
        attend_by_statistics(V, tau)[0], -jax.grad(bound)(jnp.asarray(V)), rtol=1e-4, atol=1e-6
    )


def test_tokens_may_stand_in_any_order():
    V, order = normal(2, B, N, K, p), np.random.default_rng(3).permutation(N)
    straight = attend_by_statistics(V, jnp.ones(K))[0]
    permuted = attend_by_statistics(V[:, order], jnp.ones(K))[0]
    np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-5)


def test_a_subspace_without_tokens_has_a_gradient():
    V = jnp.asarray(normal(2, B, N, K, p)).at[:, :, 1].set(0)
    gradient = jax.grad(lambda V: jnp.sin(attend_by_statistics(V, jnp.ones(K))[0]).sum())(V)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:, :, 0]).min() > 0


def test_half_precision_has_float32_statistics():
    V = jnp.asarray(normal(4, 1, 64, K, p)).astype(jnp.bfloat16)
    attended, membership = attend_by_statistics(V, jnp.ones(K))
    assert attended.dtype == membership.dtype == jnp.bfloat16
    exact = attend_by_statistics(V.astype(jnp.float32), jnp.ones(K))[0]
    np.testing.assert_allclose(attended.astype(jnp.float32), exact, rtol=2**-8)


def test_the_module_has_the_biases_that_it_is_asked_for():
    Y = jnp.asarray(normal(0, B, N, d))
    shapes = {}
    for fields in ({}, {"subspace_bias": True}, {"bias": False}):
        init = jax.eval_shape(TSSA(K, p, **fields).init, jax.random.key(0), Y)
        shapes[str(fields)] = {name: leaf.shape for name, leaf in init["params"].items()}
    plain, biased, bare = shapes.values()
    assert plain == {"U": (d, K, p), "tau": (K,), "W_out": (K, p, d), "b_out": (d,)}
    assert biased == plain | {"b_U": (K, p)}
    assert bare == {name: shape for name, shape in plain.items() if name != "b_out"}


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be None for TSSA; got one"):
        TSSA(K, p).init(jax.random.key(0), jnp.zeros((B, N, d)), jnp.ones((N, N), bool))


# --- causal ---------------------------------------------------------------------------------------


def causal(V, tau, bias):
    return attend_by_past_statistics(V, tau, bias, no_sums(len(V), K, p))


def test_the_causal_form_is_its_equation():
    V, tau, bias = normal(0, 1, N, K, p), np.exp(normal(1, K)), 0.1 * normal(2, N, K)
    attended, membership, _ = jax.jit(causal)(V, tau, bias)
    V = V[0].astype(np.float64)
    weighted, weights = np.zeros((K, p)), np.zeros(K)
    for n in range(N):
        q = (V[: n + 1] ** 2).sum(axis=0)
        scores = tau * (V[n] ** 2 / q + bias[n][:, None]).sum(axis=-1)
        Pi = np.exp(scores) / np.exp(scores).sum()
        weighted, weights = weighted + Pi[:, None] * V[n] ** 2, weights + Pi
        np.testing.assert_allclose(membership[0, n], Pi, rtol=1e-4)
        expected = -Pi[:, None] * V[n] / (1 + weighted / weights[:, None])
        np.testing.assert_allclose(attended[0, n], expected, rtol=1e-4, atol=1e-6)


def test_no_token_sees_a_later_one():
    V, tau, bias = jnp.asarray(normal(0, 1, N, K, p)), jnp.ones(K), jnp.zeros((N, K))
    jacobian = jax.jacobian(lambda V: causal(V, tau, bias)[0].sum(axis=(2, 3))[0])(V)
    reach = np.abs(jacobian[:, 0]).max(axis=(2, 3))  # from token to token
    assert (reach[np.triu_indices(N, 1)] == 0).all()
    assert (reach[np.tril_indices(N)] > 0).all()


@pytest.mark.parametrize("pieces", [(1,) * N, (2, 1, 2), (N,)])
def test_a_text_in_pieces_is_the_text(pieces):
    V, tau, bias = normal(0, B, N, K, p), np.exp(normal(1, K)), normal(2, N, K)
    whole = causal(V, tau, bias)
    sums, start, found = no_sums(B, K, p), 0, []
    for length in pieces:
        places = slice(start, start + length)
        attended, _, sums = attend_by_past_statistics(V[:, places], tau, bias[places], sums)
        found, start = [*found, attended], start + length
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole[0], rtol=1e-5, atol=1e-7)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sums, whole[2])


def test_the_sums_are_wide():
    V = jnp.asarray(normal(0, B, N, K, p)).astype(jnp.bfloat16)
    attended, _, sums = attend_by_past_statistics(
        V, jnp.ones(K), jnp.zeros((N, K)), no_sums(B, K, p, V.dtype)
    )
    assert attended.dtype == jnp.bfloat16
    assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}


def test_the_causal_form_is_the_official_codes():
    """Both layers of the language model, by their inputs; see tests/golden/README.md."""
    torch = pytest.importorskip("torch")
    config = json.loads((GOLDEN / "tost_lang.json").read_text())
    state = torch.load(GOLDEN / "tost_lang.pth", weights_only=True)["model"]
    with np.load(GOLDEN / "tost_lang.npz") as file:
        arrays = dict(file)
    heads, width = config["n_head"], config["n_embd"]
    for layer, inputs in enumerate(("tokens0", "layer00/out")):
        weights = {
            name.removeprefix(f"transformer.h.{layer}."): jnp.asarray(tensor.numpy())
            for name, tensor in state.items()
        }
        W_qkv, W_out = (weights[f"attn.{name}.weight"].T for name in ("c_attn", "c_proj"))
        b_qkv, b_out = (weights[f"attn.{name}.bias"][None, None] for name in ("c_attn", "c_proj"))
        norm = (weights["ln_1.weight"], weights["ln_1.bias"])
        Y = normalise(jnp.asarray(arrays[inputs]), *norm, jnp.float32, 1e-5)
        V = (Y @ W_qkv + b_qkv).reshape(*Y.shape[:2], heads, width // heads)
        tau, bias = weights["attn.temp"][:, 0], weights["attn.denom_bias"][..., 0].T
        start = no_sums(len(Y), heads, width // heads)
        attended = attend_by_past_statistics(V, tau, bias, start)[0]
        update = attended.reshape(Y.shape) @ W_out + b_out
        expected = arrays[f"layer{layer:02d}/attn_out"]
        assert np.abs(update - expected).max() <= 1e-5 * np.abs(expected).max()
