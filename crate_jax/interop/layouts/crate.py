"""CRATE: the names of the official implementation (arXiv 2306.01129)."""

from crate_jax.interop.layouts.forms import Leading, Linear, Same
from crate_jax.interop.layouts.layout import Implied, Layout

OFFICIAL = Layout(
    name="official",
    table={
        "embedding/cls_token": ("cls_token", Leading(2)),
        "embedding/pos_embedding": ("pos_embedding", Leading(1)),
        "embedding/patch_norm/scale": ("to_patch_embedding.1.weight", Same()),
        "embedding/patch_norm/bias": ("to_patch_embedding.1.bias", Same()),
        "embedding/projection/kernel": ("to_patch_embedding.2.weight", Linear()),
        "embedding/projection/bias": ("to_patch_embedding.2.bias", Same()),
        "embedding/token_norm/scale": ("to_patch_embedding.3.weight", Same()),
        "embedding/token_norm/bias": ("to_patch_embedding.3.bias", Same()),
        "blocks/mssa_norm/scale": ("transformer.layers.{i}.0.norm.weight", Same()),
        "blocks/mssa_norm/bias": ("transformer.layers.{i}.0.norm.bias", Same()),
        "blocks/mssa/U": ("transformer.layers.{i}.0.fn.qkv.weight", Linear()),
        "blocks/mssa/W_out": ("transformer.layers.{i}.0.fn.to_out.0.weight", Linear(in_axes=2)),
        "blocks/mssa/b_out": ("transformer.layers.{i}.0.fn.to_out.0.bias", Same()),
        "blocks/ista_norm/scale": ("transformer.layers.{i}.1.norm.weight", Same()),
        "blocks/ista_norm/bias": ("transformer.layers.{i}.1.norm.bias", Same()),
        "blocks/ista/D": ("transformer.layers.{i}.1.fn.weight", Same()),
        "head_norm/scale": ("mlp_head.0.weight", Same()),
        "head_norm/bias": ("mlp_head.0.bias", Same()),
        "head/kernel": ("mlp_head.1.weight", Linear()),
        "head/bias": ("mlp_head.1.bias", Same()),
    },
    head=r"mlp_head\.[1-9]\d*\..*",  # behind mlp_head.0, the norm
    implies={
        field: Implied("the official names", (value,))
        for field, value in dict(attention_sign="plus", threshold="relu", ista_steps=1).items()
    },
)

LAYOUTS = (OFFICIAL,)
