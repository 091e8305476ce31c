"""Attention in subspaces, by name: MSSA, TSSA and CBSA, any of which a model may have.

All three project the tokens onto the same bases U and read the result with W_out. They differ in
what happens between.
"""

import functools
from typing import Any

from crate_jax.models.block import Part
from crate_jax.models.cbsa import CBSA
from crate_jax.models.classifier import pair
from crate_jax.models.layers import MSSA
from crate_jax.models.tssa import TSSA


def subspace_attention(model: Any, *, subspace_bias: bool = False, **fields: Any) -> Part:
    """The first half of a block, by the model's field ``attention``.

    Args:
        model: an image classifier with the fields ``attention`` and ``representatives``.
        subspace_bias: whether TSSA, which alone can have one, has a bias on its subspace tokens.
        **fields: of any operator that differ from its defaults.
    """
    name = model.attention
    kind, own = {
        "mssa": (MSSA, dict(kernel=model.kernel)),
        "tssa": (TSSA, dict(subspace_bias=subspace_bias)),
        "cbsa": (CBSA, dict(grid=model.grid, cells=pair(model.representatives))),
    }[name]
    sizes = dict(num_heads=model.num_heads, head_dim=model.subspace_dim, dtype=model.dtype)
    return Part(name, functools.partial(kind, **sizes, **own, **fields), kind.TAPS)
