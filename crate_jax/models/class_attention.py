"""Class attention: in its blocks only the class token attends to the tokens.

They stand after the layers, and the class token joins there. Source: CaiT, arXiv 2103.17239, in the
form of XCiT, which arXiv 2412.17810 takes. The letters are those of `crate_jax.models.layers`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.derivatives import wide
from crate_jax.models.layers import LayerNorm, times
from crate_jax.models.parameters import parameter
from crate_jax.models.transformer import MLP, read_maps


def class_attention(
    Y_BxNxd: Array,
    W_qkv_dx3xKxp: Array,
    b_qkv_3xKxp: Array | None,
    W_out_Kxpxd: Array,
    b_out_d: Array,
) -> Array:
    """The row of the class token of `crate_jax.models.transformer.mhsa`.

    W_out [softmax(p^{-1/2} q_k k_kᵀ) v_k]_k + b_out, where the class token makes q, and all tokens
    make k and v.

    Args:
        Y_BxNxd: tokens, normalised, the class token first.
        W_qkv_dx3xKxp: the maps to queries, keys and values of the K heads.
        b_qkv_3xKxp: their biases; None: none.
        W_out_Kxpxd: output projection.
        b_out_d: its bias.

    Returns:
        The update of the class token (B, 1, d), of the tokens' dtype, which the weights share.
    """
    q_Bx1xKxp = times(Y_BxNxd[:, :1], W_qkv_dx3xKxp[:, 0])
    kv_BxNx2xKxp = times(Y_BxNxd, W_qkv_dx3xKxp[:, 1:])
    if b_qkv_3xKxp is not None:
        q_Bx1xKxp += b_qkv_3xKxp[None, None, 0]
        kv_BxNx2xKxp += b_qkv_3xKxp[None, None, 1:]
    kv_2xBxNxKxp = keep(kv_BxNx2xKxp.transpose(2, 0, 1, 3, 4), "subspace_tokens")
    k_BxNxKxp, v_BxNxKxp = kv_2xBxNxKxp
    q_BxKxp = keep(q_Bx1xKxp[:, 0], "subspace_tokens")
    S_BxKxN = jnp.einsum(
        "bkp,bnkp->bkn", q_BxKxp, k_BxNxKxp, preferred_element_type=wide(q_BxKxp.dtype)
    )
    A_BxKxN = jax.nn.softmax(S_BxKxN * q_BxKxp.shape[-1] ** -0.5).astype(v_BxNxKxp.dtype)
    O_BxKxp = keep(jnp.einsum("bkn,bnkp->bkp", A_BxKxN, v_BxNxKxp), "attended")
    return times(O_BxKxp[:, None], W_out_Kxpxd, axes=2) + b_out_d[None, None]


class ClassAttention(nn.Module):
    """`class_attention` with its parameters, which are those of an MHSA with biases."""

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> Array:
        """Normalised tokens (B, N, d), the class token first, to its update (B, 1, d)."""
        W_qkv, b_qkv, W_out, b_out = read_maps(self, Y_BxNxd.shape[-1], qkv_bias=True)
        return class_attention(Y_BxNxd.astype(self.dtype), W_qkv, b_qkv, W_out, b_out)


class ClassBlock(nn.Module):
    """A block of class attention, for `crate_jax.models.block.stack`.

    With z the class token, X the others, Y = LN [z; X] and g₁, g₂ the factors of LayerScale:

        z ← z + g₁ · attention(Y),  X ← X + g₁ · Y without its first row
        z, X ← LN [z; X]; without ``tokens_norm`` z ← LN z alone
        z ← z + g₂ · MLP(z),  X ← 2 X

    As the official code has it, the other tokens are changed too: they take g₁ times themselves,
    normalised, in the place of an update, and come out doubled.

    Attributes:
        num_heads: K.
        head_dim: p.
        hidden: units of the MLP.
        layer_scale: what both factors (d,) start from.
        tokens_norm: whether the second LayerNorm takes all tokens.
        dtype: the dtype of the tokens.
        backward: of the LayerNorms, one of `crate_jax.models.derivatives.BACKWARD`.
        epsilon: the ε of the LayerNorms.
    """

    num_heads: int
    head_dim: int
    hidden: int
    layer_scale: float
    tokens_norm: bool
    dtype: DTypeLike
    backward: str
    epsilon: float

    @nn.compact
    def __call__(
        self, Z_BxNxd: Array, per_layer: None, context: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Tokens (B, N, d), the class token first, to tokens (B, N, d); there are no taps."""
        del per_layer, context
        norm = functools.partial(LayerNorm, self.dtype, self.backward, self.epsilon)
        Y_BxNxd = norm(name="attention_norm")(Z_BxNxd)
        attention = ClassAttention(self.num_heads, self.head_dim, self.dtype, name="attention")
        update_BxNxd = jnp.concatenate([attention(Y_BxNxd), Y_BxNxd[:, 1:]], axis=1)
        Z_BxNxd += self._scaled("attention", update_BxNxd)
        second = norm(name="mlp_norm")
        if self.tokens_norm:
            Z_BxNxd = second(Z_BxNxd)
        else:
            Z_BxNxd = jnp.concatenate([second(Z_BxNxd[:, :1]), Z_BxNxd[:, 1:]], axis=1)
        z_Bx1xd, X_BxPxd = Z_BxNxd[:, :1], Z_BxNxd[:, 1:]
        z_Bx1xd += self._scaled("mlp", MLP(self.hidden, self.dtype, name="mlp")(z_Bx1xd))
        return jnp.concatenate([z_Bx1xd, 2 * X_BxPxd], axis=1), {}

    def _scaled(self, name: str, update_BxNxd: Array) -> Array:
        """An update times its factor."""
        update_BxNxd = keep(update_BxNxd, "unscaled")
        start = init.constant(self.layer_scale)
        g_d = parameter(self, f"{name}_scale", start, update_BxNxd.shape[-1:])
        return update_BxNxd * g_d.astype(self.dtype)[None, None]


class ClassCost(NamedTuple):
    """The cost of a `ClassBlock` for one example.

    Attributes:
        products: multiply-adds of its matrix products. Keys and values are of all tokens; the
            query, W_out and the MLP are of one.
        again: of these the ones that the backward pass computes again, by ``remat``.
        kept: values that it keeps, likewise: the tokens; without full recomputation keys and
            values; without any the normalised tokens and what the factors multiply.
    """

    products: int
    again: dict[str, int]
    kept: dict[str, int]


def class_cost(tokens: int, width: int, inner: int, hidden: int) -> ClassCost:
    """`ClassCost` of a block of so many tokens and hidden units; ``inner`` is K · p."""
    scores = tokens * inner
    maps = 2 * tokens * width * inner + 2 * width * inner + 2 * width * hidden
    products = maps + 2 * scores
    tokens_kept, keys_and_values = tokens * width, 2 * tokens * inner
    return ClassCost(
        products,
        again={"none": scores, "dots": 2 * scores, "full": products},
        kept={
            "none": 4 * tokens_kept + keys_and_values,
            "dots": tokens_kept + keys_and_values,
            "full": tokens_kept,
        },
    )
