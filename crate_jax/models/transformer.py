"""The operators of a ViT, in the place of MSSA and ISTA: pure functions, then their modules.

The letters are those of `crate_jax.models.layers`.
"""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.derivatives import wide
from crate_jax.models.layers import Attended, times
from crate_jax.models.parameters import read

# As timm starts linear maps and positions; biases start at zero. It cuts the distribution at ±2, a
# hundred deviations off, so nothing is cut.
kernel_init = init.normal(0.02)


def mhsa(
    Y_BxNxd: Array,
    W_qkv_dx3xKxp: Array,
    b_qkv_3xKxp: Array | None,
    W_out_Kxpxd: Array,
    b_out_d: Array,
    *,
    mask: Array | None = None,
) -> Attended:
    """Multi-head self-attention: W_out [softmax(p^{-1/2} q_k k_kᵀ) v_k]_k + b_out.

    Source: arXiv 1706.03762, section 3.2. MSSA is the case in which the three maps of a head are
    one.

    Args:
        Y_BxNxd: tokens, normalised.
        W_qkv_dx3xKxp: the maps to queries, keys and values of the K heads.
        b_qkv_3xKxp: their biases; None: none.
        W_out_Kxpxd: output projection.
        b_out_d: its bias.
        mask: True where token n may see token m; it broadcasts to (B, K, N, N).

    Returns:
        The update (B, N, d); seen is ``attention`` (B, K, N, N), whose rows sum to one. All of the
        tokens' dtype, which the weights share; scores and softmax are of dtype `wide`.
    """
    qkv_BxNx3xKxp = times(Y_BxNxd, W_qkv_dx3xKxp)
    if b_qkv_3xKxp is not None:
        qkv_BxNx3xKxp += b_qkv_3xKxp[None, None]
    qkv_3xBxKxNxp = keep(qkv_BxNx3xKxp.transpose(2, 0, 3, 1, 4), "subspace_tokens")
    q_BxKxNxp, k_BxKxNxp, v_BxKxNxp = qkv_3xBxKxNxp
    S_BxKxNxN = jnp.einsum(
        "bknp,bkmp->bknm", q_BxKxNxp, k_BxKxNxp, preferred_element_type=wide(q_BxKxNxp.dtype)
    )
    S_BxKxNxN *= q_BxKxNxp.shape[-1] ** -0.5
    if mask is not None:
        S_BxKxNxN = jnp.where(mask, S_BxKxNxN, -jnp.inf)
    A_BxKxNxN = keep(jax.nn.softmax(S_BxKxNxN, axis=-1).astype(v_BxKxNxp.dtype), "attention")
    O_BxKxNxp = keep(jnp.einsum("bknm,bkmp->bknp", A_BxKxNxN, v_BxKxNxp), "attended")
    update_BxNxd = times(O_BxKxNxp.swapaxes(1, 2), W_out_Kxpxd, axes=2) + b_out_d[None, None]
    return Attended(update_BxNxd, {"attention": A_BxKxNxN})


def mlp(
    Y_BxNxd: Array,
    W_in_dxm: Array,
    b_in_m: Array | None,
    W_out_mxd: Array,
    b_out_d: Array | None,
) -> Array:
    """GELU(Y W_in + b_in) W_out + b_out, with the exact GELU x Φ(x).

    Args:
        Y_BxNxd: tokens, normalised.
        W_in_dxm: to m hidden units.
        b_in_m: their bias; None: none.
        W_out_mxd: back to the width.
        b_out_d: its bias; None: none.

    Returns:
        Update of the tokens (B, N, d), of the tokens' dtype, which the weights share.
    """
    hidden_BxNxm = times(Y_BxNxd, W_in_dxm)
    if b_in_m is not None:
        hidden_BxNxm += b_in_m[None, None]
    active_BxNxm = jax.nn.gelu(keep(hidden_BxNxm, "hidden"), approximate=False)
    update_BxNxd = times(active_BxNxm, W_out_mxd)
    return update_BxNxd if b_out_d is None else update_BxNxd + b_out_d[None, None]


class MHSA(nn.Module):
    """`mhsa` with its parameters W_qkv (d, 3, K, p), b_qkv (3, K, p), W_out (K, p, d), b_out (d,).

    ``qkv_bias`` False leaves b_qkv out, as MSSA has none.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("attention",)

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update and all taps, as `mhsa` returns them."""
        maps = read_maps(self, Y_BxNxd.shape[-1], self.qkv_bias)
        return mhsa(Y_BxNxd.astype(self.dtype), *maps, mask=mask)


def read_maps(attention: Any, d: int, qkv_bias: bool) -> tuple[Array, Array | None, Array, Array]:
    """W_qkv (d, 3, K, p), b_qkv (3, K, p) or None, W_out (K, p, d), b_out (d,) of an attention."""
    K, p, dtype = attention.num_heads, attention.head_dim, attention.dtype
    W_qkv = read(attention, "W_qkv", kernel_init, (d, 3, K, p), dtype)
    b_qkv = read(attention, "b_qkv", init.zeros, (3, K, p), dtype) if qkv_bias else None
    W_out = read(attention, "W_out", kernel_init, (K, p, d), dtype)
    b_out = read(attention, "b_out", init.zeros, (d,), dtype)
    return W_qkv, b_qkv, W_out, b_out


class MLP(nn.Module):
    """`mlp` with its parameters W_in (d, m), b_in (m,), W_out (m, d) and b_out (d,).

    ``bias`` False leaves b_in and b_out out.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32
    bias: bool = True
    out_init: Callable[..., Array] = kernel_init

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> Array:
        """Normalised tokens (B, N, d) to their update (B, N, d)."""
        d, m = Y_BxNxd.shape[-1], self.hidden
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "W_in": (kernel_init, (d, m)),
            "b_in": (init.zeros, (m,)),
            "W_out": (self.out_init, (m, d)),
            "b_out": (init.zeros, (d,)),
        }
        weights: list[Any] = [
            read(self, name, *of, self.dtype) if self.bias or name[0] == "W" else None
            for name, of in shapes.items()
        ]
        return mlp(Y_BxNxd.astype(self.dtype), *weights)
