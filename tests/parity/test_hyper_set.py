"""Hyper-SET's twin: its sizes, how it starts, and our model equal to it."""

import functools

import jax
import numpy as np
import pytest

from crate_jax import create_model
from crate_jax.cli.steps import classifier_steps
from crate_jax.models.cost import abstract_parameters, count_parameters
from crate_jax.models.hyper_set import HyperSet
from crate_jax.tasks.losses import cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity import compare as comparing  # noqa: E402 (needs PyTorch)
from crate_jax.parity.torch_reference import TorchHyperSet, from_flax_model  # noqa: E402

ODD = dict(image_size=(15, 28), patch_size=(5, 7), num_classes=11, in_channels=2)
MODEL = HyperSet(**ODD, width=18, depth=3, num_heads=3, head_dim=5, mlp_ratio=2)


def test_as_many_parameters_as_the_jax_model():
    model = create_model("hyperset_patch16_224")
    with torch.device("meta"):
        twin = from_flax_model(model)
    assert sum(p.numel() for p in twin.parameters()) == count_parameters(model)


def test_it_starts_as_the_identity():
    torch.manual_seed(0)
    twin = TorchHyperSet(MODEL)
    _, seen = twin.trace(torch.randn(2, 2, 15, 28), ("bisoftmax", "out"))
    assert torch.equal(seen["out"][0], seen["out"][2])
    assert seen["bisoftmax"].abs().max() > 0.1


def test_the_jax_model_computes_the_same():
    """Forward pass, gradients, and two steps of both optimizers."""
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: np.asarray(
            0.2 * rng.normal(size=leaf.shape) + ("scale" in path[-1].key), leaf.dtype
        ),
        abstract_parameters(MODEL),
    )
    images = rng.normal(size=(3, *MODEL.input_shape)).astype(np.float32)
    found = comparing.compare(
        MODEL,
        params,
        images,
        np.array([0, 2, 1]),
        loss=functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING),
        train=functools.partial(classifier_steps, MODEL),
        train_steps=2,
        rate_scale=0.05,
        rounds=1,
    )
    assert found.first_difference is None
    names = [row.name for row in found.rows]
    layers = [f"layer {layer} {tap}" for layer in range(3) for tap in TorchHyperSet.TAPS]
    assert names[:17] == ["embedding tokens", *layers, "logits"]
    assert len(names[17:]) == 27
    assert set(found.training) == {"adamw", "lion"}


def test_an_unknown_tap():
    with pytest.raises(KeyError, match=r"taps must be among attention, bisoftmax, .*; got mhsa"):
        TorchHyperSet(MODEL).trace(torch.zeros(1, 2, 15, 28), ("mhsa",))
