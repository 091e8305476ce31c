"""The cache of attention. Tokens that follow need nothing else of the tokens so far.

It lies in the collection `PAST` of a model's variables, a value for each layer. A module that finds
its own there takes the tokens of a call for those that follow, and puts the grown one back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax import placement

PAST = "past"


class SubspaceTokens(NamedTuple):
    """The cache of MSSA: the subspace tokens so far, with room for a whole context.

    A token is query, key and value at once, so that one array is all of it.

    Attributes:
        V_BxTxKxp: subspace tokens; those beyond the length are empty.
        length: their number, int32.
    """

    V_BxTxKxp: Array
    length: Array

    def grown(self, V_BxNxKxp: Array) -> "SubspaceTokens":
        """The cache with N more tokens, for which there must be room."""
        V_BxTxKxp = placement.beside(self.V_BxTxKxp, V_BxNxKxp)
        V_BxTxKxp = jax.lax.dynamic_update_slice_in_dim(V_BxTxKxp, V_BxNxKxp, self.length, axis=1)
        return SubspaceTokens(V_BxTxKxp, self.length + V_BxNxKxp.shape[1])


def no_subspace_tokens(model: Any, batch_size: int) -> SubspaceTokens:
    """The empty cache of one layer of a model, for so many texts."""
    room = (batch_size, model.context_length, model.num_heads, model.subspace_dim)
    return SubspaceTokens(jnp.zeros(room, model.dtype), jnp.int32(0))
