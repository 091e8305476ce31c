"""CRATE-BERT against its equations written out in NumPy, by the official names of its weights."""

import math

import jax
import numpy as np
import pytest
from weights import random_params

from crate_jax import CrateBert
from crate_jax.interop import to_state_dict

MODEL = CrateBert(context_length=7, vocab_size=11, width=6, depth=2, num_heads=2)
TOKENS = np.array([[5, 9, 3, 7, 2], [4, 8, 10, 1, 1]])  # the second text is filled up by ones


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def norm(state, name, X):
    centred = X - X.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(X):
    return X * (1 + np.vectorize(math.erf)(X / math.sqrt(2))) / 2


def encode(state, tokens):
    """One text without padding (N,) to the tokens (N, d) of the last layer."""
    of = "crate.embeddings."
    Z = state[of + "word_embeddings.weight"][tokens]
    Z = Z + state[of + "position_embeddings.weight"][2 : 2 + len(tokens)]
    Z = norm(state, of + "LayerNorm", Z + state[of + "token_type_embeddings.weight"][0])
    for layer in range(MODEL.depth):
        of = f"crate.encoder.layer.{layer}."
        V = (
            norm(state, of + "attention.self.prenorm", Z)
            @ state[of + "attention.self.qkv.weight"].T
        )
        heads = []
        for V_k in np.split(V, MODEL.num_heads, axis=1):
            A = np.exp(V_k @ V_k.T / math.sqrt(V_k.shape[1]))
            heads.append(A / A.sum(1, keepdims=True) @ V_k)
        Z = Z + np.concatenate(heads, axis=1) @ state[of + "attention.output.dense.weight"].T
        Y, D = norm(state, of + "output.prenorm", Z), state[of + "output.weight"]
        Z = np.maximum(Y + 0.1 * (Y @ D - Y @ D.T @ D) - 0.1 * 0.1, 0)
    return Z


def read(state, Z):
    """Tokens to logits."""
    X = gelu(Z @ state["lm_head.dense.weight"].T + state["lm_head.dense.bias"])
    X = norm(state, "lm_head.layer_norm", X)
    return X @ state["lm_head.decoder.weight"].T + state["lm_head.decoder.bias"]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_tokens_of_texts_with_and_without_padding(tied):
    model = MODEL.clone(tied=tied)
    params = random_params(model)
    state = {name: x.astype(np.float64) for name, x in to_state_dict(params, model).items()}
    logits = model.apply({"params": params}, TOKENS, train=False)
    tokens = model.apply({"params": params}, TOKENS, train=False, method="forward_features")
    for text, length in ((0, 5), (1, 3)):
        Z = encode(state, TOKENS[text, :length])
        np.testing.assert_allclose(tokens[text, :length], Z, atol=1e-5)
        expected = read(state, Z)
        np.testing.assert_allclose(logits[text, :length], expected, atol=1e-5 * expected.max())
    assert 0 < (Z == 0).mean() < 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_pytorch_twin_computes_the_equations(tied):
    """There is no official output that it could be held to."""
    torch = pytest.importorskip("torch")
    from crate_jax.parity.torch_reference import from_flax_model

    model = MODEL.clone(tied=tied)
    state = to_state_dict(random_params(model), model)
    twin = from_flax_model(model)
    twin.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    logits, seen = twin.trace(twin.inputs(TOKENS), ("ista",))
    state = {name: x.astype(np.float64) for name, x in state.items()}
    for text, length in ((0, 5), (1, 3)):
        Z = encode(state, TOKENS[text, :length])
        tokens = seen["ista"][-1, text, :length].detach().numpy()
        np.testing.assert_allclose(tokens, Z, atol=1e-5 * Z.max())
        expected = read(state, Z)
        found = logits[text, :length].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_the_gradient_is_that_of_the_equations(params):
    """By finite differences of the equations, along one direction of all parameters."""
    key = jax.random.key(0)
    direction = jax.tree.map(lambda x: np.asarray(jax.random.normal(key, x.shape)), params)

    def loss(params):
        logits = MODEL.apply({"params": params}, TOKENS[:1], train=False)
        return jax.nn.log_softmax(logits)[0, :, 3].sum()

    along = jax.tree.map(lambda g, v: (g * v).sum(), jax.jit(jax.grad(loss))(params), direction)
    slope = sum(jax.tree.leaves(along))

    def exact(step):
        moved = jax.tree.map(
            lambda x, v: x.astype(np.float64) + step * v.astype(np.float64), params, direction
        )
        state = to_state_dict(moved, MODEL)
        logits = read(state, encode(state, TOKENS[0]))
        return (logits[:, 3] - np.log(np.exp(logits).sum(-1))).sum()

    step = 1e-6
    np.testing.assert_allclose(slope, (exact(step) - exact(-step)) / (2 * step), rtol=1e-3)
