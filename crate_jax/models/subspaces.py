"""The way into the subspaces and out of them, which TSSA, its causal form and CBSA share.

The letters are those of `crate_jax.models.layers`.
"""

from jax import Array

from crate_jax.models.attention import keep_merged
from crate_jax.models.layers import times


def into_subspaces(Y_BxNxd: Array, U_dxKxp: Array, b_Kxp: Array | None = None) -> Array:
    """V_k = U_kᵀ Y + b_k (B, N, K, p)."""
    V_BxNxKxp = times(Y_BxNxd, U_dxKxp)
    if b_Kxp is not None:
        V_BxNxKxp += b_Kxp[None, None]
    return keep_merged(V_BxNxKxp, "subspace_tokens")


def out_of_subspaces(O_BxNxKxp: Array, W_out_Kxpxd: Array, b_out_d: Array | None) -> Array:
    """W_out [O_1; …; O_K] + b_out (B, N, d)."""
    update_BxNxd = times(O_BxNxKxp, W_out_Kxpxd, axes=2)
    return update_BxNxd if b_out_d is None else update_BxNxd + b_out_d[None, None]
