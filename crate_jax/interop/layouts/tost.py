"""ToST: the names of the official implementation (arXiv 2412.17810), which are XCiT's."""

from crate_jax.interop.layouts.forms import Flat, Leading, Linear, Pointwise, Same, Trailing
from crate_jax.interop.layouts.layout import Layout, Table
from crate_jax.interop.layouts.stem import COUNTERS, stem


def _halves(blocks: str, ours: str, first: str) -> Table:
    """The entries of every block besides its attention, which is called ``first`` here."""
    return {
        f"{ours}/{first}_norm/scale": (f"{blocks}.{{i}}.norm1.weight", Same()),
        f"{ours}/{first}_norm/bias": (f"{blocks}.{{i}}.norm1.bias", Same()),
        f"{ours}/{first}_scale": (f"{blocks}.{{i}}.gamma1", Same()),
        f"{ours}/mlp_norm/scale": (f"{blocks}.{{i}}.norm2.weight", Same()),
        f"{ours}/mlp_norm/bias": (f"{blocks}.{{i}}.norm2.bias", Same()),
        f"{ours}/mlp_scale": (f"{blocks}.{{i}}.gamma2", Same()),
        f"{ours}/mlp/W_in": (f"{blocks}.{{i}}.mlp.fc1.weight", Linear()),
        f"{ours}/mlp/b_in": (f"{blocks}.{{i}}.mlp.fc1.bias", Same()),
        f"{ours}/mlp/W_out": (f"{blocks}.{{i}}.mlp.fc2.weight", Linear()),
        f"{ours}/mlp/b_out": (f"{blocks}.{{i}}.mlp.fc2.bias", Same()),
    }


OFFICIAL = Layout(
    name="official",
    table={
        "cls_token": ("cls_token", Leading(2)),
        **stem("patch_embed.proj"),
        "embedding/positions/kernel": ("pos_embeder.token_projection.weight", Pointwise()),
        "embedding/positions/bias": ("pos_embeder.token_projection.bias", Same()),
        **_halves("blocks", "blocks", "tssa"),
        "blocks/tssa/U": ("blocks.{i}.attn.qkv.weight", Linear()),
        "blocks/tssa/b_U": ("blocks.{i}.attn.qkv.bias", Flat()),
        "blocks/tssa/tau": ("blocks.{i}.attn.temp", Trailing(1)),
        "blocks/tssa/W_out": ("blocks.{i}.attn.to_out.0.weight", Linear(in_axes=2)),
        "blocks/tssa/b_out": ("blocks.{i}.attn.to_out.0.bias", Same()),
        **_halves("cls_attn_blocks", "class_blocks", "attention"),
        "class_blocks/attention/W_qkv": ("cls_attn_blocks.{i}.attn.qkv.weight", Linear()),
        "class_blocks/attention/b_qkv": ("cls_attn_blocks.{i}.attn.qkv.bias", Flat()),
        "class_blocks/attention/W_out": ("cls_attn_blocks.{i}.attn.proj.weight", Linear(in_axes=2)),
        "class_blocks/attention/b_out": ("cls_attn_blocks.{i}.attn.proj.bias", Same()),
        "head_norm/scale": ("norm.weight", Same()),
        "head_norm/bias": ("norm.bias", Same()),
        "head/kernel": ("head.weight", Linear()),
        "head/bias": ("head.bias", Same()),
    },
    left_out=r"patch_embed\.proj" + COUNTERS,
)

LAYOUTS = (OFFICIAL,)
