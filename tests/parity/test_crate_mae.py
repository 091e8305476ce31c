"""The twin of CRATE-MAE: equal to the official code on its golden files, and ours equal to it."""

import functools
import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from objectives import small

from crate_jax import CrateMae, create_model
from crate_jax.cli.main import main
from crate_jax.cli.steps import autoencoder_steps, classifier_steps, hidden_loss
from crate_jax.interop import to_state_dict
from crate_jax.models.cost import abstract_variables
from crate_jax.tasks.losses import cross_entropy
from crate_jax.training.loop import train

torch = pytest.importorskip("torch")
from crate_jax.parity.compare import compare  # noqa: E402 (needs PyTorch)
from crate_jax.parity.crate_mae import Hiding, error, hiding  # noqa: E402
from crate_jax.parity.torch_reference import TorchCrateMae, from_flax_model  # noqa: E402
from crate_jax.parity.twin import through  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
ODD = dict(image_size=(12, 20), patch_size=4, in_channels=2, width=12, depth=2, num_heads=3)
MODELS = {
    "autoencoder": CrateMae(**ODD, num_classes=0, decoder_depth=3, head_dim=5),
    "encoder": CrateMae(**ODD, num_classes=7, eta=0.3),
    "encoder_of_one_subspace": CrateMae(
        **ODD | {"num_heads": 1, "depth": 1}, num_classes=7, pool="mean"
    ),
}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", ["mae", "mae_normpix"])
def test_it_reproduces_the_official_implementation(name):
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    model = CrateMae(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        num_classes=0,
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        decoder_depth=config["decoder_depth"],
        eta=config["step_size"],
        lmbda=config["lambd"],
    )
    twin = TorchCrateMae(model).eval()
    computed = twin.decoder_pos_embed.clone()
    state = torch.load(GOLDEN / f"{name}.pth", weights_only=True)["model"]
    twin.load_state_dict(state, strict=True)
    assert relative(computed, twin.decoder_pos_embed) <= 1e-6
    images, hidden = torch.tensor(expected["images_nchw"]), torch.tensor(expected["mask"] > 0)
    tokens = twin.embed(images, hidden)
    assert relative(tokens.detach(), expected["tokens0"]) <= 1e-6
    latent, seen = through(twin.blocks, tokens, ("ista",))
    for layer, out in enumerate(seen["ista"]):
        assert relative(out.detach(), expected[f"encoder{layer:02d}/out"]) <= 2e-6
    told, outs = twin.decode(twin.norm(latent))
    for layer, out in enumerate(outs):
        assert relative(out.detach(), expected[f"decoder{layer:02d}/out"]) <= 2e-6
    assert relative(told.detach(), expected["pred"]) <= 2e-6
    loss = error(told, twin.cut(images), hidden, normalize=config["norm_pix_loss"])
    assert relative(loss.detach(), expected["loss"]) <= 1e-6
    loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert {f"grad/{name}" for name in gradients} == {n for n in expected if n.startswith("grad/")}
    for name, gradient in gradients.items():
        assert relative(gradient, expected[f"grad/{name}"]) <= 1e-5, name


@pytest.mark.parametrize("name", MODELS)
def test_ours_equals_it(name):
    """Layers, pixels or logits, gradients, and steps of each optimizer."""
    model, rng = MODELS[name], np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract_variables(model)
    )["params"]
    images = rng.normal(size=(4, 12, 20, 2)).astype(np.float32)
    if model.decoder_depth:
        model: Hiding = hiding(model)
        labels, loss, steps = images, functools.partial(hidden_loss, model), autoencoder_steps
    else:
        labels = rng.integers(0, 7, 4)
        loss, steps = functools.partial(cross_entropy, label_smoothing=0.1), classifier_steps
    train = functools.partial(steps, model)
    found = compare(model, params, images, labels, loss=loss, train=train, train_steps=2, rounds=1)
    assert found.first_difference is None
    rows = {row.name: row for row in found.rows}
    read = {"pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias"}
    names = to_state_dict(params, model).keys() - read
    assert {f"gradient {name}" for name in names} == {n for n in rows if n.startswith("gradient")}
    assert "statistics" not in found.training["adamw"]


def test_it_starts_as_the_official_code_does():
    model = CrateMae(32, 8, 0, width=64, depth=1, num_heads=4, decoder_depth=1)
    state = from_flax_model(model).state_dict()
    xavier, kaiming = np.sqrt(6 / 128), np.sqrt(6 / 64)
    for name, bound in (
        ("blocks.0.layers.0.0.fn.qkv.weight", xavier),
        ("decoder_blocks.0.layers.0.1.fn.to_out.0.weight", xavier),
        ("blocks.0.layers.0.1.fn.weight", kaiming),
        ("decoder_blocks.0.layers.0.0.fn.weight", kaiming),
        ("patch_embed.proj.weight", np.sqrt(6 / (192 + 64))),
        ("decoder_pred.weight", np.sqrt(6 / (192 + 64))),
    ):
        assert 0.97 * bound < state[name].abs().max() <= bound, name
    assert (state["decoder_pred.bias"] == 0).all()
    assert 0.01 < state["mask_token"].std() < 0.03


def test_it_has_as_many_parameters_as_the_official_code():
    with torch.device("meta"):
        twin = from_flax_model(create_model("crate_mae_tiny_patch16_224"))
    assert sum(p.numel() for p in twin.parameters()) == 11_555_328


@pytest.mark.slow
def test_compare_takes_a_run_of_it(tmp_path, capsys):
    """On the images of the run, whose labels nobody reads, and on images in a folder."""
    rng = np.random.default_rng(0)
    for i in range(3):
        assert cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (9, 9), np.uint8))
    train(small("masked_autoencoding", total_steps=1), tmp_path / "run")
    flags = [f"--weights={tmp_path / 'run'}", "--train-steps=0", "--batch_size=3"]
    for images, inputs in (([], "digits/test"), ([f"--images={tmp_path}"], str(tmp_path))):
        capsys.readouterr()
        assert main(["compare", *flags, *images]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["within_tolerance"] and found["images"] == 3 and found["inputs"] == inputs
