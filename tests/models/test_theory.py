"""The switches of the theory: each against its equation in NumPy, and all through a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crate_jax
from crate_jax.interop import to_state_dict
from crate_jax.models.layers import ista_step, mssa
from crate_jax.models.theory import StepSizes, TiedMSSA, ista
from crate_jax.objective import subspace_coding_rate

SIZES = dict(image_size=8, patch_size=4, width=12, depth=2, num_heads=2, num_classes=3)
SWITCHES = {
    "minus": dict(attention_sign="minus"),
    "tied": dict(tied_output=True),
    "soft": dict(threshold="soft"),
    "steps": dict(ista_steps=3),
    "shared": dict(step_sizes="shared"),
    "per_layer": dict(step_sizes="per_layer", ista_steps=2, threshold="soft"),
}


@functools.cache
def build(**switches):
    model = crate_jax.create_model("crate_tiny_patch16_224", **SIZES, **switches)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = model.init(jax.random.key(1), images, train=False)["params"]
    return model, params, images


def outputs(model, params, images, names=None):
    return crate_jax.analysis.taps(model, params, images, names)


# --- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_ista_is_proximal_gradient_descent(soft, steps):
    rng = np.random.default_rng(0)
    Y, D = rng.normal(size=(2, 3, 5)), rng.normal(size=(5, 5)) / 3
    eta, lmbda, A, values = 0.2, 0.3, Y, []
    for _ in range(steps):
        moved = A + eta * (Y - A @ D.T) @ D
        shrunk = np.maximum(np.abs(moved) - eta * lmbda, 0) * np.sign(moved)
        A = shrunk if soft else np.maximum(moved - eta * lmbda, 0)
        values.append(0.5 * np.sum((Y - A @ D.T) ** 2) + lmbda * np.abs(A).sum())
    found = ista(*map(jnp.float32, (Y, D)), StepSizes(eta, lmbda), steps=steps, soft=soft)
    np.testing.assert_allclose(found, A, atol=1e-6)
    assert values == sorted(values, reverse=True)  # η is below 1/‖D‖²: every step descends
    assert np.any(A < 0) == soft and np.any(A == 0)


def test_one_step_is_that_of_crate():
    Y = jax.random.normal(jax.random.key(0), (2, 3, 5))
    D = jax.random.normal(jax.random.key(1), (5, 5))
    one = ista(Y, D, StepSizes(0.1, 0.2))
    np.testing.assert_array_equal(one, ista_step(Y, D, eta=0.1, lmbda=0.2))


def test_a_tied_output_is_the_gradient_of_the_coding_rate():
    """With one token in each place of the softmax's mean, K = 1 and small ε it descends R^c."""
    Z = jax.random.normal(jax.random.key(0), (1, 6, 8))
    U = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (8, 6)))[0].reshape(8, 2, 3)
    module = TiedMSSA(num_heads=2, head_dim=3, kernel=None)
    params = {"U": U, "step": jnp.float32(0.5)}
    update = module.apply({"params": params}, Z).update
    V = jnp.einsum("bnd,dkp->bknp", Z, U)
    A = jax.nn.softmax(V @ V.swapaxes(-1, -2) * 3**-0.5, axis=-1)
    by_hand = 0.5 * jnp.einsum("bknp,dkp->bnd", A @ V, U)
    np.testing.assert_allclose(update, by_hand, atol=1e-6)
    # Σ_k U_k U_kᵀ Z without the softmax is the first term of −∇R^c: it lies in the same subspaces.
    gradient = jax.grad(lambda z: subspace_coding_rate(z, U, eps=1.0).sum())(Z)
    inside = jnp.einsum("bnd,dkp,ekp->bne", gradient, U, U)
    np.testing.assert_allclose(inside, gradient, atol=1e-5)
    inside = jnp.einsum("bnd,dkp,ekp->bne", update, U, U)
    np.testing.assert_allclose(inside, update, atol=1e-5)


