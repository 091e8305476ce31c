"""Token statistics self-attention (TSSA): attention whose cost is linear in the tokens.

No token is compared with another one. A token belongs more to some subspaces and less to others. In
each it shrinks, least along the directions in which the tokens of that subspace vary most. The
letters are those of `crate_jax.models.layers`, and

    Π  membership of tokens in subspaces     τ  temperature     s  second moments of a subspace

Statistics are of dtype `crate_jax.models.derivatives.wide`, and no product of matrices takes them.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init

from crate_jax.models.attention import keep_merged
from crate_jax.models.derivatives import wide
from crate_jax.models.layers import Attended
from crate_jax.models.parameters import (
    SubspaceMaps,
    linear_bias_init,
    parameter,
    read,
    read_bases,
    read_output,
)
from crate_jax.models.subspaces import into_subspaces, out_of_subspaces

# The official code's addition to the sum of Π, and its least sum of squares as a divisor.
_EPSILON, _LEAST = 1e-8, 1e-24


def attend_by_statistics(V_BxNxKxp: Array, tau_K: Array) -> tuple[Array, Array]:
    """Apply TSSA to subspace tokens: −Π_nk V_nk / (1 + s_k), and Π.

    Π_nk = softmax over the subspaces k of τ_k Σ_p V²_nkp / Σ_m V²_mkp, and s_kp = Σ_n Π_nk V²_nkp /
    Σ_n Π_nk. It is the direction of a gradient step on a bound of R^c: s are the second moments of
    the tokens in a subspace, 1/(1 + s) is the slope of the logarithm in the bound at s, and the
    minus makes the step a descent.
    Source: arXiv 2412.17810 and its code.

    With one subspace each token belongs to it wholly, so V shrinks by one and its mean square:

    >>> O, membership = attend_by_statistics(jnp.array([[[[1.0]], [[3.0]]]]), jnp.ones(1))
    >>> O[..., 0].tolist(), membership.tolist()
    ([[[-0.1666666716337204], [-0.5]]], [[[1.0], [1.0]]])

    Args:
        V_BxNxKxp: tokens in K subspaces.
        tau_K: temperature τ of each.

    Returns:
        O (B, N, K, p), and the membership Π (B, N, K), whose sum over the subspaces is one; both of
        the dtype of the tokens.
    """
    wide_BxNxKxp = V_BxNxKxp.astype(wide(V_BxNxKxp.dtype))
    squares_BxNxKxp = jnp.square(wide_BxNxKxp)
    total_Bx1xKxp = jnp.sum(squares_BxNxKxp, axis=1, keepdims=True)
    # Not squares over their sum: the derivative of that has the square of the least sum in it.
    unit_BxNxKxp = wide_BxNxKxp * jax.lax.rsqrt(jnp.maximum(total_Bx1xKxp, _LEAST))
    Pi_BxNxK = membership_of(jnp.square(unit_BxNxKxp).sum(axis=-1), tau_K)
    weighted_Bx1xKxp = jnp.sum(Pi_BxNxK[..., None] * squares_BxNxKxp, axis=1, keepdims=True)
    weights_Bx1xK = jnp.sum(Pi_BxNxK, axis=1, keepdims=True)
    O_BxNxKxp = shrunk(V_BxNxKxp, Pi_BxNxK, weighted_Bx1xKxp, weights_Bx1xK)
    return O_BxNxKxp, Pi_BxNxK.astype(V_BxNxKxp.dtype)


def membership_of(share_BxNxK: Array, tau_K: Array) -> Array:
    """Π (B, N, K): the softmax over the subspaces of τ_k times a token's share."""
    return keep(
        jax.nn.softmax(tau_K[None, None].astype(share_BxNxK.dtype) * share_BxNxK), "moments"
    )


def shrunk(V_BxNxKxp: Array, Pi_BxNxK: Array, weighted: Array, weights: Array) -> Array:
    """−Π V / (1 + s) with s the weighted sum of squares over the sum of weights."""
    s = keep(weighted / (weights + _EPSILON)[..., None], "moments")
    wide_BxNxKxp = V_BxNxKxp.astype(Pi_BxNxK.dtype) * -Pi_BxNxK[..., None] / (1 + s)
    return keep_merged(wide_BxNxKxp.astype(V_BxNxKxp.dtype), "attended")


def tssa(
    Y_BxNxd: Array,
    U_dxKxp: Array,
    tau_K: Array,
    W_out_Kxpxd: Array,
    b_out_d: Array | None = None,
    *,
    b_Kxp: Array | None = None,
) -> Attended:
    """Token statistics self-attention: W_out [O_1; …; O_K] + b_out of V_k = U_kᵀ Y + b_k.

    `attend_by_statistics` makes O of V. The minus is in the update, so that a layer adds it.
    Source: arXiv 2412.17810 and its code.
    Differs from the paper, as the official code does: W_out is learned and not [U_1, …, U_K].

    Args:
        Y_BxNxd: tokens, normalised.
        U_dxKxp: bases of the K subspaces.
        tau_K: temperature τ of each.
        W_out_Kxpxd: output projection.
        b_out_d: its bias; None: none.
        b_Kxp: bias of the subspace tokens; None: none.

    Returns:
        The update (B, N, d); seen are ``subspace_tokens`` (B, N, K, p) and ``membership``
        (B, K, N), whose sum over the subspaces is one. All of the tokens' dtype, which the weights
        share.
    """
    V_BxNxKxp = into_subspaces(Y_BxNxd, U_dxKxp, b_Kxp)
    O_BxNxKxp, Pi_BxNxK = attend_by_statistics(V_BxNxKxp, tau_K)
    update_BxNxd = out_of_subspaces(O_BxNxKxp, W_out_Kxpxd, b_out_d)
    seen = {"subspace_tokens": V_BxNxKxp, "membership": Pi_BxNxK.swapaxes(1, 2)}
    return Attended(update_BxNxd, seen)


class Weights(NamedTuple):
    """The parameters of TSSA, as arguments of `tssa`."""

    U_dxKxp: Array
    b_Kxp: Array | None
    tau_K: Array
    W_out_Kxpxd: Array
    b_out_d: Array | None


def read_weights(attention: Any, d: int) -> Weights:
    """Read the weights of a module with the fields of `TSSA`."""
    U_dxKxp, b_Kxp = read_bases(attention, d), None
    K, p = attention.num_heads, attention.head_dim
    if attention.subspace_bias:
        b_Kxp = read(
            attention, "b_U", attention.bias_init or linear_bias_init(d), (K, p), attention.dtype
        )
    tau_K = parameter(attention, "tau", init.ones, (K,))
    return Weights(U_dxKxp, b_Kxp, tau_K, *read_output(attention, d))


class TSSA(SubspaceMaps, nn.Module):
    """`tssa` with its parameters U (d, K, p), tau (K,), W_out (K, p, d) and, with ``bias``, b_out.

    The temperature τ starts at one.

    Attributes:
        subspace_bias: whether there is b_U (K, p) too.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("subspace_tokens", "membership")

    subspace_bias: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update and all taps, as `tssa` returns them.

        Raises:
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError("mask must be None for TSSA; got one. Its sums are over all tokens.")
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        return tssa(Y_BxNxd, **read_weights(self, Y_BxNxd.shape[-1])._asdict())
