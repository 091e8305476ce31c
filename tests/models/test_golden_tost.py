"""ToST against what its official code computed, in evaluation and in training mode.

The case is told in tests/golden/README.md.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import ToST, analysis, load_variables, load_weights, save_weights
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.models.class_attention import ClassBlock
from crate_jax.models.embedding import prepend
from crate_jax.models.stem import Stem
from crate_jax.models.tost import fourier_positions

torch = pytest.importorskip("torch")  # the weights are a PyTorch file

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = json.loads((GOLDEN / "tost.json").read_text())
MODEL = ToST(
    image_size=CONFIG["image_size"],
    patch_size=CONFIG["patch_size"],
    num_classes=CONFIG["num_classes"],
    width=CONFIG["embed_dim"],
    depth=CONFIG["depth"],
    num_heads=CONFIG["num_heads"],
    mlp_ratio=int(CONFIG["mlp_ratio"]),
    layer_scale=CONFIG["eta"],
    class_layers=CONFIG["cls_attn_layers"],
    tokens_norm=CONFIG["tokens_norm"],
)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "tost.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(jnp.asarray, load_variables(GOLDEN / "tost.pth", MODEL))


@pytest.fixture(scope="module")
def images(expected):
    return jnp.asarray(expected["images_nchw"].transpose(0, 2, 3, 1))


def test_positions_and_embedding(variables, images, expected):
    waves, weights = fourier_positions(MODEL.grid), variables["params"]["embedding"]["positions"]
    positions = waves @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    theirs = expected["positions_nchw"].transpose(0, 2, 3, 1).reshape(len(images), -1, MODEL.width)
    for of_image in theirs:
        assert relative(positions, of_image) <= 1e-5
    stem = Stem((8, 8), MODEL.width, train=False)
    own = {name: tree["embedding"]["stem"] for name, tree in variables.items()}
    tokens = stem.apply(own, images)
    assert relative(np.asarray(tokens) + positions, expected["tokens0"]) <= 1e-5


def test_every_layer(variables, images, expected):
    logits, seen = jax.jit(lambda v, x: analysis.taps(MODEL, v, x))(variables, images)
    names = {"membership": "membership", "tssa": "tssa_out", "mlp": "mlp_out", "out": "out"}
    assert set(names) < set(seen)
    for ours, theirs in names.items():
        for layer in range(MODEL.depth):
            error = relative(seen[ours][layer], expected[f"layer{layer:02d}/{theirs}"])
            assert error <= 1e-5, f"{ours}, layer {layer}: {error:.1e}"
    np.testing.assert_allclose(seen["membership"].sum(axis=2), 1, rtol=1e-5)
    assert relative(logits, expected["logits"]) <= 1e-4


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_every_block_of_class_attention(variables, expected, tokens_norm):
    params, prefix = variables["params"], "" if tokens_norm else "tokens_norm_false/"
    Z = prepend(params["cls_token"], jnp.asarray(expected["layer01/out"]))
    block = ClassBlock(4, 8, 64, 1.0, tokens_norm, jnp.float32, "derived", MODEL.EPSILON)
    for i in range(MODEL.class_layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["class_blocks"])
        Z, _ = block.apply({"params": own}, Z, None, None)
        assert relative(Z, expected[f"{prefix}class{i:02d}/out"]) <= 1e-5


def test_logits_without_the_norm_of_all_tokens(variables, images, expected):
    model = MODEL.clone(tokens_norm=False)
    logits = model.apply(variables, images, train=False)
    assert relative(logits, expected["tokens_norm_false/logits"]) <= 1e-4


@pytest.mark.parametrize("mode", ["", "train/"], ids=["evaluation", "training"])
def test_loss_and_every_gradient(variables, images, expected, mode):
    """In training mode by the statistics of the batch, which move the running ones."""

    def loss_of(params):
        logits, updated = MODEL.apply(
            variables | {"params": params}, images, train=bool(mode), mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(expected["labels"])
        )
        return loss.mean(), (logits, updated)

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, (logits, updated)), grads = step(variables["params"])
    assert relative(logits, expected[f"{mode}logits"]) <= 1e-4
    assert relative(loss, expected[f"{mode}loss"]) <= 1e-4
    start = f"{mode}grad/"
    theirs = {k.removeprefix(start): v for k, v in expected.items() if k.startswith(start)}
    ours = to_state_dict(grads, MODEL)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-4, name
    after = to_state_dict(variables | updated, MODEL)
    start = "train/buffers_after/" if mode else ""
    before = to_state_dict(variables, MODEL)
    buffers = [name for name in before if "running" in name]
    assert len(buffers) == 6
    for name in buffers:
        wanted = expected[start + name] if mode else before[name]
        assert relative(after[name], wanted) <= 1e-5, name


def test_saved_back_it_is_the_file_but_for_counters(variables, tmp_path):
    save_weights(tmp_path / "saved.pth", variables, MODEL)
    saved = torch.load(tmp_path / "saved.pth", weights_only=True)
    official = torch.load(GOLDEN / "tost.pth", weights_only=True)["model"]
    counters = {name for name in official if name.endswith("num_batches_tracked")}
    assert len(counters) == 3 and saved.keys() == official.keys() - counters
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, official[name], err_msg=name)
    # PyTorch's own module takes the statistics without a counter.
    norm = torch.nn.BatchNorm2d(8)
    stage = "patch_embed.proj.0.1."
    own = {k.removeprefix(stage): v for k, v in saved.items() if k.startswith(stage)}
    norm.load_state_dict(own, strict=True)
    again = from_state_dict({name: t.numpy() for name, t in saved.items()}, MODEL)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_our_own_files_hold_it_too(variables, suffix, tmp_path):
    save_weights(tmp_path / f"saved{suffix}", variables, MODEL)
    back = load_variables(tmp_path / f"saved{suffix}", MODEL)
    assert set(back) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_parameters_alone_are_not_enough(variables, images, tmp_path):
    with pytest.raises(ValueError, match=r"this ToST has batch_stats too\. Call load_variables\."):
        load_weights(GOLDEN / "tost.pth", MODEL)
    with pytest.raises(ValueError, match=r"got params alone, without batch_stats\. Give the var"):
        save_weights(tmp_path / "w.npz", variables["params"], MODEL)
    with pytest.raises(ValueError, match="variables must hold the running statistics, batch_stats"):
        MODEL.apply({"params": variables["params"]}, images, train=False)
