"""The PyTorch reference: equal to the official implementation, and the JAX model equal to it."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from crate_jax import Crate, analysis, create_model, list_models
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.models.cost import count_parameters

torch = pytest.importorskip("torch")
from crate_jax.parity.torch_reference import (  # noqa: E402 (needs PyTorch)
    TWINS,
    TorchCrate,
    from_flax_model,
)

TAPS = TorchCrate.TAPS
GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("crate_cls", "crate_mean_rect", "crate_single_head")

ODD_MODELS = {
    "oblong image and patch": Crate((15, 28), (5, 7), 11, width=26, depth=2, num_heads=2),
    "subspaces wider than the tokens": Crate(
        18, 6, 3, width=10, depth=3, num_heads=3, head_dim=7, pool="mean", in_channels=2
    ),
    "one subspace of all dimensions": Crate(9, 3, 4, width=13, depth=1, num_heads=1, eta=0.3),
    "one subspace of some dimensions": Crate(
        9, 3, 4, width=13, depth=2, num_heads=1, head_dim=5, lmbda=0.7
    ),
}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def smoothed_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("name", CASES)
def test_reproduces_the_official_implementation(name):
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    model = TorchCrate(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        width=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        pool=config["pool"],
        in_channels=config["channels"],
        eta=config["ista"],
    )
    checkpoint = torch.load(GOLDEN / f"{name}.pth.tar", weights_only=True)["state_dict"]
    bare = {key.removeprefix("module."): value for key, value in checkpoint.items()}
    model.load_state_dict(bare, strict=True)

    images, labels = torch.tensor(expected["images_nchw"]), torch.tensor(expected["labels"])
    assert relative(model.embed(images).detach(), expected["tokens0"]) <= 1e-6
    logits, seen = model.trace(images, TAPS)
    assert tuple(seen) == TAPS
    assert relative(logits.detach(), expected["logits"]) <= 1e-6
    seen["subspace_tokens"] = seen["subspace_tokens"].flatten(3)
    before = expected["tokens0"]
    for layer in range(config["depth"]):
        theirs = {
            tap: expected[f"layer{layer:02}/{file_name}"]
            for tap, file_name in (
                ("subspace_tokens", "subspace_tokens"),
                ("attention", "attention"),
                ("mssa", "mssa_out"),
                ("ista", "ista_out"),
            )
        }
        theirs["z_half"] = before + theirs["mssa"]
        before = theirs["ista"]
        for tap, value in theirs.items():
            assert relative(seen[tap][layer].detach(), value) <= 2e-6, (tap, layer)

    loss = smoothed_loss(logits, labels)
    loss.backward()
    assert relative(loss.detach(), expected["loss_label_smoothing_0.1"]) <= 1e-6
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[f"grad/{key}"]) <= 1e-5, key


@pytest.mark.parametrize(
    "name", [n for n in list_models("crate_[tsbl]*_224") if not n.startswith("crate_mh")]
)
def test_as_many_parameters_as_the_jax_model(name):
    model = create_model(name)
    with torch.device("meta"):
        reference = from_flax_model(model)
    assert sum(p.numel() for p in reference.parameters()) == count_parameters(model)


@pytest.mark.parametrize("sizes", ODD_MODELS)
def test_the_jax_model_computes_the_same(sizes):
    model = ODD_MODELS[sizes]
    torch.manual_seed(0)
    reference = from_flax_model(model)
    with torch.no_grad():  # norms and biases that would not show if they were left out
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    params = from_state_dict({k: v.numpy() for k, v in reference.state_dict().items()}, model)
    H, W = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    images = torch.randn(3, model.in_channels, H, W)
    labels = torch.tensor([0, 2, 1])
    nhwc = images.permute(0, 2, 3, 1).numpy()

    logits, seen = reference.trace(images, TAPS)
    our_logits, our_seen = analysis.taps(model, params, nhwc)
    assert relative(our_logits, logits.detach()) <= 1e-5
    for name in TAPS:
        assert relative(our_seen[name], seen[name].detach()) <= 1e-5, name

    def loss_of(params):
        targets = optax.smooth_labels(jax.nn.one_hot(labels.numpy(), model.num_classes), 0.1)
        logits = model.apply({"params": params}, nhwc, train=True)
        return optax.softmax_cross_entropy(logits, targets).mean()  # type: ignore

    smoothed_loss(logits, labels).backward()
    grads = to_state_dict(jax.grad(loss_of)(params), model)
    for key, parameter in reference.named_parameters():
        assert relative(grads[key], parameter.grad) <= 1e-4, key


def test_starts_as_the_official_code_does():
    torch.manual_seed(0)
    model = TorchCrate(16, 4, 10, width=64, depth=1, num_heads=4)
    mssa, ista = model.transformer.layers[0]  # type: ignore
    bounds = {
        "D": (ista.fn.weight, (6 / 64) ** 0.5),
        "U": (mssa.fn.qkv.weight, 64**-0.5),
        "W_out": (mssa.fn.to_out[0].weight, 64**-0.5),
    }
    for name, (weight, bound) in bounds.items():
        assert 0.98 * bound < weight.abs().max().item() <= bound, name
    for weight in (model.pos_embedding, model.cls_token):
        assert abs(weight.std().item() - 1) < 0.3 and abs(weight.mean().item()) < 0.4


def test_unknown_pool_and_unknown_tap():
    with pytest.raises(ValueError, match="pool must be one of cls, mean; got max"):
        TorchCrate(16, 4, 10, width=8, depth=1, num_heads=2, pool="max")
    model = TorchCrate(16, 4, 10, width=8, depth=1, num_heads=2)
    with pytest.raises(KeyError, match=r"taps must be among .*; got qkv"):
        model.trace(torch.zeros(1, 3, 16, 16), ("qkv",))


def test_a_model_without_a_twin():
    class Other(Crate):
        pass

    assert set(TWINS) >= {Crate}
    with pytest.raises(ValueError, match=r"with a PyTorch twin \(.*Crate.*\); got Other"):
        from_flax_model(Other(8, 4, 5, width=6, depth=1, num_heads=2))
