"""The JAX model against what the official implementation computed: forward, backward, analysis.

Needs no PyTorch: the weights of each case lie beside it as arrays by official name. Which files
belong together is told in tests/golden/README.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import Crate, analysis
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.models.crate import pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.layers import subspace_self_attention
from crate_jax.objective import projected_coding_rate, sparsity

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("crate_cls", "crate_mean_rect", "crate_single_head")


class Case(NamedTuple):
    model: Crate
    params: dict
    images: np.ndarray
    expected: dict[str, np.ndarray]  # from the weights in params
    elsewhere: dict[str, np.ndarray]  # from weights that are not stored

    def stacked(self, name: str) -> np.ndarray:
        return stack_layers(self.expected, name)


def stack_layers(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    keys = sorted(key for key in arrays if key.startswith("layer") and key.endswith(f"/{name}"))
    return np.stack([arrays[key] for key in keys])


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    config = json.loads((GOLDEN / f"{request.param}.json").read_text())
    model = Crate(
        image_size=pair(config["image_size"]),
        patch_size=pair(config["patch_size"]),
        num_classes=config["num_classes"],
        width=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        pool=config["pool"],
        in_channels=config["channels"],
        eta=config["ista"],
    )
    files = []
    for suffix in ("_weights", "_rerun", ""):
        with np.load(GOLDEN / f"{request.param}{suffix}.npz") as file:
            files.append(dict(file))
    weights, expected, elsewhere = files
    params = from_state_dict(weights, model)
    return Case(model, params, expected["images_nchw"].transpose(0, 2, 3, 1), expected, elsewhere)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def smoothed_loss(logits, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def test_tokens_that_enter_the_first_layer(case):
    embedding = PatchEmbedding(pair(case.model.patch_size), case.model.width)
    tokens = embedding.apply({"params": case.params["embedding"]}, case.images)
    assert relative(tokens, case.expected["tokens0"]) <= 1e-5


def test_every_layer(case):
    logits, seen = analysis.taps(case.model, case.params, case.images)
    subspace = seen["subspace_tokens"]
    seen["subspace_tokens"] = subspace.reshape(*subspace.shape[:3], -1)
    before = np.concatenate([case.expected["tokens0"][None], case.stacked("ista_out")[:-1]])
    theirs = {
        "subspace_tokens": case.stacked("subspace_tokens"),
        "attention": case.stacked("attention"),
        "mssa": case.stacked("mssa_out"),
        "z_half": before + case.stacked("mssa_out"),
        "ista": case.stacked("ista_out"),
    }
    for name, expected in theirs.items():
        assert len(expected) == case.model.depth
        for layer, (a, b) in enumerate(zip(seen[name], expected, strict=True)):
            error = relative(a, b)
            assert error <= 1e-5, f"{name}, layer {layer}: {error:.1e}"
    assert relative(logits, case.expected["logits"]) <= 1e-4


def test_loss_and_every_gradient(case):
    def loss_of(params):
        logits = case.model.apply({"params": params}, case.images, train=True)
        return smoothed_loss(logits, case.expected["labels"])

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(case.params)
    assert relative(loss, case.expected["loss_label_smoothing_0.1"]) <= 1e-5
    theirs = {k.removeprefix("grad/"): v for k, v in case.expected.items() if k.startswith("grad/")}
    ours = to_state_dict(grads, case.model)
    assert ours.keys() == theirs.keys()
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-4, f"{worst}: {errors[worst]:.1e}"


def test_layerwise_by_the_official_definition(case):
    seen = analysis.layerwise(
        case.model, case.params, jnp.asarray(case.images), definition="official_code"
    )
    rates = case.expected["coding_rate_mean_std"]
    assert relative(seen["coding_rate_mean"], rates[:, 0]) <= 1e-4
    # A small difference of two large rates, so its error is a share of the rate.
    assert np.abs(seen["coding_rate_std"] - rates[:, 1]).max() <= 1e-4 * rates[:, 0].max()
    zeros = np.abs(seen["zero_fraction"] - case.expected["zero_fraction"])
    assert zeros.max() <= 1e-4


def test_what_follows_from_the_subspace_tokens_alone(case):
    flat = stack_layers(case.elsewhere, "subspace_tokens")
    K, p = case.model.num_heads, case.model.subspace_dim
    W_LxBxNxKxp = jnp.asarray(flat.reshape(*flat.shape[:3], K, p))
    for W_BxNxKxp, attention in zip(
        W_LxBxNxKxp, stack_layers(case.elsewhere, "attention"), strict=True
    ):
        assert relative(subspace_self_attention(W_BxNxKxp)[1], attention) <= 1e-5
    unit = W_LxBxNxKxp / jnp.linalg.norm(W_LxBxNxKxp, axis=-1, keepdims=True)
    rates = projected_coding_rate(unit, eps=0.1).mean(axis=1)
    assert relative(rates, case.elsewhere["coding_rate_mean_std"][:, 0]) <= 1e-4


def test_what_follows_from_the_last_tokens_and_the_logits_alone(case):
    zeros = sparsity(jnp.asarray(stack_layers(case.elsewhere, "ista_out"))).mean(axis=1)
    np.testing.assert_allclose(zeros, case.elsewhere["zero_fraction"], atol=1e-6)
    logits, labels = jnp.asarray(case.elsewhere["logits"]), case.elsewhere["labels"]
    loss, d_logits = jax.value_and_grad(smoothed_loss)(logits, labels)
    assert relative(loss, case.elsewhere["loss_label_smoothing_0.1"]) <= 1e-6
    assert relative(d_logits.sum(axis=0), case.elsewhere["grad/mlp_head.1.bias"]) <= 1e-5
