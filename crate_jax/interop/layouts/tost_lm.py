"""ToST for text: the names of its official implementation (arXiv 2412.17810), nanoGPT's."""

from crate_jax.interop.layouts.crate_causal import EMBEDDING, TIED
from crate_jax.interop.layouts.forms import Flat, Linear, Same, Trailing
from crate_jax.interop.layouts.layout import Layout

_BLOCK = "transformer.h.{i}"

OFFICIAL = Layout(
    name="official",
    table=EMBEDDING
    | {
        "blocks/tssa_norm/scale": (f"{_BLOCK}.ln_1.weight", Same()),
        "blocks/tssa_norm/bias": (f"{_BLOCK}.ln_1.bias", Same()),
        "blocks/tssa/U": (f"{_BLOCK}.attn.c_attn.weight", Linear()),
        "blocks/tssa/b_U": (f"{_BLOCK}.attn.c_attn.bias", Flat()),
        "blocks/tssa/tau": (f"{_BLOCK}.attn.temp", Trailing(1)),
        "blocks/tssa/b_place": (f"{_BLOCK}.attn.denom_bias", Trailing(1)),
        "blocks/tssa/W_out": (f"{_BLOCK}.attn.c_proj.weight", Linear(in_axes=2)),
        "blocks/tssa/b_out": (f"{_BLOCK}.attn.c_proj.bias", Same()),
        "blocks/tssa_scale": (f"{_BLOCK}.gamma1", Same()),
        "blocks/mlp_norm/scale": (f"{_BLOCK}.ln_2.weight", Same()),
        "blocks/mlp_norm/bias": (f"{_BLOCK}.ln_2.bias", Same()),
        "blocks/mlp/W_in": (f"{_BLOCK}.mlp.c_fc.weight", Linear()),
        "blocks/mlp/b_in": (f"{_BLOCK}.mlp.c_fc.bias", Same()),
        "blocks/mlp/W_out": (f"{_BLOCK}.mlp.c_proj.weight", Linear()),
        "blocks/mlp/b_out": (f"{_BLOCK}.mlp.c_proj.bias", Same()),
        "blocks/mlp_scale": (f"{_BLOCK}.gamma2", Same()),
        "head_norm/scale": ("transformer.ln_f.weight", Same()),
        "head_norm/bias": ("transformer.ln_f.bias", Same()),
    },
    copies=TIED,
)

LAYOUTS = (OFFICIAL,)