def test_a_free_output_that_is_set_to_u_is_a_tied_one():
    Z = jax.random.normal(jax.random.key(0), (2, 5, 8))
    U = jax.random.normal(jax.random.key(1), (8, 2, 4))
    tied = TiedMSSA(2, 4, kernel=None).apply({"params": {"U": U, "step": jnp.float32(2)}}, Z)
    free = mssa(Z, U, 2 * U.transpose(1, 2, 0))
    np.testing.assert_allclose(tied.update, free.update, rtol=1e-6)


# --- the model ------------------------------------------------------------------------------------


def test_crate_n_differs_by_the_sign_alone():
    (plus, params, images), (minus, other, _) = build(), build(attention_sign="minus")
    jax.tree.map(np.testing.assert_array_equal, params, other)
    _, seen = outputs(plus, params, images, ["mssa", "z_half"])
    _, turned = outputs(minus, params, images, ["mssa", "z_half"])
    first = {name: (a[0], turned[name][0]) for name, a in seen.items()}  # the same tokens go in
    np.testing.assert_array_equal(*first["mssa"])
    entering = first["z_half"][0] - first["mssa"][0]
    np.testing.assert_allclose(first["z_half"][1], entering - first["mssa"][1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_trains_and_both_backward_passes_agree(switches):
    model, params, images = build(**switches)

    def loss(params, model):
        return jnp.square(model.apply({"params": params}, images, train=True)).sum()

    derived = jax.jit(jax.grad(loss), static_argnums=1)(params, model)
    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, model.clone(backward="autodiff"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(derived):
        assert jnp.any(leaf != 0), path
    scale = jax.tree.map(lambda a: np.abs(a).max() + 1e-3, plain)
    jax.tree.map(
        lambda a, b, s: np.testing.assert_allclose(a, b, atol=2e-5 * s), derived, plain, scale
    )
    base, *_ = build()
    changed = outputs(model, params, images)[0] - outputs(base, build()[1], images)[0]
    assert jnp.abs(changed).max() > 1e-4 or "step_sizes" in switches


@pytest.mark.parametrize("step_sizes", ["shared", "per_layer"])
def test_learned_step_sizes_start_as_the_fixed_ones(step_sizes):
    (fixed, params, images), (model, learned, _) = build(), build(step_sizes=step_sizes)
    shape = () if step_sizes == "shared" else (2,)
    where = learned if step_sizes == "shared" else learned["blocks"]["ista"]
    assert where["log_eta"].shape == where["log_lmbda"].shape == shape
    np.testing.assert_allclose(jnp.exp(where["log_eta"]), 0.1, rtol=1e-6)
    told = {**learned, "blocks": {**learned["blocks"]}}
    for group in ("mssa", "mssa_norm", "ista_norm"):
        told["blocks"][group] = params["blocks"][group]
    told["blocks"]["ista"] = {**learned["blocks"]["ista"], "D": params["blocks"]["ista"]["D"]}
    told |= {group: params[group] for group in ("embedding", "head_norm", "head")}
    same = [outputs(*given, images)[0] for given in ((fixed, params), (model, told))]
    np.testing.assert_allclose(*same, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_weights_of_a_switch_come_back_and_official_files_refuse_it(switches, tmp_path):
    model, params, _ = build(**switches)
    crate_jax.save_weights(tmp_path / "w.safetensors", params, model)
    back = crate_jax.load_weights(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    with pytest.raises(ValueError, match=r"must (be|have) .*(safetensors|official names)"):
        to_state_dict(params, model, layout="official")
    with pytest.raises(ValueError, match=r"must (be|have) .*safetensors"):
        crate_jax.save_weights(tmp_path / "w.pth", params, model)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (dict(attention="mhsa", tied_output=True), "model.tied_output must be False if"),
        (dict(nonlinearity="mlp", ista_steps=2), "model.ista_steps must be 1 if"),
        (dict(nonlinearity="mlp", threshold="soft"), "model.threshold must be relu if"),
        (dict(step_sizes="shared", lmbda=0.0), "model.lmbda must be > 0 if"),
    ],
)
def test_switches_that_do_not_go_together(fields, rule):
    model = crate_jax.create_model("crate_tiny_patch16_224", **SIZES, **fields)
    with pytest.raises(ValueError) as caught:
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    assert str(caught.value).startswith(rule)
