"""Causal TSSA: a token attends to itself and the tokens before it, by running sums over them.

The sums are all that a layer keeps of a text. The letters are those of `crate_jax.models.tssa`.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.derivatives import wide
from crate_jax.models.layers import Attended
from crate_jax.models.parameters import parameter
from crate_jax.models.past import PAST
from crate_jax.models.subspaces import into_subspaces, out_of_subspaces
from crate_jax.models.tssa import TSSA, membership_of, read_weights, shrunk

_LEAST = 1e-12  # the least sum of squares so far that the official code divides by


class Sums(NamedTuple):
    """The running sums of causal TSSA over all tokens so far, of dtype `wide`.

    Their size is constant.

    Attributes:
        squares_BxKxp: Σ V².
        weighted_BxKxp: Σ Π V².
        weights_BxK: Σ Π.
    """

    squares_BxKxp: Array
    weighted_BxKxp: Array
    weights_BxK: Array


def no_sums(batch: int, num_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32) -> Sums:
    """The sums before the first token, zeros; ``dtype`` is that of the tokens."""
    zeros_BxKxp = jnp.zeros((batch, num_heads, head_dim), wide(dtype))
    return Sums(zeros_BxKxp, zeros_BxKxp, zeros_BxKxp[..., 0])


def attend_by_past_statistics(
    V_BxNxKxp: Array, tau_K: Array, bias_NxK: Array, past: Sums
) -> tuple[Array, Array, Sums]:
    """TSSA's `attend_by_statistics`, for a token that attends to itself and those before it.

    All sums over the tokens are running sums: with q_n = Σ_{m≤n} V²_m, Π_nk = softmax over k of
    τ_k Σ_p (V²_nkp / q_nkp + b_nk), and s_nkp = Σ_{m≤n} Π_mk V²_mkp / Σ_{m≤n} Π_mk. The memberships
    of earlier tokens stay as they are. The bias b of a place and a subspace is learned, because the
    shares V²/q fall as a text goes on; so the longest text of the training is the longest there is.
    Source: arXiv 2412.17810 and its code for language.

    A text may come in pieces, of one token each while it is generated: each piece takes the sums
    that the one before it returned.

    Args:
        V_BxNxKxp: tokens in K subspaces, a piece of the text.
        tau_K: temperature τ of each subspace.
        bias_NxK: b at the places of these tokens.
        past: sums over the tokens before the piece; `no_sums` at the start of the text.

    Returns:
        O (B, N, K, p) and the membership Π (B, N, K), both of the dtype of the tokens; and the sums
        with this piece.
    """
    squares_BxNxKxp = jnp.square(V_BxNxKxp.astype(wide(V_BxNxKxp.dtype)))
    so_far_BxNxKxp = past.squares_BxKxp[:, None] + jnp.cumsum(squares_BxNxKxp, axis=1)
    share_BxNxKxp = squares_BxNxKxp / jnp.maximum(so_far_BxNxKxp, _LEAST)
    # The official code adds b to each of the p terms of the sum.
    bias_1xNxK = V_BxNxKxp.shape[-1] * bias_NxK[None].astype(share_BxNxKxp.dtype)
    Pi_BxNxK = membership_of(share_BxNxKxp.sum(axis=-1) + bias_1xNxK, tau_K)
    running_BxNxKxp = jnp.cumsum(Pi_BxNxK[..., None] * squares_BxNxKxp, axis=1)
    weighted_BxNxKxp = past.weighted_BxKxp[:, None] + running_BxNxKxp
    weights_BxNxK = past.weights_BxK[:, None] + jnp.cumsum(Pi_BxNxK, axis=1)
    O_BxNxKxp = shrunk(V_BxNxKxp, Pi_BxNxK, weighted_BxNxKxp, weights_BxNxK)
    sums = Sums(so_far_BxNxKxp[:, -1], weighted_BxNxKxp[:, -1], weights_BxNxK[:, -1])
    return O_BxNxKxp, Pi_BxNxK.astype(V_BxNxKxp.dtype), sums


class PastSums(NamedTuple):
    """The cache of causal TSSA. Its size does not depend on the number of tokens.

    Attributes:
        sums: over them.
        length: their number, int32.
    """

    sums: Sums
    length: Array


class CausalTSSA(TSSA):
    """`attend_by_past_statistics` with the parameters of `TSSA`, and b_place (K, T).

    That is the bias b of each of the T places and of each subspace; it starts at zero.

    Attributes:
        context_length: T.
    """

    context_length: int = dataclasses.field(kw_only=True)

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update and all taps.

        Raises:
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError("mask must be None for causal TSSA; got one. It masks by order alone.")
        Y_BxNxd, N = Y_BxNxd.astype(self.dtype), Y_BxNxd.shape[1]
        weights = read_weights(self, Y_BxNxd.shape[-1])
        b_KxT = parameter(self, "b_place", init.zeros, (self.num_heads, self.context_length))
        past = self.get_variable(PAST, "sums")
        sums, length = past or PastSums(
            no_sums(Y_BxNxd.shape[0], self.num_heads, self.head_dim, self.dtype), jnp.int32(0)
        )
        b_NxK = jax.lax.dynamic_slice_in_dim(b_KxT, length, N, axis=1).T
        V_BxNxKxp = into_subspaces(Y_BxNxd, weights.U_dxKxp, weights.b_Kxp)
        O_BxNxKxp, Pi_BxNxK, sums = attend_by_past_statistics(V_BxNxKxp, weights.tau_K, b_NxK, sums)
        if past is not None:
            self.put_variable(PAST, "sums", PastSums(sums, length + N))
        seen = {"subspace_tokens": V_BxNxKxp, "membership": Pi_BxNxK.swapaxes(1, 2)}
        update_BxNxd = out_of_subspaces(O_BxNxKxp, weights.W_out_Kxpxd, weights.b_out_d)
        return Attended(update_BxNxd, seen)
