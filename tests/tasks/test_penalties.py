"""The penalties against NumPy, and through the classifier's loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.analysis import taps
from crate_jax.models.zoo import create_model
from crate_jax.objective import rate_reduction
from crate_jax.tasks.classify import Classify
from crate_jax.tasks.penalties import Penalties, orthogonality

SIZES = dict(image_size=8, patch_size=4, width=12, depth=3, num_heads=2, num_classes=3)
BATCH = {
    "image": jax.random.normal(jax.random.key(0), (4, 8, 8, 3)),
    "label": jnp.array([0, 1, 2, 0]),
}
KEY = jax.random.key(5)


def start(name="crate_tiny_patch16_224", attention=None, **penalties):
    model = create_model(name, **SIZES, **({"attention": attention} if attention else {}))
    task = Classify(model=model, penalties=Penalties(**penalties))
    return task, task.init(jax.random.key(1))[0]


@functools.partial(jax.jit, static_argnums=0)
def loss_of(task, params, key=KEY):
    return task.loss(params, (), BATCH, key)


def test_orthogonality_is_the_distance_of_the_gram_matrices():
    rng = np.random.default_rng(0)
    U, D = rng.normal(size=(2, 6, 2, 3)), rng.normal(size=(2, 6, 9))
    params = {"blocks": {"mssa": {"U": U, "W_out": U}, "odl": {"D": D}}, "head": {"U": U}}
    params = jax.tree.map(jnp.float32, params)
    expected = 0.0
    for layer in range(2):
        X = U[layer].reshape(6, 6)
        expected += np.sum((X.T @ X - np.eye(6)) ** 2) / 2
        expected += np.sum((D[layer] @ D[layer].T - np.eye(6)) ** 2) / 2  # wide: of its rows
    np.testing.assert_allclose(orthogonality(params), expected, rtol=1e-5)
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    flat = {"blocks": {"ista": {"D": jnp.float32(Q[None])}}}
    assert orthogonality(flat) < 1e-10
    shared = {"block": {"bisoftmax": {"U": jnp.float32(2 * Q.reshape(6, 2, 3))}}}
    np.testing.assert_allclose(orthogonality(shared), 6 * 3**2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"penalty\.orthogonality must be 0 for a model without U"):
        orthogonality({"blocks": {"mlp": {"W_in": jnp.ones((1, 2, 2))}}})


@pytest.mark.parametrize("layer", ["all", "random"])
def test_srr_is_the_objective_of_the_layers(layer):
    task, params = start(srr=0.5, srr_layer=layer, srr_lmbda=0.2, srr_eps=0.7)
    loss, (_, scalars) = loss_of(task, params)
    plain, (_, without) = loss_of(dataclasses.replace(task, penalties=Penalties()), params)
    assert set(scalars) - set(without) == {"penalty/srr"}
    np.testing.assert_allclose(loss - plain, 0.5 * scalars["penalty/srr"], rtol=1e-5)
    _, seen = taps(task.model, params, BATCH["image"], "out")
    N = seen["out"].shape[2]
    by_layer = [
        float(
            jnp.mean(
                0.2 * jnp.abs(Z).sum((1, 2))
                - rate_reduction(Z, params["blocks"]["mssa"]["U"][i], eps=0.7)
            )
            / N
        )
        for i, Z in enumerate(seen["out"])
    ]
    if layer == "all":
        np.testing.assert_allclose(scalars["penalty/srr"], np.mean(by_layer), rtol=1e-4)
    else:
        assert min(abs(scalars["penalty/srr"] - value) for value in by_layer) < 1e-4
        keys = jax.random.split(KEY, 12)
        values = [loss_of(task, params, key)[1][1]["penalty/srr"] for key in keys]
        drawn = {round(float(value), 4) for value in values}
        assert len(drawn) == 3  # every layer gets its turn


def test_penalties_reach_every_layer():
    task, params = start(srr=1.0, srr_layer="all", orthogonality=1.0)
    plain = dataclasses.replace(task, penalties=Penalties())
    with_, without = (
        jax.jit(jax.grad(lambda p, t=t: loss_of(t, p)[0]))(params) for t in (task, plain)
    )
    for group, leaf in (("mssa", "U"), ("ista", "D")):
        change = with_["blocks"][group][leaf] - without["blocks"][group][leaf]
        assert jnp.all(jnp.abs(change).max(axis=tuple(range(1, change.ndim))) > 1e-4)


@pytest.mark.parametrize("attention", ["tssa", "cbsa"])
def test_srr_is_of_the_subspaces_of_any_attention(attention):
    task, params = start(attention=attention, srr=1.0, srr_layer="all", srr_eps=0.7)
    _, seen = taps(task.model, params, BATCH["image"], "out")
    bases = params["blocks"][attention]["U"]
    gains = [rate_reduction(Z, U, eps=0.7) for Z, U in zip(seen["out"], bases, strict=True)]
    length = 0.1 * jnp.abs(seen["out"]).sum((2, 3))
    found = loss_of(task, params)[1][1]["penalty/srr"]
    expected = (length - jnp.stack(gains)).mean() / seen["out"].shape[2]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hyperset_patch16_224"])
def test_a_model_without_subspaces_has_no_srr(name):
    with pytest.raises(ValueError, match=r"penalty\.srr must be 0 for a model without MSSA.*0\.5"):
        start(name, srr=0.5)


@pytest.mark.parametrize("penalties", [dict(srr=0.1), dict(orthogonality=0.1)], ids=str)
def test_a_penalty_falls_while_it_is_paid_for(penalties):
    task, params = start(**penalties)
    (name,) = (f"penalty/{name}" for name in penalties)

    @jax.jit
    def step(params, key):
        gradient, (_, scalars) = jax.grad(task.loss, has_aux=True)(params, (), BATCH, key)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), scalars[name]

    seen = []
    for key in jax.random.split(KEY, 60):
        params, value = step(params, key)
        seen.append(float(value))
    assert np.mean(seen[-10:]) < np.mean(seen[:10])
