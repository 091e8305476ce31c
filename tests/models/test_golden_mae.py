"""CRATE-MAE against what its official code computed: masked, whole, and at another image size.

The cases are told in tests/golden/README.md.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import CrateMae, analysis, load_weights, save_weights
from crate_jax.interop import load_fitted, to_state_dict
from crate_jax.tasks.masked_autoencoding import MaskedAutoencoding
from crate_jax.tasks.masking import hidden_patches

torch = pytest.importorskip("torch")  # the weights are PyTorch files

GOLDEN = Path(__file__).parent.parent / "golden"


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


class Case:
    """The model, its weights, and what the official code computed."""

    def __init__(self, name):
        self.config = config = json.loads((GOLDEN / f"{name}.json").read_text())
        self.path = GOLDEN / f"{name}.pth"
        self.model = CrateMae(
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
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.expected = dict(file)
        self.params = jax.tree.map(jnp.asarray, load_weights(self.path, self.model))
        self.images = nhwc(self.expected["images_nchw"])
        ratio = config["mask_ratio"]
        self.task = MaskedAutoencoding(self.model, ratio=ratio, normalize=config["norm_pix_loss"])


@pytest.fixture(scope="module", params=["mae", "mae_normpix"])
def case(request):
    return Case(request.param)


def layers(case, name, depth):
    return [case.expected[f"{name}{i:02d}/out"] for i in range(depth)]


def test_the_masked_pass(case):
    noise, expected = jnp.asarray(case.expected["mask_noise"]), case.expected
    masked = hidden_patches(noise, 4)
    np.testing.assert_array_equal(masked, expected["mask"] > 0)
    reconstruct = jax.jit(
        lambda params, images: case.model.apply(
            {"params": params},
            images,
            masked,
            train=False,
            method="reconstruct",
            capture_intermediates=True,
        )
    )
    pixels, state = reconstruct(case.params, case.images)
    seen = state["intermediates"]
    assert relative(seen["embedding"]["__call__"][0], expected["tokens0"]) <= 1e-5
    of_encoder = seen["blocks"]["__call__"][0][0]
    encoder = layers(case, "encoder", case.model.depth)
    assert relative(of_encoder[-1], encoder[-1]) <= 1e-5
    assert relative(seen["head_norm"]["__call__"][0], expected["latent"]) <= 1e-5
    of_decoder = seen["decoder"]["blocks"]["__call__"][0][0]
    for ours, theirs in zip(
        of_decoder, layers(case, "decoder", case.model.decoder_depth), strict=True
    ):
        assert relative(ours, theirs) <= 1e-5
    normed = expected["decoder_normed"]
    normed = normed[:, 1:] if normed.shape[1] == 17 else normed
    assert relative(seen["decoder"]["norm"]["__call__"][0][:, 1:], normed) <= 1e-5
    assert relative(pixels, expected["pred"]) <= 1e-4


def test_nothing_masked(case):
    _, seen = jax.jit(lambda p, x: analysis.taps(case.model, p, x))(case.params, case.images)
    outs = layers(case, "unmasked/encoder", case.model.depth)
    for ours, theirs in zip(seen["out"], outs, strict=True):
        assert relative(ours, theirs) <= 1e-5
    assert relative(seen["attention"][-1], case.expected["attention_enc_last"]) <= 1e-5
    keys = seen["subspace_tokens"][-1]
    assert relative(keys.reshape(*keys.shape[:2], -1), case.expected["key_enc_last"]) <= 1e-5


def test_loss_and_every_gradient(case):
    masked = jnp.asarray(case.expected["mask"] > 0)
    batch = {"image": case.images, "masked": masked}

    def loss_of(params):
        return case.task.loss(params, (), batch, jax.random.key(0))[0]

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(case.params)
    assert relative(loss, case.expected["loss"]) <= 1e-5
    ours = to_state_dict(grads, case.model)
    start = "grad/"
    theirs = {k.removeprefix(start): v for k, v in case.expected.items() if k.startswith(start)}
    unread = {"pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias"}
    assert ours.keys() - theirs.keys() == unread
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-4, name


def test_another_image_size_with_the_official_positions(case):
    """There the table is resized; here it is computed, unless a field says otherwise."""
    large = dict(image_size=tuple(case.config["large_image_size"]), decoder_depth=0)
    model = case.model.clone(**large, position_size=case.config["img_size"])
    encoder = jax.tree.map(jnp.asarray, load_weights(case.path, model))
    assert relative(model.positions(0, model.width), case.expected["large/pos_embed"][0]) <= 1e-5
    images = nhwc(case.expected["large/images_nchw"])
    _, seen = jax.jit(lambda p, x: analysis.taps(model, p, x))(encoder, images)
    expected = case.expected["large/attention_enc_last"]
    assert relative(seen["attention"][-1], expected) <= 1e-5
    keys = seen["subspace_tokens"][-1]
    expected = case.expected["large/key_enc_last"]
    assert relative(keys.reshape(*keys.shape[:2], -1), expected) <= 1e-5


def test_another_image_size_must_be_said(case, tmp_path):
    """By the size that positions are resized from, or by asking for positions of the new one."""
    large = dict(image_size=tuple(case.config["large_image_size"]), decoder_depth=0)
    model = case.model.clone(**large)
    with pytest.raises(ValueError, match=r"image size; decoder_pos_embed tells of another\. Set"):
        load_weights(case.path, model)
    loaded = load_fitted(case.path, model, fit=("image_size",))
    assert "decoder_pos_embed: left aside, the model computes its own" in loaded.report
    with pytest.raises(ValueError, match=r"^method must be right .*\. Set model\.position_size\.$"):
        load_weights(case.path, model, fit=("image_size",), method="official_maps")
    save_weights(tmp_path / "own.safetensors", case.params, case.model)
    resized = model.clone(position_size=case.config["img_size"])
    own = load_fitted(tmp_path / "own.safetensors", resized, fit=("image_size",))
    jax.tree.map(np.testing.assert_array_equal, own.params, loaded.params)
    save_weights(tmp_path / "large.pth", own.params, resized)  # with the table that is resized
    saved = torch.load(tmp_path / "large.pth", weights_only=True)["decoder_pos_embed"]
    official = torch.load(case.path, weights_only=True)["model"]["decoder_pos_embed"]
    np.testing.assert_allclose(saved, official, rtol=0, atol=1e-6)


def test_saved_back_the_official_model_takes_it(case, tmp_path):
    """All that is read is as it was; what is never read is there, in its shape."""
    save_weights(tmp_path / "saved.pth", case.params, case.model)
    saved = torch.load(tmp_path / "saved.pth", weights_only=True)
    official = torch.load(case.path, weights_only=True)["model"]
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in official.items()}
    for name, tensor in saved.items():
        if not name.startswith("decoder_embed"):
            np.testing.assert_allclose(tensor, official[name], rtol=0, atol=1e-7, err_msg=name)
    again = load_weights(tmp_path / "saved.pth", case.model)
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


@pytest.mark.parametrize("unread", ["pos_embed", "decoder_embed", "decoder_pos_embed"])
def test_a_file_may_lack_what_is_never_read(case, unread, tmp_path):
    official = torch.load(case.path, weights_only=True)["model"]
    left = {name: tensor for name, tensor in official.items() if not name.startswith(unread)}
    assert len(left) < len(official)
    torch.save({"model": left, "epoch": 799}, tmp_path / "less.pth")
    again = load_weights(tmp_path / "less.pth", case.model)
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_other_positions_than_the_fixed_ones_are_refused(case, tmp_path):
    official = torch.load(case.path, weights_only=True)["model"]
    official["decoder_pos_embed"] = official["decoder_pos_embed"] + 1
    torch.save(official, tmp_path / "moved.pth")
    with pytest.raises(ValueError, match="decoder_pos_embed must be as the model computes it"):
        load_weights(tmp_path / "moved.pth", case.model)
