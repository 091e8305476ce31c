"""The projection onto orthonormal parameters, alone and at the end of an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax.sections import OptimConfig
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.orthonormal import nearest, orthonormal

PARAMS = {
    "blocks": {
        "mssa": {"U": jax.random.normal(jax.random.key(0), (2, 6, 2, 2))},
        "ista": {"D": jax.random.normal(jax.random.key(1), (2, 4, 7))},
    },
    "head": {"kernel": jax.random.normal(jax.random.key(2), (6, 3))},
}
GRADIENT = jax.tree.map(jnp.ones_like, PARAMS)


def stepped(names):
    optim = OptimConfig(orthonormal=names, weight_decay=0.1)
    tx = make_optimizer(optim, optax.constant_schedule(0.1))
    with jax.numpy_dtype_promotion("standard"):  # as in the step
        updates, _ = jax.jit(tx.update)(GRADIENT, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def gram(X):
    X = X.reshape(*X.shape[:2], -1)
    X = X.swapaxes(1, 2) if X.shape[2] > X.shape[1] else X
    return jnp.einsum("ldm,ldn->lmn", X, X)


def test_what_is_named_is_orthonormal_after_a_step():
    free, named = stepped(()), stepped(("U", "D"))
    for group, name in (("mssa", "U"), ("ista", "D")):
        found = gram(named["blocks"][group][name])
        np.testing.assert_allclose(found, np.broadcast_to(np.eye(4), found.shape), atol=1e-5)
        assert jnp.abs(gram(free["blocks"][group][name]) - jnp.eye(4)[None]).max() > 0.1
        np.testing.assert_allclose(
            named["blocks"][group][name], nearest(free["blocks"][group][name]), atol=1e-5
        )
    np.testing.assert_array_equal(free["head"]["kernel"], named["head"]["kernel"])
    only = stepped(("U",))
    np.testing.assert_array_equal(only["blocks"]["ista"]["D"], free["blocks"]["ista"]["D"])


def test_no_orthonormal_matrix_is_nearer():
    X = PARAMS["blocks"]["ista"]["D"]
    best = jnp.linalg.norm(nearest(X) - X)
    for key in jax.random.split(jax.random.key(3), 20):
        other = nearest(nearest(X) + 0.1 * jax.random.normal(key, X.shape))
        assert jnp.linalg.norm(other - X) > best
    np.testing.assert_allclose(nearest(nearest(X)), nearest(X), atol=1e-5)


def test_a_parameter_that_all_layers_share_is_one_matrix():
    U = jax.random.normal(jax.random.key(4), (6, 2, 2))
    params = {"block": {"bisoftmax": {"U": U}, "tied_mlp": {"V": U[:, 0]}}}
    tx = orthonormal(("U", "V"))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)["block"]
    for X, n in ((moved["bisoftmax"]["U"], 4), (moved["tied_mlp"]["V"], 2)):
        np.testing.assert_allclose(gram(X[None])[0], np.eye(n), atol=1e-5)


def test_an_output_projection_is_a_matrix_from_all_subspaces_to_the_width():
    W_out = jax.random.normal(jax.random.key(4), (3, 2, 4, 8))  # L, K, p, d
    moved = nearest(W_out).reshape(3, 8, 8)
    np.testing.assert_allclose(
        jnp.einsum("lmd,lme->lde", moved, moved), np.broadcast_to(np.eye(8), (3, 8, 8)), atol=1e-5
    )


@pytest.mark.parametrize("name", ["V", "kernel"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(KeyError, match=rf"optim\.orthonormal must name .* got {name}\."):
        stepped((name,))
