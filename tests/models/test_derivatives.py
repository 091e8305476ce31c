"""The written backward passes, against finite differences and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from crate_jax.config import ModelConfig
from crate_jax.models.derivatives import BACKWARD, NORMALISE
from crate_jax.models.zoo import build_model

RANDOM = [tuple(np.random.default_rng(i).integers(1, 40, 3).tolist()) for i in range(4)]
TOKENS = [(3, 64), (1, 197, 384), (4, 1, 2, 33), *RANDOM]
CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def normal(seed, *shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def relative(got, expected):
    got, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-6)


def assert_near(got, expected, dtype):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.shape == e.shape and relative(g, e) <= CLOSE[dtype]


def pulled_back(function, inputs, gradients):
    """Outputs, and the gradients of the inputs; one program, as a user's step is."""

    @jax.jit
    def run(inputs, gradients):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(jax.tree.map(lambda g, o: g.astype(o.dtype), gradients, outputs))

    return run(inputs, gradients)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", TOKENS)
def test_layer_norm_equals_automatic_differentiation_in_float32(shape, dtype):
    X, scale, bias = normal(0, *shape, dtype=dtype), normal(1, shape[-1]), normal(2, shape[-1])
    narrow = lambda X, scale, bias: NORMALISE["derived"](X, scale, bias, dtype, 1e-5)  # noqa: E731
    wide = lambda X, scale, bias: NORMALISE["autodiff"](X, scale, bias, jnp.float32, 1e-5)  # noqa: E731
    gradient = normal(3, *shape, dtype=dtype)
    got = pulled_back(narrow, [X, scale, bias], gradient)
    inputs = [X.astype(jnp.float32), scale, bias]
    assert_near(got, pulled_back(wide, inputs, gradient.astype(jnp.float32)), dtype)
    assert [x.dtype for x in got[1]] == [dtype, jnp.float32, jnp.float32]


@pytest.mark.parametrize("backward", BACKWARD)
def test_both_ways_agree_with_finite_differences(backward):
    normalise = lambda X, scale, bias: NORMALISE[backward](X, scale, bias, jnp.float32, 1e-5)  # noqa: E731
    tokens = (normal(1, 2, 5, 6), normal(2, 6), normal(3, 6))
    check_grads(normalise, tokens, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def model(**changes):
    sizes = dict(image_size=(16, 24), patch_size=(8,), width=24, depth=3, num_heads=3)
    config = ModelConfig(name="crate_tiny_patch16_224", num_classes=5, **sizes | changes)
    return build_model(config)


@pytest.fixture(scope="module")
def images():
    return normal(0, 4, 16, 24, 3)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(lambda key: model().init(key, images, train=False)["params"])(jax.random.key(0))


def loss_of(crate, images):
    """Of logits and of what kernels leave to be seen, so that every gradient flows."""
    taps = ("subspace_tokens", "mssa", "z_half")

    def loss(params):
        logits, seen = crate.apply(
            {"params": params}, images, train=False, taps=taps, method="forward"
        )
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in (logits, *seen.values()))

    return loss


@pytest.mark.parametrize("heads", [dict(num_heads=3), dict(num_heads=1)])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_of_the_model_are_the_same_either_way(images, heads, remat):
    crates = [model(**heads, remat=remat, backward=backward) for backward in BACKWARD]
    init = jax.jit(lambda key: crates[0].init(key, images, train=False)["params"])
    params = init(jax.random.key(0))
    got, expected = (jax.jit(jax.grad(loss_of(c, images)))(params) for c in crates)
    assert_near(got, expected, jnp.float32)


def test_the_setting_picks_the_backward_pass(images, params, equations):
    """By the products (N, N) by (N, p): two forward; four backward, with (dS + dSᵀ) V as one.

    The scores are computed once more either way: the attention alone is kept, or not even that.
    """
    N = 7

    def products(backward):
        loss = lambda params: (  # noqa: E731
            model(backward=backward).apply({"params": params}, images, train=False).sum()
        )
        found = 0
        for equation, times in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr):
            shapes = [v.aval.shape[-2:] for v in (*equation.invars, *equation.outvars)]
            if equation.primitive.name == "dot_general" and (N, N) in shapes:
                found += times
        return found

    assert (products("derived"), products("autodiff")) == (3 * 6, 3 * 7)


def test_forward_mode_needs_automatic_differentiation(images, params):
    def slope(backward):
        apply = lambda p: model(backward=backward).apply({"params": p}, images, train=False)  # noqa: E731
        return jax.jvp(apply, (params,), (params,))[1]

    assert np.isfinite(slope("autodiff")).all()
    with pytest.raises(TypeError, match="forward-mode"):
        slope("derived")
