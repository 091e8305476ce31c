"""The ViT against what timm's and the baseline of CRATE's repository computed.

The cases are told in tests/golden/README.md.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import ViT, analysis, load_weights, save_weights
from crate_jax.interop import to_state_dict
from crate_jax.models.layers import LayerNorm

torch = pytest.importorskip("torch")  # the weights are PyTorch files

GOLDEN = Path(__file__).parent.parent / "golden"
# The layout of each file, and what the head reads.
CASES = {"vit_timm": ("timm", "cls"), "vit_crate_baseline": ("crate_baseline", "patches_twice")}


class Case(NamedTuple):
    name: str
    layout: str
    model: ViT
    params: dict
    images: jax.Array
    expected: dict[str, np.ndarray]

    def stacked(self, name: str) -> np.ndarray:
        return np.stack([self.expected[f"layer{i:02d}/{name}"] for i in range(self.model.depth)])


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    name = request.param
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    layout, pool = CASES[name]
    model = ViT(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        pool=pool,
    )
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    params = jax.tree.map(jnp.asarray, load_weights(GOLDEN / f"{name}.pth", model))
    images = jnp.asarray(expected["images_nchw"].transpose(0, 2, 3, 1))
    return Case(name, layout, model, params, images, expected)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_embedding_and_features(case):
    """`features` is what enters the head: of timm's, before the class token is taken."""
    _, seen = case.model.apply(
        {"params": case.params},
        case.images,
        train=False,
        capture_intermediates=lambda module, _: module.name in ("embedding", "head_norm"),
    )
    outputs = {name: of["__call__"] for name, of in seen["intermediates"].items()}
    assert relative(outputs["embedding"][0], case.expected["tokens0"]) <= 1e-5
    features = case.expected["features"]
    features = features[:, 0] if case.model.pool == "cls" else features
    assert len(outputs["head_norm"]) == 1 + (case.model.pool == "patches_twice")
    assert relative(outputs["head_norm"][0], features) <= 1e-5


def test_features_under_the_names_that_timm_has(case):
    """timm normalises all tokens in forward_features; here the head does, after pooling."""
    variables = {"params": case.params}
    tokens = case.model.apply(variables, case.images, train=False, method="forward_features")
    last = case.expected[f"layer{case.model.depth - 1:02d}/out"]
    assert relative(tokens, last) <= 1e-5
    head = functools.partial(case.model.apply, variables, tokens, method="forward_head")
    assert relative(head(), case.expected["logits"]) <= 1e-5
    if case.model.pool == "cls":
        assert relative(head(pre_logits=True), case.expected["features"][:, 0]) <= 1e-5
    else:  # what timm's forward_head would norm once more, is normed twice here
        norm = LayerNorm(jnp.float32, epsilon=case.model.EPSILON)
        features = jnp.asarray(case.expected["features"])
        twice = norm.apply({"params": case.params["head_norm"]}, features)
        assert relative(head(pre_logits=True), twice) <= 1e-5


def test_every_layer(case):
    logits, seen = jax.jit(lambda p, x: analysis.taps(case.model, p, x))(case.params, case.images)
    names = {"attention": "attention", "mhsa": "attn_out", "mlp": "mlp_out", "out": "out"}
    for ours, theirs in names.items():
        for layer, (a, b) in enumerate(zip(seen[ours], case.stacked(theirs), strict=True)):
            error = relative(a, b)
            assert error <= 1e-5, f"{ours}, layer {layer}: {error:.1e}"
    assert relative(logits, case.expected["logits"]) <= 1e-5


def test_loss_and_every_gradient(case):
    def loss_of(params):
        logits = case.model.apply({"params": params}, case.images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(case.expected["labels"])
        ).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(case.params)
    assert relative(loss, case.expected["loss"]) <= 1e-5
    theirs = {k.removeprefix("grad/"): v for k, v in case.expected.items() if k.startswith("grad/")}
    ours = to_state_dict(grads, case.model, layout=case.layout)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-4, name


def test_saved_back_it_is_the_file(case, tmp_path):
    save_weights(tmp_path / "saved.pth", case.params, case.model, layout=case.layout)
    saved, official = (
        torch.load(path, weights_only=True)
        for path in (tmp_path / "saved.pth", GOLDEN / f"{case.name}.pth")
    )
    assert saved.keys() == official.keys()
    for name, tensor in official.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_our_own_files_hold_it_too(case, suffix, tmp_path):
    save_weights(tmp_path / f"saved{suffix}", case.params, case.model)
    back = load_weights(tmp_path / f"saved{suffix}", case.model)
    saved = jax.tree.map(np.asarray, case.params)
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, saved)))
