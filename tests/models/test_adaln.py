"""The adaLN-gated block and white-box diffusion: against NumPy, and shut gates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.models.adaln import AdaLN, WhiteBoxDiffusion

B, G, k, d, K, L = 3, 12, 4, 8, 2, 2
STEPS = np.array([1, 40, 1000])


@pytest.fixture(scope="module")
def model():
    return WhiteBoxDiffusion(length=G, patch_size=k, width=d, depth=L, num_heads=K, lmbda=0.3)


@pytest.fixture(scope="module")
def vectors():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, G)).astype(np.float32))


@pytest.fixture(scope="module")
def started(model, vectors):
    return jax.jit(lambda key: model.init(key, vectors, jnp.asarray(STEPS))["params"])(
        jax.random.key(1)
    )


@pytest.fixture(scope="module")
def params(started):
    """Moved, so that the gates are open."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), started)


# --- NumPy, in float64 ----------------------------------------------------------------------------


def linear(params, X, layer=...):
    kernel, bias = (np.asarray(params[name], np.float64)[layer] for name in ("kernel", "bias"))
    return X @ kernel + bias


def silu(X):
    return X / (1 + np.exp(-X))


def norm(X):
    return (X - X.mean(axis=-1, keepdims=True)) / np.sqrt(X.var(axis=-1, keepdims=True) + 1e-6)


def condition(params, t):
    angles = np.array([t * 1e4 ** (-i / 128) for i in range(128)])
    c = linear(params["step_0"], np.concatenate([np.cos(angles), np.sin(angles)]))
    return linear(params["step_1"], silu(c))


def layer(params, index, Z, c, lmbda):
    """Of one example; the six vectors in the order of the official code."""
    six = np.split(linear(params["adaln"]["linear"], silu(c), index), 6)
    shift, scale, gate = six[:3]
    Y = norm(Z) * (1 + scale) + shift
    U, W_out, b_out = (np.asarray(params["mssa"][n], np.float64)[index] for n in OUT)
    update = b_out.copy()
    for head in range(K):
        V = Y @ U[:, head]
        e = np.exp(V @ V.T / np.sqrt(d / K))
        update = update + (e / e.sum(axis=1, keepdims=True)) @ V @ W_out[head]
    Z = Z + gate * update
    shift, scale, gate = six[3:]
    Y, D = norm(Z) * (1 + scale) + shift, np.asarray(params["ista"]["D"], np.float64)[index]
    return Z + gate * np.maximum(Y + 0.1 * (Y - Y @ D.T) @ D - 0.1 * lmbda, 0)


OUT = ("U", "W_out", "b_out")


