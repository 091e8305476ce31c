"""CRATE: the names of the official implementation (arXiv 2306.01129), and of that of CBSA.

The latter (arXiv 2509.16875) has CBSA, MSSA and TSSA in one frame.
"""

from crate_jax.interop.layouts.forms import Leading, Linear, Same, Trailing
from crate_jax.interop.layouts.layout import Implied, Layout, Table
from crate_jax.interop.layouts.stem import COUNTERS, stem

_LAYER = "transformer.layers.{i}"
_SIGN = "the official names"
# Operators and switches of the theory: these names do not tell their other values.
_IMPLIED = {
    field: Implied(_SIGN, (value,))
    for field, value in dict(
        nonlinearity="ista", attention_sign="plus", threshold="relu", ista_steps=1
    ).items()
}


def _around(attention: str) -> Table:
    """The entries around the patches' embedding and an attention of this name."""
    return {
        "embedding/cls_token": ("cls_token", Leading(2)),
        "embedding/pos_embedding": ("pos_embedding", Leading(1)),
        f"blocks/{attention}_norm/scale": (f"{_LAYER}.0.norm.weight", Same()),
        f"blocks/{attention}_norm/bias": (f"{_LAYER}.0.norm.bias", Same()),
        "blocks/ista_norm/scale": (f"{_LAYER}.1.norm.weight", Same()),
        "blocks/ista_norm/bias": (f"{_LAYER}.1.norm.bias", Same()),
        "blocks/ista/D": (f"{_LAYER}.1.fn.weight", Same()),
        "head_norm/scale": ("mlp_head.0.weight", Same()),
        "head_norm/bias": ("mlp_head.0.bias", Same()),
        "head/kernel": ("mlp_head.1.weight", Linear()),
        "head/bias": ("mlp_head.1.bias", Same()),
    }


OFFICIAL = Layout(
    name="official",
    table={
        **_around("mssa"),
        "embedding/patch_norm/scale": ("to_patch_embedding.1.weight", Same()),
        "embedding/patch_norm/bias": ("to_patch_embedding.1.bias", Same()),
        "embedding/projection/kernel": ("to_patch_embedding.2.weight", Linear()),
        "embedding/projection/bias": ("to_patch_embedding.2.bias", Same()),
        "embedding/token_norm/scale": ("to_patch_embedding.3.weight", Same()),
        "embedding/token_norm/bias": ("to_patch_embedding.3.bias", Same()),
        "blocks/mssa/U": (f"{_LAYER}.0.fn.qkv.weight", Linear()),
        "blocks/mssa/W_out": (f"{_LAYER}.0.fn.to_out.0.weight", Linear(in_axes=2)),
        "blocks/mssa/b_out": (f"{_LAYER}.0.fn.to_out.0.bias", Same()),
    },
    head=r"mlp_head\.[1-9]\d*\..*",  # behind mlp_head.0, the norm
    implies={
        "stem": Implied("to_patch_embedding.1", ("patches",)),
        "attention": Implied(_SIGN, ("mssa",)),
        **_IMPLIED,
    },
)


def _in_one_frame(attention: str, U: str, own: Table) -> Layout:
    """The layout of the frame of CBSA with one of its attentions, whose U is called so there."""
    return Layout(
        name=f"frame_{attention}",
        table={
            **_around(attention),
            **stem("to_patch_embedding.proj"),
            f"blocks/{attention}/U": (f"{_LAYER}.0.fn.{U}.weight", Linear()),
            f"blocks/{attention}/W_out": (f"{_LAYER}.0.fn.to_out.weight", Linear(in_axes=2)),
            f"blocks/{attention}/b_out": (f"{_LAYER}.0.fn.to_out.bias", Same()),
            **own,
        },
        left_out=r"to_patch_embedding\.proj" + COUNTERS,
        head=OFFICIAL.head,
        implies={
            "stem": Implied("to_patch_embedding.proj", ("convolutions",)),
            "attention": Implied(f"fn.{U}", (attention,)),
            **_IMPLIED,
        },
    )


# Where names fit two of them alike, the first is taken: MSSA's are all among TSSA's.
LAYOUTS = (
    OFFICIAL,
    _in_one_frame("mssa", "qkv", {}),
    _in_one_frame("tssa", "qkv", {"blocks/tssa/tau": (f"{_LAYER}.0.fn.temp", Trailing(1))}),
    _in_one_frame(
        "cbsa",
        "proj",
        {
            "blocks/cbsa/step_r": (f"{_LAYER}.0.fn.step_rep", Trailing(2)),
            "blocks/cbsa/step_x": (f"{_LAYER}.0.fn.step_x", Trailing(2)),
        },
    ),
)
