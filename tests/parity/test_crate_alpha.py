"""The PyTorch twin of CRATE-α: equal to the official port, and the JAX model equal to it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from crate_jax import CrateAlpha, analysis, create_model, load_weights
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.models.cost import count_parameters
from crate_jax.tasks.losses import cross_entropy

torch = pytest.importorskip("torch")
from crate_jax.parity import compare as comparing  # noqa: E402 (needs PyTorch)
from crate_jax.parity.crate_alpha import TorchCrateAlpha  # noqa: E402
from crate_jax.parity.torch_reference import from_flax_model  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = CrateAlpha(32, 8, 10, width=32, depth=2, num_heads=4)
MODELS = {
    "oblong": CrateAlpha(
        (15, 28), (5, 7), 11, width=26, depth=2, num_heads=2, in_channels=2, overcompleteness=3
    ),
    "not decoupled": CrateAlpha(
        18, 6, 3, width=10, depth=3, num_heads=3, head_dim=7, decoupled=False, eta=0.3
    ),
    "no residual, one subspace": CrateAlpha(
        9, 3, 4, width=13, depth=2, num_heads=1, residual=False, lmbda=0.7
    ),
}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_reproduces_the_official_port():
    with np.load(GOLDEN / "crate_alpha.npz") as file:
        expected = dict(file)
    twin = TorchCrateAlpha(SMALL)
    twin.load_state_dict(torch.load(GOLDEN / "crate_alpha.pth", weights_only=True), strict=True)
    images, labels = torch.tensor(expected["images_nchw"]), torch.tensor(expected["labels"])
    assert relative(twin(images).detach(), expected["logits"]) <= 5e-6  # the head's ε is another
    twin.mlp_head[0].eps = 1e-5  # type: ignore[union-attr]
    logits, seen = twin.trace(images, twin.TAPS)
    assert tuple(seen) == twin.TAPS == SMALL.tap_names
    assert relative(logits.detach(), expected["logits"]) <= 1e-6
    for layer in range(SMALL.depth):
        for tap in ("mssa", "odl"):
            theirs = expected[f"layer{layer:02}/{tap}_out"]
            assert relative(seen[tap][layer].detach(), theirs) <= 2e-6, (tap, layer)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert relative(loss.detach(), expected["loss"]) <= 1e-6
    for name, parameter in twin.named_parameters():
        assert relative(parameter.grad, expected[f"grad/{name}"]) <= 1e-5, name


@pytest.mark.parametrize("name", MODELS)
def test_the_jax_model_computes_the_same(name):
    model = MODELS[name]
    torch.manual_seed(0)
    twin = from_flax_model(model)
    with torch.no_grad():  # norms and biases that would not show if they were left out
        for parameter in twin.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    params = from_state_dict({k: v.numpy() for k, v in twin.state_dict().items()}, model)
    H, W, c = model.input_shape
    images, labels = torch.randn(3, c, H, W), torch.tensor([0, 2, 1])
    nhwc = images.permute(0, 2, 3, 1).numpy()

    logits, seen = twin.trace(images, twin.TAPS)
    our_logits, our_seen = analysis.taps(model, params, nhwc)
    assert relative(our_logits, logits.detach()) <= 1e-5
    assert our_seen.keys() == seen.keys()
    for tap in twin.TAPS:
        assert relative(our_seen[tap], seen[tap].detach()) <= 1e-5, tap

    def loss_of(params):
        logits = model.apply({"params": params}, nhwc, train=True)
        return cross_entropy(logits, labels.numpy(), label_smoothing=0.1).mean()

    torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
    grads = to_state_dict(jax.grad(loss_of)(params), model)
    for key, parameter in twin.named_parameters():
        assert relative(grads[key], parameter.grad) <= 1e-4, key


@pytest.mark.parametrize("size", ["tiny_patch16", "base_patch32", "large_patch14"])
def test_as_many_parameters_as_the_jax_model(size):
    model = create_model(f"crate_alpha_{size}_224")
    with torch.device("meta"):
        twin = from_flax_model(model)
    assert sum(p.numel() for p in twin.parameters()) == count_parameters(model)


def test_starts_as_the_official_code_does():
    torch.manual_seed(0)
    twin = TorchCrateAlpha(CrateAlpha(16, 4, 64, width=96, depth=1, num_heads=4))
    state = {name: value.numpy() for name, value in twin.state_dict().items()}
    layer = "transformer.layers.0"
    for name, bound in {
        f"{layer}.1.fn.D": (6 / 96) ** 0.5,
        f"{layer}.1.fn.D1": (6 / 96) ** 0.5,
        "conv1.weight": (6 / 48) ** 0.5,
    }.items():
        assert 0.98 * bound < np.abs(state[name]).max() <= bound, name
    for name, deviation in {
        f"{layer}.0.fn.qkv.weight": 0.02,
        f"{layer}.0.fn.to_out.0.weight": 0.02,
        "mlp_head.1.weight": 0.02,
        "pos_embedding": 0.02,
        "cls_token": 1e-6,
    }.items():
        assert state[name].std() == pytest.approx(deviation, rel=0.25), name
    assert not state["conv1.bias"].any() and not state["mlp_head.1.bias"].any()


def test_a_whole_comparison():
    params = load_weights(GOLDEN / "crate_alpha.pth", SMALL)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)

    def loss(logits, labels):
        return cross_entropy(logits, labels, label_smoothing=comparing.SMOOTHING)

    found = comparing.compare(
        SMALL, params, images, np.array([1, 7, 3, 0]), loss=loss, train=no_training, rounds=1
    )
    assert found.first_difference is None and found.gradient_images == 4
    names = {row.name for row in found.rows}
    assert {"embedding tokens", "layer 1 odl", "logits"} <= names
    assert "gradient transformer.layers.1.1.fn.D1" in names


def no_training(*_):
    raise AssertionError("no step was asked for")


@pytest.mark.parametrize("changes", [dict(nonlinearity="ista"), dict(layer_scale=0.1)], ids=str)
def test_what_official_files_have_no_name_for(changes):
    with pytest.raises(ValueError, match=r"model must have nonlinearity odl and no layer_scale"):
        from_flax_model(SMALL.clone(**changes))


def test_an_unknown_tap():
    with pytest.raises(KeyError, match=r"taps must be among .*; got ista"):
        TorchCrateAlpha(SMALL).trace(torch.zeros(1, 3, 32, 32), ("ista",))
