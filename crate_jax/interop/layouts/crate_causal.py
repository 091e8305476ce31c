"""Causal CRATE and CRATE-LM: the names of their official implementations, which are nanoGPT's.

Source: pull request 13 of the code of arXiv 2306.01129, and the code of arXiv 2410.16443.
"""

import numpy as np

from crate_jax.interop.layouts.forms import Linear, Same
from crate_jax.interop.layouts.layout import Implied, Layout, Tree

EMBEDDING = {
    "embedding/tokens": ("transformer.wte.weight", Same()),
    "embedding/positions": ("transformer.wpe.weight", Same()),
    "head/tokens": ("lm_head.weight", Same()),
}
# The table of tokens lies in a file twice.
TIED = {"lm_head.weight": "transformer.wte.weight"}


def _blocks(second: str) -> dict[str, tuple[str, Same]]:
    """The names of a layer, whose second half has this name here."""
    block = "transformer.h.{i}"
    return {
        "blocks/mssa_norm/scale": (f"{block}.prenorm_1.weight", Same()),
        "blocks/mssa_norm/bias": (f"{block}.prenorm_1.bias", Same()),
        "blocks/mssa/U": (f"{block}.attn.c_attn.weight", Linear()),
        "blocks/mssa/W_out": (f"{block}.attn.c_proj.weight", Linear(in_axes=2)),
        "blocks/mssa/b_out": (f"{block}.attn.c_proj.bias", Same()),
        f"blocks/{second}_norm/scale": (f"{block}.prenorm_2.weight", Same()),
        f"blocks/{second}_norm/bias": (f"{block}.prenorm_2.bias", Same()),
    }


def causal_mask(tree: Tree) -> np.ndarray:
    """The mask between tokens, as a file holds it: ones on and below the diagonal."""
    T = tree.shapes["embedding/positions"][0]
    return np.tril(np.ones((1, 1, T, T), np.float32))


CAUSAL = Layout(
    name="official",
    table=EMBEDDING
    | _blocks("ista")
    | {"blocks/ista/D": ("transformer.h.{i}.ista.weight", Same())},
    copies=TIED,
    constants={"transformer.h.{i}.attn.bias": causal_mask},
    implies={"nonlinearity": Implied("ista.weight", ("ista",))},
)
LM = Layout(
    name="official",
    table=EMBEDDING
    | _blocks("odl")
    | {
        # Atoms are rows there.
        "blocks/odl/D": ("transformer.h.{i}.ista.weight", Linear()),
        "head_norm/scale": ("transformer.ln_f.weight", Same()),
        "head_norm/bias": ("transformer.ln_f.bias", Same()),
    },
    copies=TIED,
)
