"""ViT: timm's names, and those of the ViT that CRATE's repository trains as its baseline."""

from crate_jax.interop.layouts.forms import Convolution, Flat, Leading, Linear, Same
from crate_jax.interop.layouts.layout import Implied, Layout, Table


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
        "head_norm/scale": (f"{norm}.weight", Same()),
        "head_norm/bias": (f"{norm}.bias", Same()),
        "head/kernel": ("head.weight", Linear()),
        "head/bias": ("head.bias", Same()),
    }


TIMM = Layout(name="timm", table=_table("norm"), implies={"pool": Implied("norm", ("cls",))})
# Means over the patches: the norm stands behind the pooling, under this name. timm's models with
# global_pool="avg" have the same names and norm once.
CRATE_BASELINE = Layout(
    name="crate_baseline",
    table=_table("fc_norm"),
    implies={"pool": Implied("fc_norm", ("patches", "patches_twice"))},
)

LAYOUTS = (TIMM, CRATE_BASELINE)
