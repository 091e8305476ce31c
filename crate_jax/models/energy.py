"""Operators that descend or ascend an energy, of Hyper-SET: pure functions, then their modules.

Source: arXiv 2502.11646 and its code. The letters are those of `crate_jax.models.layers`.
"""

import functools
from collections.abc import Collection, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.derivatives import wide
from crate_jax.models.layers import Attended, times
from crate_jax.models.parameters import linear_kernel_init, parameter, read


def rms_norm(X: Array, scale_d: Array) -> Array:
    """X over the root of the mean square of its last axis, times a scale, as PyTorch's RMSNorm.

    The mean is of dtype `wide` of X, and the number that it is kept from zero by is the smallest
    step from one in float32.
    """
    squares = jnp.mean(jnp.square(X.astype(wide(X.dtype))), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(squares + jnp.finfo(jnp.float32).eps)
    return X * inverse.astype(X.dtype) * scale_d.reshape((1,) * (X.ndim - 1) + scale_d.shape)


def bisoftmax_attention(
    X_BxNxd: Array, U_dxKxp: Array, scales_p: Sequence[Array], *, mask: Array | None = None
) -> Attended:
    """The gradient step on the energy of attention, before its step size.

    E = √p Σ_k Σ_i log Σ_j exp(⟨w_i, w_j⟩ / √p) with w the RMSNorm of X U_k. A token is in E as
    query and as key, so its gradient by w is A w, where A is the softmax of the scores over the
    keys plus that over the queries. U_kᵀ takes it back: Σ_k (A w) U_kᵀ. Queries, keys and values
    have scales of their own.
    Source: arXiv 2502.11646; the three scales as in the code.

    Args:
        X_BxNxd: tokens, not normalised.
        U_dxKxp: bases of the K subspaces.
        scales_p: (p,) of queries, of keys and of values.
        mask: True where token n may see token m; it broadcasts to (B, K, N, N).

    Returns:
        What is subtracted from the tokens (B, N, d); seen is ``attention`` A (B, K, N, N), of which
        neither rows nor columns sum to one. All of the tokens' dtype, which the weights share.
    """
    V_BxNxKxp = keep(times(X_BxNxd, U_dxKxp), "subspace_tokens")
    q_BxNxKxp, k_BxNxKxp, v_BxNxKxp = (rms_norm(V_BxNxKxp, scale_p) for scale_p in scales_p)
    dtype, p = wide(X_BxNxd.dtype), U_dxKxp.shape[-1]
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    S_BxKxNxN = product("bnkp,bmkp->bknm", q_BxNxKxp, k_BxNxKxp) * p**-0.5
    if mask is not None:  # finite, since a token that nobody sees has no query to sum over
        S_BxKxNxN = jnp.where(mask, S_BxKxNxN, jnp.finfo(dtype).min)
    A_BxKxNxN = jax.nn.softmax(S_BxKxNxN, axis=-1) + jax.nn.softmax(S_BxKxNxN, axis=-2)
    if mask is not None:
        A_BxKxNxN = jnp.where(mask, A_BxKxNxN, 0)
    A_BxKxNxN = keep(A_BxKxNxN.astype(X_BxNxd.dtype), "attention")
    O_BxNxKxp = keep(jnp.einsum("bknm,bmkp->bnkp", A_BxKxNxN, v_BxNxKxp), "attended")
    update_BxNxd = times(O_BxNxKxp, U_dxKxp.transpose(1, 2, 0), axes=2)
    return Attended(update_BxNxd, {"attention": A_BxKxNxN})


def tied_mlp(X_BxNxd: Array, V_dxm: Array, scale_m: Array) -> Array:
    """GELU(RMSNorm(X V)) Vᵀ, with the exact GELU.

    With ReLU it is the gradient of ½‖ReLU(RMSNorm(X V))‖² by the normalised units, taken back by
    Vᵀ.
    Source: arXiv 2502.11646; GELU as in the code.

    Args:
        X_BxNxd: tokens, not normalised.
        V_dxm: to m hidden units, and back.
        scale_m: of the RMSNorm.

    Returns:
        What is added to the tokens (B, N, d), of their dtype, which the weights share.
    """
    hidden_BxNxm = rms_norm(keep(times(X_BxNxd, V_dxm), "hidden"), scale_m)
    return times(jax.nn.gelu(hidden_BxNxm, approximate=False), V_dxm.T)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale (d,), which starts at one."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """(…, d) to (…, d)."""
        scale_d = parameter(self, "scale", init.ones, X.shape[-1:])
        return rms_norm(X.astype(self.dtype), scale_d.astype(self.dtype))


class BisoftmaxAttention(nn.Module):
    """`bisoftmax_attention` with its parameters U (d, K, p) and three scales (p,)."""

    TAPS: ClassVar[tuple[str, ...]] = ("attention",)

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, X_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Tokens (B, N, d) to their update and all taps."""
        shape = (X_BxNxd.shape[-1], self.num_heads, self.head_dim)
        U_init = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(1, 2))
        U_dxKxp = read(self, "U", U_init, shape, self.dtype)
        scales_p = [
            parameter(self, f"{name}_scale", init.ones, shape[2:]).astype(self.dtype)
            for name in ("q", "k", "v")
        ]
        return bisoftmax_attention(X_BxNxd.astype(self.dtype), U_dxKxp, scales_p, mask=mask)


class TiedMLP(nn.Module):
    """`tied_mlp` with its parameters V (d, m) and scale (m,)."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, X_BxNxd: Array) -> Array:
        """Tokens (B, N, d) to their update (B, N, d)."""
        shape = (X_BxNxd.shape[-1], self.hidden)
        V_dxm = read(self, "V", linear_kernel_init, shape, self.dtype)
        scale_m = parameter(self, "scale", init.ones, shape[1:]).astype(self.dtype)
        return tied_mlp(X_BxNxd.astype(self.dtype), V_dxm, scale_m)
