"""Hyper-SET: its operators against the energies they descend, the model against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

from crate_jax import analysis, create_model, list_models
from crate_jax.models.block import Block, Context
from crate_jax.models.cost import count_parameters
from crate_jax.models.energy import bisoftmax_attention, rms_norm, tied_mlp
from crate_jax.models.hyper_set import DepthCode, HyperSet, Steps, positions
from crate_jax.models.modulation import PerLayer

B, N, d, K, p, m = 2, 5, 6, 2, 4, 9
PARAMETERS = {"hyperset_patch16_224": 2_395_968}
SIZES = dict(image_size=(4, 8), patch_size=2, num_classes=3, width=12, num_heads=3, head_dim=5)


@pytest.fixture(scope="module")
def model():
    return HyperSet(**SIZES, depth=3, mlp_ratio=2)


@pytest.fixture(scope="module")
def params(model):
    """Random ones, so that the steps are not zero."""
    return jax.tree.map(lambda x: 0.4 * x, random_params(model))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(4).normal(size=(B, 4, 8, 3)).astype(np.float32))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


# --- counts ---------------------------------------------------------------------------------------


def test_every_hyper_set_is_in_the_table():
    assert set(list_models("hyperset_*")) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = create_model(name)
    width, pixels, codes = 512, 14 * 14 * 3, 512
    embedding = 2 * pixels + (pixels * width + width) + 2 * width + width
    attention, mlp = width * width + 3 * 64, width * width + width
    linear = codes * width + width
    depth_code, steps = 2 * linear + 3 * width, 2 * linear + width
    head = 2 * width + width * 1000 + 1000
    assert PARAMETERS[name] == embedding + attention + mlp + depth_code + steps + head
    assert count_parameters(model) == PARAMETERS[name]
    assert (model.num_tokens, model.depth, model.num_heads) == (16 * 16 + 1, 12, 8)


def test_the_count_does_not_depend_on_depth_and_is_that_of_cifar():
    of_cifar = create_model("hyperset_patch16_224", image_size=32, patch_size=4, num_classes=10)
    assert [count_parameters(of_cifar.clone(depth=L)) for L in (1, 12, 40)] == [1_610_538] * 3


# --- operators ------------------------------------------------------------------------------------


def test_attention_is_the_gradient_of_its_energy():
    """√p Σ_k Σ_i logsumexp_j(⟨w_i, w_j⟩/√p), by the normalised subspace tokens w, back by U_kᵀ."""
    X, U = draw(B, N, d), draw(d, K, p, seed=1)
    ones = [jnp.ones(p)] * 3

    def energy(w_BxNxKxp):
        scores = jnp.einsum("bnkp,bmkp->bknm", w_BxNxKxp, w_BxNxKxp) / p**0.5
        return p**0.5 * jax.nn.logsumexp(scores, axis=-1).sum()

    w_BxNxKxp = rms_norm(jnp.einsum("bnd,dkp->bnkp", X, U), jnp.ones(p))
    expected = jnp.einsum("bnkp,dkp->bnd", jax.grad(energy)(w_BxNxKxp), U)
    found, seen = bisoftmax_attention(X, U, ones)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # Over the keys and over the queries the shares of a token are one each.
    np.testing.assert_allclose(seen["attention"].sum(axis=(2, 3)), np.full((B, K), 2.0 * N))
    np.testing.assert_allclose(
        seen["attention"], np.swapaxes(seen["attention"], 2, 3), rtol=1e-4, atol=1e-6
    )


def test_an_mlp_with_relu_would_be_the_gradient_of_its_energy(monkeypatch):
    """½‖ReLU(h)‖² by h = RMSNorm(X V), back by Vᵀ."""
    X, V = draw(B, N, d), draw(d, m, seed=1)
    h = rms_norm(X @ V, jnp.ones(m))
    expected = jax.grad(lambda h: 0.5 * jnp.square(jax.nn.relu(h)).sum())(h) @ V.T
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: jax.nn.relu(x))
    np.testing.assert_allclose(tied_mlp(X, V, jnp.ones(m)), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_on_a_sphere_in_every_subspace():
    norms = np.linalg.norm(rms_norm(draw(B, N, K, p), jnp.ones(p)), axis=-1)
    np.testing.assert_allclose(norms, p**0.5, rtol=1e-5)


def test_a_mask_is_of_the_keys_and_of_the_queries():
    """Causal, and nobody sees token 2, which has no query to sum over."""
    X, U, ones = draw(B, N, d), draw(d, K, p, seed=1), [jnp.ones(p)] * 3
    mask = np.tril(np.ones((N, N), bool))
    mask[:, 2] = False
    found, seen = bisoftmax_attention(X, U, ones, mask=jnp.asarray(mask)[None, None])
    w = rms(np.einsum("nd,dkp->knp", np.asarray(X[0], np.float64), U), np.ones(p))
    for k in range(K):
        e = np.where(mask, np.exp(w[k] @ w[k].T / p**0.5), 0)
        A = e / e.sum(axis=1, keepdims=True) + e / np.maximum(e.sum(axis=0, keepdims=True), 1e-30)
        np.testing.assert_allclose(seen["attention"][0, k], A, atol=1e-5)
    whole = lambda X: bisoftmax_attention(X, U, ones, mask=jnp.asarray(mask)[None, None])  # noqa: E731
    gradient = jax.grad(lambda X: whole(X).update[:, 1].sum())(X)
    assert np.isfinite(found).all() and np.isfinite(gradient).all()


# --- NumPy, in float64 ----------------------------------------------------------------------------


def rms(X, scale):
    eps = np.finfo(np.float32).eps
    return X / np.sqrt((X**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def layer_norm(params, X):
    centred = X - X.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt(X.var(axis=-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]
    )


def gelu(X):
    return X * (1 + np.vectorize(math.erf)(X / np.sqrt(2))) / 2


def softmax(S, axis):
    e = np.exp(S - S.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def code(params, t):
    """c_t of one depth."""
    half = [np.exp(-np.log(1e4) * i / 255) * t for i in range(256)]
    c = np.concatenate([np.sin(half), np.cos(half)])
    c = rms(linear(params["linear_0"], c), params["norm_0"]["scale"])
    c = rms(gelu(c), params["norm_1"]["scale"])
    return rms(linear(params["linear_1"], c), params["norm_2"]["scale"])


def linear(params, X):
    return X @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def block(params, X, c):
    """One image, one recurrence."""
    state = c + rms(X, params["steps"]["norm"]["scale"])
    alpha, beta = np.split(linear(params["steps"]["linear"], gelu(state)), 2, axis=-1)
    U, V = (np.asarray(x, np.float64) for x in (params["bisoftmax"]["U"], params["tied_mlp"]["V"]))
    descent = np.zeros_like(X)
    for k in range(U.shape[1]):
        q, key, v = (rms(X @ U[:, k], params["bisoftmax"][f"{x}_scale"]) for x in "qkv")
        S = q @ key.T / np.sqrt(U.shape[2])
        descent += (softmax(S, 1) + softmax(S, 0)) @ v @ U[:, k].T
    X = X - alpha * descent
    return X + beta * (gelu(rms(X @ V, params["tied_mlp"]["scale"])) @ V.T)


def embedded(params, image):
    rows = image.reshape(2, 2, 4, 2, 3).transpose(0, 2, 1, 3, 4).reshape(8, 12)
    X = layer_norm(params["patch_norm"], rows.astype(np.float64))
    X = layer_norm(params["token_norm"], linear(params["projection"], X))
    X = np.concatenate([np.asarray(params["cls_token"], np.float64)[None], X])
    for n, row in enumerate(X):
        for i in range(0, len(row), 2):
            row[i] += np.sin(n / 1e4 ** (i / len(row)))
            row[i + 1] += np.cos(n / 1e4 ** (i / len(row)))
    return X


def test_the_model_is_the_one_in_numpy(model, params, images):
    logits, seen = analysis.taps(model, params, images, names="out")
    for b, image in enumerate(np.asarray(images)):
        X = embedded(params["embedding"], image)
        for t in range(1, 4):
            X = block(params["block"], X, code(params["depth_code"], t))
            np.testing.assert_allclose(seen["out"][t - 1, b], X, rtol=1e-4, atol=1e-4)
        expected = linear(params["head"], layer_norm(params["head_norm"], X[0]))
        np.testing.assert_allclose(logits[b], expected, rtol=1e-4, atol=1e-4)


# --- recurrence -----------------------------------------------------------------------------------


def test_depth_is_that_many_times_the_same_block(model, params, images):
    """The whole model of L layers is L models of a block, each with its own code of the depth."""
    names = model.tap_names
    assert names == ("attention", "bisoftmax", "z_half", "tied_mlp", "out")
    _, seen = analysis.taps(model, params, images, names=names)
    codes = DepthCode(12).apply({"params": params["depth_code"]}, 3)
    longer = DepthCode(12).apply({"params": params["depth_code"]}, 5)
    np.testing.assert_allclose(codes, longer[:3], atol=1e-5)  # a depth's code is its own
    assert np.abs(codes[0] - codes[1]).max() > 1e-2
    one = Block(
        attention=model.attention_part,
        nonlinearity=model.nonlinearity_part,
        dtype=jnp.float32,
        backward="derived",
        **model.block_fields(),
    )
    for t in (1, 2):
        got, _ = one.apply(
            {"params": params["block"]},
            seen["out"][t - 1],
            PerLayer(condition=codes[t]),
            Context(),
        )
        np.testing.assert_allclose(got, seen["out"][t], rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_identity_and_learns_its_steps(model, images):
    params = jax.jit(lambda key: model.init(key, images, train=False)["params"])(jax.random.key(0))
    _, seen = analysis.taps(model, params, images, names=("attention", "bisoftmax", "out"))
    np.testing.assert_array_equal(seen["out"][0], seen["out"][2])
    assert np.abs(seen["bisoftmax"]).max() > 0.1
    loss = lambda params: model.apply({"params": params}, images, train=True).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)
    assert np.abs(gradients["block"]["steps"]["linear"]["kernel"]).max() > 0
    linears = (params["depth_code"]["linear_0"], params["depth_code"]["linear_1"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(linears))


def test_parameters_start_as_the_official_ones():
    model = create_model("hyperset_patch16_224", image_size=32, patch_size=8)
    params = jax.jit(lambda key: model.init(key, model.sample_input(), train=False)["params"])(
        jax.random.key(1)
    )
    for weight in (params["block"]["bisoftmax"]["U"], params["block"]["tied_mlp"]["V"]):
        assert 0.99 * 512**-0.5 < np.abs(weight).max() <= 512**-0.5
    assert np.std(params["embedding"]["cls_token"]) == pytest.approx(1, rel=0.1)
    scales = [leaf for path, leaf in leaves(params) if path.endswith("scale")]
    assert len(scales) == 11 and all((scale == 1).all() for scale in scales)


def leaves(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def test_gates_are_the_two_halves_of_one_map():
    X, c = draw(B, N, d), draw(d, seed=1)
    module = Steps()
    params = {
        "norm": {"scale": draw(d, seed=2)},
        "linear": {"kernel": draw(d, 2 * d, seed=3), "bias": draw(2 * d, seed=4)},
    }
    alpha, beta = module.apply({"params": params}, X, c, None)
    state = np.asarray(c, np.float64) + rms(np.asarray(X, np.float64), params["norm"]["scale"])
    both = linear(params["linear"], gelu(state))
    np.testing.assert_allclose(alpha.gate, both[..., :d], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(beta.gate, both[..., d:], rtol=1e-4, atol=1e-5)
    assert alpha.scale is beta.shift is None


def test_positions_are_sines_and_cosines_in_turn():
    table = positions(300, 8)
    assert table.shape == (300, 8) and positions(3, 5).shape == (3, 5)
    np.testing.assert_array_equal(table[0], [0, 1] * 4)
    for n, i in ((7, 2), (299, 0), (120, 6)):
        expected = np.sin(n / 1e4 ** (i / 8)), np.cos(n / 1e4 ** (i / 8))
        np.testing.assert_allclose(table[n, i : i + 2], expected, atol=1e-6)


@pytest.mark.parametrize(
    "way", [dict(remat="full"), dict(remat="dots"), dict(scan_unroll=3)], ids=str
)
def test_what_only_says_how_changes_nothing(model, params, images, way):
    def gradient(model):
        loss = lambda params: jnp.sum(  # noqa: E731
            jnp.sin(model.apply({"params": params}, images, train=False))
        )
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        gradient(model.clone(**way)),
        gradient(model),
    )


def test_half_precision_is_near(model, params, images):
    exact = model.apply({"params": params}, images, train=False)
    half = model.clone(dtype=jnp.bfloat16).apply({"params": params}, images, train=False)
    assert half.dtype == jnp.float32 and 1e-4 < np.abs(half - exact).mean() < 0.1 * np.std(exact)


def test_what_is_measured_of_its_layers(model, params, images):
    """R of the tokens; there is no MSSA and no ISTA."""
    found = analysis.layerwise(model, params, images)
    assert set(found) == {"rate_mean"} and found["rate_mean"].shape == (3,)