def noise(params, x, t, lmbda):
    Z = linear(params["embedding"], x.reshape(G // k, k))
    for n, row in enumerate(
        Z
    ):  # of a grid one patch wide: the column's half is the same everywhere
        angles = n * 1e4 ** (-np.arange(d // 4) / (d // 4))
        row += np.concatenate([np.zeros(d // 4), np.ones(d // 4), np.sin(angles), np.cos(angles)])
    c = condition(params, t)
    for index in range(L):
        Z = layer(params["blocks"], index, Z, c, lmbda)
    shift, scale = np.split(linear(params["last_adaln"], silu(c)), 2)
    return linear(params["last"], norm(Z) * (1 + scale) + shift).reshape(G)


def test_the_model_is_the_one_in_numpy(model, params, vectors):
    got = model.apply({"params": params}, vectors, jnp.asarray(STEPS))
    assert got.shape == (B, G) and got.dtype == jnp.float32
    for row, x, t in zip(got, np.asarray(vectors, np.float64), STEPS, strict=True):
        np.testing.assert_allclose(row, noise(params, x, t, 0.3), rtol=2e-4, atol=2e-4)


# --- gates ----------------------------------------------------------------------------------------


def test_shut_gates_make_every_block_the_identity(model, started, vectors):
    noise, seen = model.apply(
        {"params": started},
        vectors,
        jnp.asarray(STEPS),
        taps=("mssa", "ista", "out"),
        method="forward",
    )
    np.testing.assert_array_equal(seen["out"][0], seen["out"][1])
    assert np.abs(seen["mssa"]).max() > 0.1 and np.abs(seen["ista"]).max() > 0.1
    assert not np.any(noise)  # the last map starts at zero too


def test_the_condition_alone_opens_the_gates():
    """Zero where the map is zero; else the halves of one map, a vector for each example."""
    Z, c = jnp.ones((B, 5, d)), jnp.asarray(np.random.default_rng(3).normal(size=(B, d)))
    c = c.astype(jnp.float32)
    module = AdaLN()
    shut = module.init(jax.random.key(0), Z, None, c)["params"]
    for how in module.apply({"params": shut}, Z, None, c):
        assert all(part.shape == (B, 1, d) and not np.any(part) for part in how)
    open_ = jax.tree.map(lambda x: x + 1.0, shut)
    first, second = module.apply({"params": open_}, Z, None, c)
    expected = 1 + silu(np.asarray(c, np.float64)).sum(axis=1)
    np.testing.assert_allclose(first.gate[:, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(second.shift, first.gate, rtol=1e-5)


def test_noise_depends_on_the_step_and_on_every_value(model, params, vectors):
    whole = lambda x, t: model.apply({"params": params}, x[None], t[None])[0]  # noqa: E731
    one, other = (whole(vectors[0], jnp.asarray(t)) for t in (1, 2))
    assert np.abs(one - other).max() > 1e-3
    jacobian = jax.jacobian(whole)(vectors[0], jnp.asarray(7))
    assert (np.abs(jacobian) > 0).all()


def test_it_learns(model, started, vectors):
    """One step down the gradient of the mean squared error lowers it by as much as it says."""
    target = vectors[::-1]

    def loss(params):
        found = model.apply({"params": params}, vectors, jnp.asarray(STEPS))
        return jnp.square(found - target).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(started)
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
    stepped = jax.tree.map(lambda x, g: x - 0.01 / square * g, started, gradient)
    np.testing.assert_allclose(loss(stepped), value - 0.01, atol=1e-3)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "count"), [(3, 17_926_666), (1, 7_299_082)])
def test_parameter_count(depth, count):
    model = WhiteBoxDiffusion(depth=depth)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 2000)), jnp.ones(1)), jax.random.key(0)
    )
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_parameters_start_as_the_official_ones():
    model = WhiteBoxDiffusion(length=40, width=64, depth=1, num_heads=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 40)), jnp.ones(1))["params"]
    for name in ("U", "W_out"):
        bound = (6 / 128) ** 0.5
        assert 0.98 * bound < np.abs(params["blocks"]["mssa"][name]).max() <= bound
    assert np.abs(params["embedding"]["kernel"]).max() == pytest.approx((6 / 74) ** 0.5, rel=0.02)
    for name in ("step_0", "step_1"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.02, rel=0.05)
        assert not np.any(params[name]["bias"])


def test_half_precision_is_near(model, params, vectors):
    exact = model.apply({"params": params}, vectors, jnp.asarray(STEPS))
    half = model.clone(dtype=jnp.bfloat16).apply({"params": params}, vectors, jnp.asarray(STEPS))
    assert half.dtype == jnp.float32 and 1e-4 < np.abs(half - exact).mean() < 0.1 * np.std(exact)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        (dict(length=14), (1, 14), r"^length must be a multiple of 4; got 14\. Patches, heads and"),
        (dict(width=10), (1, 12), r"^width must be a multiple of 4; got 10\. Patches, heads and"),
        (dict(), (1, 13), r"^vectors must be \(B, 12\) and their steps \(B,\); got \(1, 13\) and"),
        (dict(), (2, 12), r"^vectors must be .* got \(2, 12\) and \(1,\)\. Give one step for each"),
    ],
)
def test_what_does_not_fit(model, fields, shape, message):
    with pytest.raises(ValueError, match=message):
        model.clone(**fields).init(jax.random.key(0), jnp.zeros(shape), jnp.ones(1))
