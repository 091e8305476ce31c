"""Hyper-SET: the names of the official implementation (arXiv 2502.11646).

Its one block is layer 0 of a list. Positions are computed, and no file holds them.
"""

from crate_jax.interop.layouts.forms import Leading, Linear, Same
from crate_jax.interop.layouts.layout import Layout

OFFICIAL = Layout(
    name="official",
    table={
        "embedding/cls_token": ("cls_token", Leading(2)),
        "embedding/patch_norm/scale": ("emb.0.weight", Same()),
        "embedding/patch_norm/bias": ("emb.0.bias", Same()),
        "embedding/projection/kernel": ("emb.1.weight", Linear()),
        "embedding/projection/bias": ("emb.1.bias", Same()),
        "embedding/token_norm/scale": ("emb.2.weight", Same()),
        "embedding/token_norm/bias": ("emb.2.bias", Same()),
        "block/bisoftmax/U": ("enc.0.attn.qkv.weight", Linear()),
        "block/bisoftmax/q_scale": ("enc.0.attn.ln1_1.weight", Same()),
        "block/bisoftmax/k_scale": ("enc.0.attn.ln1_2.weight", Same()),
        "block/bisoftmax/v_scale": ("enc.0.attn.ln1_3.weight", Same()),
        "block/tied_mlp/V": ("enc.0.mlp.weight", Linear()),
        "block/tied_mlp/scale": ("enc.0.ln2.weight", Same()),
        "block/steps/norm/scale": ("ln_inp.weight", Same()),
        "block/steps/linear/kernel": ("time_mlp.1.1.weight", Linear()),
        "block/steps/linear/bias": ("time_mlp.1.1.bias", Same()),
        "depth_code/linear_0/kernel": ("time_mlp.0.1.weight", Linear()),
        "depth_code/linear_0/bias": ("time_mlp.0.1.bias", Same()),
        "depth_code/norm_0/scale": ("time_mlp.0.2.weight", Same()),
        "depth_code/norm_1/scale": ("time_mlp.0.4.weight", Same()),
        "depth_code/linear_1/kernel": ("time_mlp.0.5.weight", Linear()),
        "depth_code/linear_1/bias": ("time_mlp.0.5.bias", Same()),
        "depth_code/norm_2/scale": ("time_mlp.0.6.weight", Same()),
        "head_norm/scale": ("fc.0.weight", Same()),
        "head_norm/bias": ("fc.0.bias", Same()),
        "head/kernel": ("fc.1.weight", Linear()),
        "head/bias": ("fc.1.bias", Same()),
    },
)

LAYOUTS = (OFFICIAL,)
