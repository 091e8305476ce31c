"""CBSA, TSSA and MSSA in one frame against what the official code of CBSA computed.

The cases are told in tests/golden/README.md. One field of the model says which of them it is.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crate_jax import Crate, analysis, load_variables, save_weights
from crate_jax.interop import to_state_dict
from crate_jax.interop.convert import find_layout

torch = pytest.importorskip("torch")  # the weights are PyTorch files

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = json.loads((GOLDEN / "cbsa.json").read_text())
MODEL = Crate(
    image_size=CONFIG["image_size"],
    patch_size=CONFIG["patch_size"],
    num_classes=CONFIG["num_classes"],
    width=CONFIG["dim"],
    depth=CONFIG["depth"],
    num_heads=CONFIG["heads"],
    attention="cbsa",
    stem="convolutions",
    representatives=tuple(CONFIG["representatives"]),
)
# The case of each attention, and what the official code shows of it besides.
CASES = {
    "cbsa": ("cbsa", "contraction"),
    "tssa": ("cbsa_tssa", "membership"),
    "mssa": ("cbsa_mssa", None),
}


class Case(NamedTuple):
    name: str
    model: Crate
    variables: dict
    images: jax.Array
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    name, _ = CASES[request.param]
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = dict(file)
    model = MODEL.clone(attention=request.param)
    variables = jax.tree.map(jnp.asarray, load_variables(GOLDEN / f"{name}.pth.tar", model))
    images = jnp.asarray(expected["images_nchw"].transpose(0, 2, 3, 1))
    return Case(name, model, variables, images, expected)


def relative(a, b) -> float:
    """Largest difference, as a share of the largest expected value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_every_layer(case):
    attention = case.model.attention
    logits, seen = jax.jit(lambda v, x: analysis.taps(case.model, v, x))(
        case.variables, case.images
    )
    names = {"subspace_tokens": "subspace_tokens", attention: "attn_out", "ista": "ista_out"}
    if shown := CASES[attention][1]:
        names[shown] = shown
    for ours, theirs in names.items():
        for layer in range(case.model.depth):
            expected = case.expected[f"layer{layer:02d}/{theirs}"]
            error = relative(seen[ours][layer].reshape(expected.shape), expected)
            assert error <= 1e-5, f"{ours}, layer {layer}: {error:.1e}"
    assert relative(logits, case.expected["logits"]) <= 1e-4


def test_loss_and_every_gradient(case):
    def loss_of(params):
        logits = case.model.apply(case.variables | {"params": params}, case.images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(case.expected["labels"])
        ).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(case.variables["params"])
    assert relative(loss, case.expected["loss"]) <= 1e-4
    theirs = {k.removeprefix("grad/"): v for k, v in case.expected.items() if k[:5] == "grad/"}
    ours = to_state_dict(grads, case.model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-4, name


def test_saved_back_it_is_the_file_but_for_counters(case, tmp_path):
    save_weights(tmp_path / "saved.pth.tar", case.variables, case.model)
    saved, official = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "saved.pth.tar", GOLDEN / f"{case.name}.pth.tar")
    )
    assert {k for k in official if not k.endswith("num_batches_tracked")} == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, official[name], err_msg=name)


def test_one_field_swaps_the_attention(case):
    """The others have a layout each, and the same tree but for what is the attention's own."""
    assert find_layout(case.model).name == f"frame_{case.model.attention}"
    own = {"cbsa": {"step_r", "step_x"}, "tssa": {"tau"}, "mssa": set()}[case.model.attention]
    blocks = case.variables["params"]["blocks"]
    assert set(blocks[case.model.attention]) == {"U", "W_out", "b_out"} | own
    around = {f"{case.model.attention}_norm", "ista_norm", "ista", case.model.attention}
    assert set(blocks) == around


def test_weights_of_another_attention_are_refused():
    wrong = MODEL.clone(attention="tssa")
    with pytest.raises(
        ValueError, match=r"model\.attention must be cbsa for weights with fn\.proj"
    ):
        load_variables(GOLDEN / "cbsa.pth.tar", wrong)
    patches = MODEL.clone(stem="patches")
    with pytest.raises(ValueError, match=r"model\.stem must be convolutions for weights with"):
        load_variables(GOLDEN / "cbsa.pth.tar", patches)
