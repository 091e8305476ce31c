"""CRATE-α against what its official implementations computed: forward, backward, training.

The cases are told in tests/golden/README.md. Our model has the ε of the official JAX code in every
LayerNorm. The PyTorch port has another one in the head's: where its numbers are the yardstick, the
model here has it too, and one test says how far apart the two are.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import CrateAlpha, analysis, load_weights, save_weights
from crate_jax.config import OptimConfig
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.interop.tree import flatten
from crate_jax.models.layers import LayerNorm
from crate_jax.tasks import Classify
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.state import init_state, replace_params
from crate_jax.training.step import make_train_step

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(image_size=32, patch_size=8, num_classes=10, width=32, depth=2, num_heads=4)
MODEL = CrateAlpha(**SIZES)


class PyTorchPort(CrateAlpha):
    """With the head of the PyTorch port."""

    def make_head_norm(self):
        return LayerNorm(jnp.float32, self.backward, 1e-5, name="head_norm")


PORT = PyTorchPort(**SIZES)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def read(name):
    with np.load(GOLDEN / name) as file:
        return dict(file)


def under(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def params():
    loaded = load_weights(GOLDEN / "crate_alpha_jax.npz", MODEL)
    return jax.tree.map(jnp.asarray, loaded)


@pytest.fixture(scope="module")
def case():
    return read("crate_alpha.npz")


@pytest.fixture(scope="module")
def training():
    return read("crate_alpha_train.npz")


@pytest.fixture(scope="module")
def settings():
    return json.loads((GOLDEN / "crate_alpha_train.json").read_text())


def nhwc(arrays):
    return jnp.asarray(arrays["images_nchw"].transpose(0, 2, 3, 1))


def assert_near(ours, theirs, share):
    assert ours.keys() == theirs.keys()
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= share, f"{worst}: {errors[worst]:.1e}"


def assert_layers(model, params, arrays, prefix=""):
    logits, seen = analysis.taps(model, params, nhwc(arrays), ("mssa", "odl"))
    for tap, layers in seen.items():
        for i, ours in enumerate(layers):
            error = relative(ours, arrays[f"{prefix}layer{i:02}/{tap}_out"])
            assert error <= 1e-5, f"{tap}, layer {i}: {error:.1e}"
    assert relative(logits, arrays[f"{prefix}logits"]) <= 1e-5
    return logits


def test_the_configuration_is_the_models():
    config = json.loads((GOLDEN / "crate_alpha.json").read_text())
    assert {MODEL.eta, MODEL.lmbda} == {config["eta"], config["lmbda"]}
    assert MODEL.overcompleteness == config["overcomplete_ratio"]
    assert config["layer_norm_eps_blocks"] == MODEL.EPSILON
    assert config["layer_norm_eps_head"] == 1e-5


def test_both_files_load_alike_and_are_saved_as_they_were(params, tmp_path):
    torch = pytest.importorskip("torch")
    file = GOLDEN / "crate_alpha.pth"
    jax.tree.map(np.testing.assert_array_equal, load_weights(file, MODEL), params)
    save_weights(tmp_path / "w.pth", params, MODEL)
    states = [torch.load(path, weights_only=True) for path in (file, tmp_path / "w.pth")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    save_weights(tmp_path / "w.npz", params, MODEL, layout="jax")
    with np.load(GOLDEN / "crate_alpha_jax.npz") as theirs, np.load(tmp_path / "w.npz") as ours:
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_layers_and_logits_of_the_pytorch_port(params, case):
    logits = assert_layers(PORT, params, case)
    ours = MODEL.apply({"params": params}, nhwc(case), train=False)
    assert 1e-7 < relative(ours, logits) <= 5e-6  # the head's ε alone


@pytest.mark.parametrize("model", [PORT, MODEL], ids=["head of the port", "head of ours"])
def test_loss_and_every_gradient_of_the_pytorch_port(model, params, case):
    images, labels = nhwc(case), jnp.asarray(case["labels"], jnp.int32)

    def loss(params):
        logits = model.apply({"params": params}, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert relative(value, case["loss"]) <= 1e-5
    assert_near(to_state_dict(grads, MODEL), under(case, "grad/"), 1e-4)


def test_layers_loss_and_every_gradient_of_the_jax_code(params, training):
    assert_layers(MODEL, params, training, "jax/")
    task, batch = Classify(MODEL), batch_of(training)

    def loss(params):
        return task.loss(params, (), batch, jax.random.key(0))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert relative(value, training["jax/loss"]) <= 1e-5
    assert relative(optax.tree.norm(grads), training["jax/grad_norm"]) <= 1e-5
    assert_near(to_state_dict(grads, MODEL, layout="jax"), under(training, "jax/grad/"), 1e-4)


def batch_of(arrays):
    """Images that are normalised already, and soft targets."""
    return {"image": nhwc(arrays), "label": jnp.asarray(arrays["targets"])}


def train(model, params, arrays, optim, steps, schedule=None):
    """Our training step as a run makes it: losses before each step, rates, and the weights after.

    A step is an epoch here, so that the schedule of the configuration counts in steps.
    """
    schedule = schedule or make_schedule(optim, total_steps=40, steps_per_epoch=1)
    task, tx = Classify(model), make_optimizer(optim, schedule)
    step = jax.jit(make_train_step(task, tx, schedule=schedule))
    key = jax.random.key(0)
    state = replace_params(init_state(task, tx, key), params)
    seen = []
    for _ in range(steps):
        state, metrics = step(state, batch_of(arrays), key)
        seen.append(metrics)
    return [m["loss"] for m in seen], [m["lr"] for m in seen], state.params


def assert_weights(after, training, prefix, rate, share):
    """Within a share of the rate, but for two weights whose gradients are rounding alone.

    They start below 1e-9. Adam's ε is 1e-8, and float32 leaves gradients 5e-9 apart.
    """
    theirs = from_state_dict(under(training, prefix), MODEL)
    gradient = from_state_dict(under(training, "jax/grad/"), MODEL)
    drifting = 0
    for path, leaf in flatten(theirs).items():
        error = np.abs(flatten(after)[path] - leaf)
        vanishing = (flatten(gradient)[path] != 0) & (np.abs(flatten(gradient)[path]) < 1e-9)
        assert error[~vanishing].max() <= share * rate, path
        assert error[vanishing].max(initial=0) <= 5e-2 * rate, path
        drifting += vanishing.sum()
    assert drifting == 2


def test_ten_steps_of_adam_as_the_pytorch_port(params, training, settings):
    adam = settings["adam"]
    optim = OptimConfig(
        lr=adam["lr"], b1=adam["betas"][0], b2=adam["betas"][1], eps=adam["eps"], weight_decay=0.0
    )
    constant = optax.constant_schedule(adam["lr"])
    losses, _, after = train(PORT, params, training, optim, settings["steps"], constant)
    np.testing.assert_allclose(losses, training["torch/traj_adam"], rtol=1e-5)
    assert_weights(after, training, "torch/after_adam/", adam["lr"], 1e-3)


@pytest.mark.parametrize(
    ("mu_dtype", "suffix", "share"),
    [("float32", "_float32_moment", 1e-3), ("bfloat16", "", 5e-2)],
    ids=["float32", "bfloat16"],
)
def test_ten_steps_of_the_official_recipe(params, training, settings, mu_dtype, suffix, share):
    recipe = settings["recipe"]
    assert recipe["total_steps"] == 40 and recipe["decay_on"] == ".*/kernel$"
    optim = OptimConfig(
        lr=recipe["lr"],
        end_lr=recipe["min_lr"],
        warmup_epochs=recipe["warmup_steps"],
        b1=recipe["b1"],
        b2=recipe["b2"],
        mu_dtype=mu_dtype,
        clip_norm=recipe["clip"],
        weight_decay=recipe["wd"],
        decay_only=("kernel", "U", "W_out"),
    )
    losses, rates, after = train(MODEL, params, training, optim, settings["steps"])
    np.testing.assert_allclose(rates, training["jax/learning_rate"], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(losses, training[f"jax/traj_recipe{suffix}"], rtol=1e-5)
    assert_weights(after, training, f"jax/after_recipe{suffix}/", recipe["lr"], share)
