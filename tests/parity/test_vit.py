"""The ViT's twin: equal to timm's on the golden files, and our model equal to it."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from crate_jax import ViT, create_model, list_models
from crate_jax.cli.steps import classifier_steps
from crate_jax.models.cost import abstract_parameters, count_parameters
from crate_jax.tasks.losses import cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity import compare as comparing  # noqa: E402 (needs PyTorch)
from crate_jax.parity.torch_reference import TorchViT, from_flax_model  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
ODD = dict(image_size=(15, 28), patch_size=(5, 7), num_classes=11, in_channels=2)
ODD |= dict(width=96, depth=2, num_heads=3, head_dim=20, mlp_ratio=3)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", ["vit_timm", "vit_crate_baseline"])
def test_reproduces_the_official_implementation(name):
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    model = TorchViT(
        image_size=(config["img_size"],) * 2,
        patch_size=(config["patch_size"],) * 2,
        num_classes=config["num_classes"],
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config["embed_dim"] // config["num_heads"],
        hidden=config["mlp_ratio"] * config["embed_dim"],
        pool="cls" if name == "vit_timm" else "patches_twice",
    )
    state = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    model.load_state_dict(state, strict=True)
    images, labels = torch.tensor(expected["images_nchw"]), torch.tensor(expected["labels"])
    logits, seen = model.trace(images, TorchViT.TAPS)
    assert relative(model.embed(images).detach(), expected["tokens0"]) <= 1e-6
    assert relative(logits.detach(), expected["logits"]) <= 2e-6
    names = {"attention": "attention", "mhsa": "attn_out", "mlp": "mlp_out", "out": "out"}
    for tap, theirs in names.items():
        for layer in range(config["depth"]):
            value = expected[f"layer{layer:02d}/{theirs}"]
            assert relative(seen[tap][layer].detach(), value) <= 2e-6, (tap, layer)
    torch.nn.functional.cross_entropy(logits, labels.long()).backward()
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[f"grad/{key}"]) <= 1e-5, key


@pytest.mark.parametrize("name", list_models("vit_*_patch16_224"))
def test_as_many_parameters_as_the_jax_model(name):
    model = create_model(name)
    with torch.device("meta"):
        twin = from_flax_model(model)
    assert sum(p.numel() for p in twin.parameters()) == count_parameters(model)


def test_starts_as_ours():
    torch.manual_seed(0)
    twin = TorchViT((16, 16), (4, 4), 50, width=64, depth=2, num_heads=4, head_dim=16, hidden=256)
    for name, parameter in twin.named_parameters():
        values = parameter.detach().numpy()
        if name.startswith("patch_embed"):
            assert 0 < np.abs(values).max() <= 48**-0.5
        elif "norm" in name:
            assert np.all(values == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert not np.any(values), name
        else:
            std = 1e-6 if name == "cls_token" else 0.02
            assert np.std(values) == pytest.approx(std, rel=0.3), name


@pytest.mark.parametrize("pool", ["cls", "patches", "patches_twice"])
def test_the_jax_model_computes_the_same(pool):
    """Forward pass, gradients, and, once, two steps of both optimizers."""
    model = ViT(**ODD, pool=pool)
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: np.asarray(
            0.1 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype
        ),
        abstract_parameters(model),
    )
    images = rng.normal(size=(3, *model.input_shape)).astype(np.float32)
    found = comparing.compare(
        model,
        params,
        images,
        np.array([0, 2, 1]),
        loss=functools.partial(cross_entropy, label_smoothing=comparing.SMOOTHING),
        train=functools.partial(classifier_steps, model),
        train_steps=2 if pool == "cls" else 0,
        rate_scale=0.05,
        rounds=1,
    )
    assert found.first_difference is None
    names = [row.name for row in found.rows]
    layers = [f"layer {layer} {tap}" for layer in range(2) for tap in TorchViT.TAPS]
    assert names[:12] == ["embedding tokens", *layers, "logits"]
    assert len(names[12:]) == 4 + 2 * 12 + 4
    assert set(found.training) == ({"adamw", "lion"} if pool == "cls" else set())
    assert found.gradient_images == found.images == 3  # nothing has a threshold


def test_an_unknown_tap():
    model = TorchViT((8, 8), (4, 4), 3, width=6, depth=1, num_heads=1, head_dim=6, hidden=6)
    with pytest.raises(KeyError, match=r"taps must be among attention, mhsa, .*; got ista"):
        model.trace(torch.zeros(1, 3, 8, 8), ("ista",))


@pytest.mark.parametrize("changes", [dict(registers=4), dict(layer_scale=0.1)], ids=str)
def test_what_timms_plain_vit_has_not_is_refused(changes):
    with pytest.raises(ValueError, match=r"model must have no registers and no layer_scale to ha"):
        from_flax_model(ViT(**ODD, **changes))
