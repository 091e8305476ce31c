"""CRATE-α: the PyTorch port, the released JAX files, and the visual tower of CLIPA.

The released ``.npz`` holds ``params/…``, and the optimizer's ``opt/…`` beside it. LayerScale has no
name here: no released file has it. Source: the released files of arXiv 2405.20299.
"""

from crate_jax.interop.layouts.forms import (
    Convolution,
    Copies,
    Leading,
    Linear,
    PatchKernel,
    Same,
)
from crate_jax.interop.layouts.layout import Layout

TORCH = Layout(
    name="torch",
    table={
        "embedding/cls_token": ("cls_token", Leading(2)),
        "embedding/pos_embedding": ("pos_embedding", Leading(1)),
        "embedding/projection/kernel": ("conv1.weight", Convolution()),
        "embedding/projection/bias": ("conv1.bias", Same()),
        "blocks/mssa_norm/scale": ("transformer.layers.{i}.0.norm.weight", Same()),
        "blocks/mssa_norm/bias": ("transformer.layers.{i}.0.norm.bias", Same()),
        "blocks/mssa/U": ("transformer.layers.{i}.0.fn.qkv.weight", Linear()),
        "blocks/mssa/W_out": ("transformer.layers.{i}.0.fn.to_out.0.weight", Linear(in_axes=2)),
        "blocks/odl_norm/scale": ("transformer.layers.{i}.1.norm.weight", Same()),
        "blocks/odl_norm/bias": ("transformer.layers.{i}.1.norm.bias", Same()),
        "blocks/odl/D": ("transformer.layers.{i}.1.fn.D", Same()),
        "blocks/odl/D1": ("transformer.layers.{i}.1.fn.D1", Same()),
        "head_norm/scale": ("mlp_head.0.weight", Same()),
        "head_norm/bias": ("mlp_head.0.bias", Same()),
        "head/kernel": ("mlp_head.1.weight", Linear()),
        "head/bias": ("mlp_head.1.bias", Same()),
    },
    head=r"mlp_head\.[1-9]\d*\..*",
)

_BLOCK = "Transformer/encoderblock_{i}"
_MSSA = f"{_BLOCK}/MultiHeadDotProductSubspaceAttention_0"

JAX = Layout(
    name="jax",
    in_torch=False,
    prefix="params/",
    table={
        "embedding/cls_token": ("cls", Leading(2)),
        "embedding/pos_embedding": ("pos_embedding", Leading(1)),
        "embedding/projection/kernel": ("embedding/kernel", PatchKernel()),
        "embedding/projection/bias": ("embedding/bias", Same()),
        "blocks/mssa_norm/scale": (f"{_BLOCK}/LayerNorm_0/scale", Same()),
        "blocks/mssa_norm/bias": (f"{_BLOCK}/LayerNorm_0/bias", Same()),
        "blocks/mssa/U": (f"{_MSSA}/proj/kernel", Same()),
        "blocks/mssa/W_out": (f"{_MSSA}/out/kernel", Same()),
        "blocks/odl_norm/scale": (f"{_BLOCK}/LayerNorm_1/scale", Same()),
        "blocks/odl_norm/bias": (f"{_BLOCK}/LayerNorm_1/bias", Same()),
        "blocks/odl/D": (f"{_BLOCK}/OvercompleteISTABlock_0/D", Same()),
        "blocks/odl/D1": (f"{_BLOCK}/OvercompleteISTABlock_0/D1", Same()),
        "head_norm/scale": ("encoder_norm/scale", Same()),
        "head_norm/bias": ("encoder_norm/bias", Same()),
        "head/kernel": ("head/kernel", Same()),
        "head/bias": ("head/bias", Same()),
    },
)

_RESBLOCK = "visual.transformer.resblocks.{i}"

# The tower's projection into the common space of images and texts is the head here, without a bias.
CLIPA = Layout(
    name="clipa",
    table={
        "embedding/cls_token": ("visual.class_embedding", Same()),
        "embedding/pos_embedding": ("visual.positional_embedding", Same()),
        "embedding/projection/kernel": ("visual.conv1.weight", Convolution()),
        "blocks/mssa_norm/scale": (f"{_RESBLOCK}.ln_1.weight", Same()),
        "blocks/mssa_norm/bias": (f"{_RESBLOCK}.ln_1.bias", Same()),
        # Queries, keys and values are one projection, stored three times.
        "blocks/mssa/U": (f"{_RESBLOCK}.attn.in_proj_weight", Copies(3, Linear())),
        "blocks/mssa/W_out": (f"{_RESBLOCK}.attn.out_proj.weight", Linear(in_axes=2)),
        "blocks/odl_norm/scale": (f"{_RESBLOCK}.ln_2.weight", Same()),
        "blocks/odl_norm/bias": (f"{_RESBLOCK}.ln_2.bias", Same()),
        "blocks/odl/D": (f"{_RESBLOCK}.mlp.c_fc", Same()),
        "blocks/odl/D1": (f"{_RESBLOCK}.mlp.c_proj", Same()),
        "head_norm/scale": ("visual.ln_post.weight", Same()),
        "head_norm/bias": ("visual.ln_post.bias", Same()),
        "head/kernel": ("visual.proj", Same()),
    },
    zeros=("embedding/projection/bias", "head/bias"),
    left_out=r"(transformer|token_embedding|ln_final)\..*"
    r"|positional_embedding|text_projection|logit_scale",
)

LAYOUTS = (TORCH, JAX, CLIPA)
