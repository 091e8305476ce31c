"""The guests' tables against the files that the official programs wrote."""

from pathlib import Path

import numpy as np
import pytest

from crate_jax.interop.contents import read_contents
from crate_jax.interop.layouts.crate_alpha import JAX, TORCH
from crate_jax.interop.layouts.layout import Tree
from crate_jax.interop.layouts.vit import CRATE_BASELINE, TIMM

GOLDEN = Path(__file__).parents[2] / "golden"


def stacked_norm(layers, width):
    return {"scale": (layers, width), "bias": (layers, width)}


def tree(width, blocks):
    """Patches of 8 x 8 in images of 32, ten classes, two layers."""
    parts = {
        "embedding": {"cls_token": (width,), "pos_embedding": (17, width)},
        "embedding/projection": {"kernel": (192, width), "bias": (width,)},
        "head_norm": {"scale": (width,), "bias": (width,)},
        "head": {"kernel": (width, 10), "bias": (10,)},
    } | {f"blocks/{name}": leaves for name, leaves in blocks.items()}
    shapes = {f"{part}/{leaf}": s for part, leaves in parts.items() for leaf, s in leaves.items()}
    return Tree(shapes, (8, 8, 3))


ALPHA = tree(
    32,
    {
        "mssa_norm": stacked_norm(2, 32),
        "mssa": {"U": (2, 32, 4, 8), "W_out": (2, 4, 8, 32)},
        "odl_norm": stacked_norm(2, 32),
        "odl": {"D": (2, 32, 128), "D1": (2, 32, 128)},
    },
)
VIT = tree(
    36,
    {
        "mhsa_norm": stacked_norm(2, 36),
        "mhsa": {
            "W_qkv": (2, 36, 3, 3, 12),
            "b_qkv": (2, 3, 3, 12),
            "W_out": (2, 3, 12, 36),
            "b_out": (2, 36),
        },
        "mlp_norm": stacked_norm(2, 36),
        "mlp": {"W_in": (2, 36, 72), "b_in": (2, 72), "W_out": (2, 72, 36), "b_out": (2, 36)},
    },
)
FILES = [
    ("crate_alpha.pth", TORCH, ALPHA),
    ("crate_alpha_jax.npz", JAX, ALPHA),
    ("vit_timm.pth", TIMM, VIT),
    ("vit_crate_baseline.pth", CRATE_BASELINE, VIT),
]


def read(name):
    if name.endswith(".pth"):
        pytest.importorskip("torch")
    return read_contents(GOLDEN / name).arrays


@pytest.mark.parametrize(("name", "layout", "tree"), FILES, ids=[name for name, *_ in FILES])
def test_every_entry_has_its_place_and_comes_back(name, layout, tree):
    arrays = read(name)
    entries = layout.entries(tree)
    assert {k: v.shape for k, v in arrays.items()} == {k: e.official for k, e in entries.items()}
    back = layout.to_official(layout.to_ours(arrays, tree), tree)
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_the_two_layouts_of_crate_alpha_hold_the_same_weights():
    ours = TORCH.to_ours(read("crate_alpha.pth"), ALPHA)
    theirs = JAX.to_ours(read("crate_alpha_jax.npz"), ALPHA)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def test_a_copy_without_an_extension_is_recognised(tmp_path):
    pytest.importorskip("torch")
    copy = tmp_path / "crate_alpha_B16_IN21K"
    copy.write_bytes((GOLDEN / "crate_alpha.pth").read_bytes())
    assert read_contents(copy).arrays.keys() == read("crate_alpha.pth").keys() != set()
