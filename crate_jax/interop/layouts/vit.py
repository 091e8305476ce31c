"""ViT: timm's names, and those of the ViT that CRATE's repository trains as its baseline.

DINO and DINOv2 have timm's names too, and more; files of SimDINO's training (arXiv 2502.10385) hold
a student and a teacher, each with its head. Names of DINOv2: arXiv 2304.07193 and its code.
"""

import numpy as np

from crate_jax.interop.layouts.forms import Convolution, Flat, Leading, Linear, Same
from crate_jax.interop.layouts.layout import Implied, Layout, Table, Tree


def _table(norm: str) -> Table:
    """The two differ in the name of the last norm alone."""
    return {
        "embedding/cls_token": ("cls_token", Leading(2)),
        "embedding/pos_embedding": ("pos_embed", Leading(1)),
        "embedding/projection/kernel": ("patch_embed.proj.weight", Convolution()),
        "embedding/projection/bias": ("patch_embed.proj.bias", Same()),
        "blocks/mhsa_norm/scale": ("blocks.{i}.norm1.weight", Same()),
        "blocks/mhsa_norm/bias": ("blocks.{i}.norm1.bias", Same()),
        # Rows of qkv: queries, keys, values; in each, head after head.
        "blocks/mhsa/W_qkv": ("blocks.{i}.attn.qkv.weight", Linear()),
        "blocks/mhsa/b_qkv": ("blocks.{i}.attn.qkv.bias", Flat()),
        "blocks/mhsa/W_out": ("blocks.{i}.attn.proj.weight", Linear(in_axes=2)),
        "blocks/mhsa/b_out": ("blocks.{i}.attn.proj.bias", Same()),
        "blocks/mlp_norm/scale": ("blocks.{i}.norm2.weight", Same()),
        "blocks/mlp_norm/bias": ("blocks.{i}.norm2.bias", Same()),
        "blocks/mlp/W_in": ("blocks.{i}.mlp.fc1.weight", Linear()),
        "blocks/mlp/b_in": ("blocks.{i}.mlp.fc1.bias", Same()),
        "blocks/mlp/W_out": ("blocks.{i}.mlp.fc2.weight", Linear()),
        "blocks/mlp/b_out": ("blocks.{i}.mlp.fc2.bias", Same()),
        "blocks/mhsa_scale": ("blocks.{i}.ls1.gamma", Same()),  # where there is LayerScale
        "blocks/mlp_scale": ("blocks.{i}.ls2.gamma", Same()),
        "head_norm/scale": (f"{norm}.weight", Same()),
        "head_norm/bias": (f"{norm}.bias", Same()),
        "head/kernel": ("head.weight", Linear()),
        "head/bias": ("head.bias", Same()),
    }


def _projection(head: str) -> Table:
    """The entries of a head of three linear maps, a GELU after each of the first two."""
    return {
        f"head/linear{i}/{ours}": (f"{head}.mlp.{2 * i}.{theirs}", form)
        for i in range(3)
        for ours, theirs, form in (("kernel", "weight", Linear()), ("bias", "bias", Same()))
    }


def _mask_token(tree: Tree) -> np.ndarray:
    """The mask token of a backbone alone: zeros, its first value."""
    return np.zeros((1, tree.shapes["embedding/cls_token"][0]), np.float32)


_CLASS_TOKEN = {"pool": Implied("norm", ("cls",))}
_NO_REGISTERS = {"registers": Implied("no register_tokens", (0,))}

TIMM = Layout(name="timm", table=_table("norm"), implies=_CLASS_TOKEN | _NO_REGISTERS)
# Means over the patches: the norm stands behind the pooling, under this name. timm's models with
# global_pool="avg" have the same names and norm once.
CRATE_BASELINE = Layout(
    name="crate_baseline",
    table=_table("fc_norm"),
    implies={"pool": Implied("fc_norm", ("patches", "patches_twice"))} | _NO_REGISTERS,
)
# A backbone of DINOv2 alone, as torch.hub has them.
DINOV2 = Layout(
    name="dinov2",
    table={
        **_table("norm"),
        "register_tokens": ("register_tokens", Leading(1)),
        "head/mask_token": ("mask_token", Leading(1)),
    },
    left_out="mask_token",  # of a backbone: training alone reads it
    fillers={"mask_token": _mask_token},
    implies=_CLASS_TOKEN,
)
SIMDINO = Layout(
    name="simdino",
    table={**_table("norm"), **_projection("head")},
    prefix="backbone.",
    bare=r"head\.mlp\..*",
    under="teacher",
    implies=_CLASS_TOKEN | _NO_REGISTERS,
)
# As DINOv2 trains a ViT-L: in four chunks. Files of another number are read as well.
SIMDINOV2 = Layout(
    name="simdinov2",
    table={**DINOV2.table, **_projection("dino_head")},
    prefix="backbone.",
    bare=r"dino_head\.mlp\..*",
    under="teacher",
    chunks=4,
    left_out=DINOV2.left_out,
    fillers=DINOV2.fillers,
    implies=_CLASS_TOKEN,
)

LAYOUTS = (TIMM, CRATE_BASELINE, DINOV2, SIMDINO, SIMDINOV2)
