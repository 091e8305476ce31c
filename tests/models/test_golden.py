"""The JAX model against what the official implementation computed: forward, backward, training.

The cases are told in tests/golden/README.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import Crate, analysis, load_weights
from crate_jax.interop import to_state_dict
from crate_jax.objective import sparsity

pytest.importorskip("torch")  # the weights are PyTorch files

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("crate_cls", "crate_mean_rect", "crate_single_head")
# The figures of the README; the worst on a CPU are 1.6e-6 and 2.2e-6. GPUs order sums otherwise.
OUTPUTS, GRADIENTS = (5e-6, 1e-5) if jax.default_backend() == "cpu" else (1e-5, 1e-4)


class Case(NamedTuple):
    config: dict
    model: Crate
    params: dict
    images: jax.Array
    expected: dict[str, np.ndarray]

    def stacked(self, name: str) -> np.ndarray:
        keys = sorted(k for k in self.expected if k.startswith("layer") and k.endswith(f"/{name}"))
        assert len(keys) == self.model.depth
        return np.stack([self.expected[key] for key in keys])

    def loss(self, params) -> jax.Array:
        logits = self.model.apply({"params": params}, self.images, train=True)
        classes = jax.nn.one_hot(self.expected["labels"], logits.shape[1])
        targets = optax.smooth_labels(classes, self.config["label_smoothing"])
        return optax.softmax_cross_entropy(logits, targets).mean()


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    config = json.loads((GOLDEN / f"{request.param}.json").read_text())
    sizes = {name: np.broadcast_to(config[name], 2) for name in ("image_size", "patch_size")}
    model = Crate(
        **{name: tuple(map(int, size)) for name, size in sizes.items()},
        num_classes=config["num_classes"],
        width=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        pool=config["pool"],
        in_channels=config["channels"],
        eta=config["ista"],
        lmbda=0.1,  # a constant of the official code
    )
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        expected = dict(file)
    params = load_weights(GOLDEN / f"{request.param}.pth.tar", model)
    images = jnp.asarray(expected["images_nchw"].transpose(0, 2, 3, 1))
    return Case(config, model, jax.tree.map(jnp.asarray, params), images, expected)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_tokens_that_enter_the_first_layer(case):
    _, seen = case.model.apply(
        {"params": case.params},
        case.images,
        train=False,
        capture_intermediates=lambda module, _: module.name == "embedding",
    )
    (tokens,) = seen["intermediates"]["embedding"]["__call__"]
    assert relative(tokens, case.expected["tokens0"]) <= 1e-5


def test_every_layer(case):
    logits, seen = analysis.taps(case.model, case.params, case.images)
    subspace = seen["subspace_tokens"]
    before = np.concatenate([case.expected["tokens0"][None], case.stacked("ista_out")[:-1]])
    pairs = {
        "subspace_tokens": (subspace.reshape(*subspace.shape[:3], -1), "subspace_tokens"),
        "attention": (seen["attention"], "attention"),
        "mssa": (seen["mssa"], "mssa_out"),
        "z_half": (seen["z_half"] - before, "mssa_out"),
        "ista": (seen["ista"], "ista_out"),
    }
    for name, (ours, theirs) in pairs.items():
        for layer, (a, b) in enumerate(zip(ours, case.stacked(theirs), strict=True)):
            error = relative(a, b)
            assert error <= OUTPUTS, f"{name}, layer {layer}: {error:.1e}"
    assert relative(logits, case.expected["logits"]) <= OUTPUTS


def test_loss_and_every_gradient(case):
    loss, grads = jax.jit(jax.value_and_grad(case.loss))(case.params)
    assert relative(loss, case.expected["loss_label_smoothing_0.1"]) <= 1e-5
    theirs = {k.removeprefix("grad/"): v for k, v in case.expected.items() if k.startswith("grad/")}
    ours = to_state_dict(grads, case.model)
    assert ours.keys() == theirs.keys()
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENTS, f"{worst}: {errors[worst]:.1e}"


def test_layerwise_by_the_official_definition(case):
    seen = analysis.layerwise(case.model, case.params, case.images, definition="official_code")
    rates = case.expected["coding_rate_mean_std"]
    assert relative(seen["coding_rate_mean"], rates[:, 0]) <= 1e-4
    # A small difference of two large rates, so its error is a share of the rate.
    assert np.abs(seen["coding_rate_std"] - rates[:, 1]).max() <= 1e-4 * rates[:, 0].max()
    assert np.abs(seen["zero_fraction"] - case.expected["zero_fraction"]).max() <= 1e-4
    _, taps = analysis.taps(case.model, case.params, case.images, ("ista",))
    deviations = sparsity(taps["ista"]).std(axis=1)
    assert np.abs(deviations - case.expected["zero_fraction_std"]).max() <= 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_ten_steps_from_the_stored_weights(case, optimizer):
    settings = case.config[optimizer]
    b1, b2 = settings["betas"]
    make = {"adamw": optax.adamw, "lion": optax.lion}[optimizer]
    tx = make(settings["lr"], b1=b1, b2=b2, weight_decay=settings["weight_decay"])

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(case.loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    params, state, losses = case.params, tx.init(case.params), []
    for _ in range(case.config["steps"]):
        loss, params, state = step(params, state)
        losses.append(loss)
    expected = case.expected[f"traj_{optimizer}"]
    assert expected[0] == pytest.approx(case.expected["loss_label_smoothing_0.1"], rel=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name, array in to_state_dict(params, case.model).items():
        after = case.expected[f"after_{optimizer}/{name}"]
        np.testing.assert_allclose(array, after, rtol=0, atol=1e-5, err_msg=name)
