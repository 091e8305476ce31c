"""DEPICT, the white-box decoder for segmentation, on the patch tokens of any image classifier.

Source: arXiv 2411.03033 and its code. The letters are those of `crate_jax.models.layers`; Y, as an
axis, counts the classes, and Q is the embeddings of the classes.
"""

import functools
from collections.abc import Collection
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.block import Block, Context, Part, stack
from crate_jax.models.derivatives import wide
from crate_jax.models.layers import Attended, LayerNorm, times
from crate_jax.models.parameters import parameter, read
from crate_jax.models.theory import TiedMSSA
from crate_jax.models.transformer import kernel_init

FORMS = ("self", "cross")

step_init = init.normal(1.0)


def subspace_cross_attention(
    Q_BxYxd: Array, Y_BxPxd: Array, U_dxKxp: Array, step: Array, *, mask: Array | None = None
) -> Attended:
    """MSSA whose queries are other tokens, with the output tied to the bases.

    s Σ_k U_k [softmax(p^{-1/2} (U_kᵀQ)ᵀ(U_kᵀY)) over the tokens Y] applied to U_kᵀY; as rows, each
    query gets s Σ_k softmax(p^{-1/2} (Q U_k)(Y U_k)ᵀ) (Y U_k) U_kᵀ.
    Source: the code of arXiv 2411.03033, model/dec_blocks.py.

    Args:
        Q_BxYxd: queries, not normalised.
        Y_BxPxd: tokens that they attend to, normalised.
        U_dxKxp: bases of the K subspaces.
        step: s, a scalar.
        mask: True where a query may see a token; it broadcasts to (B, K, Y, P).

    Returns:
        The update of the queries (B, Y, d); seen is ``attention`` (B, K, Y, P), whose rows sum to
        one. All of the tokens' dtype, which the weights share.
    """
    q_BxYxKxp, V_BxPxKxp = keep(
        (times(Q_BxYxd, U_dxKxp), times(Y_BxPxd, U_dxKxp)), "subspace_tokens"
    )
    S_BxKxYxP = jnp.einsum(
        "bykp,bnkp->bkyn", q_BxYxKxp, V_BxPxKxp, preferred_element_type=wide(V_BxPxKxp.dtype)
    )
    S_BxKxYxP *= U_dxKxp.shape[-1] ** -0.5
    if mask is not None:
        S_BxKxYxP = jnp.where(mask, S_BxKxYxP, -jnp.inf)
    A_BxKxYxP = jax.nn.softmax(S_BxKxYxP, axis=-1).astype(V_BxPxKxp.dtype)
    A_BxKxYxP = keep(A_BxKxYxP, "attention")
    O_BxYxKxp = keep(jnp.einsum("bkyn,bnkp->bykp", A_BxKxYxP, V_BxPxKxp), "attended")
    update_BxYxd = times(O_BxYxKxp, step * U_dxKxp.transpose(1, 2, 0), axes=2)
    return Attended(update_BxYxd, {"attention": A_BxKxYxP})


class TiedCrossMSSA(nn.Module):
    """`subspace_cross_attention` with its parameters U (d, K, p) and step, a scalar.

    The tokens that are attended to pass a LayerNorm of this module first; the queries do not.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("attention",)

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"

    @nn.compact
    def __call__(
        self, Q_BxYxd: Array, mask: Array | None, taps: Collection[str], others_BxPxd: Array
    ) -> Attended:
        """Queries (B, Y, d) to their update, and all taps."""
        shape = (Q_BxYxd.shape[-1], self.num_heads, self.head_dim)
        U_dxKxp = read(self, "U", init.normal(shape[0] ** -0.5), shape, self.dtype)
        step = parameter(self, "step", step_init, ()).astype(self.dtype)
        Y_BxPxd = LayerNorm(self.dtype, self.backward, name="norm")(others_BxPxd)
        return subspace_cross_attention(
            Q_BxYxd.astype(self.dtype), Y_BxPxd, U_dxKxp, step, mask=mask
        )


class Depict(nn.Module):
    """The decoder: from patch tokens to their similarity with each class.

    "self": three layers Z ← Z + TiedMSSA(LN(Z)) on the patches and the embeddings of the classes
    together. "cross": three such layers on the patches alone, then three in which the embeddings
    attend to the patches. A LayerNorm follows both. The mask of a class is the cosine of the angle
    between a patch and the class, through a LayerNorm over the classes. There is no MLP and no
    bias.
    Source: arXiv 2411.03033 and its code, which call the two SA and CA.

    Attributes:
        num_classes: Y.
        form: one of `FORMS`.
        depth: layers; of the cross form, so many of either kind.
        num_heads: K.
        head_dim: p.
        cross_head_dim: p of the layers in which the embeddings attend to the patches.
        dtype: the dtype of the layers, float32 or bfloat16.
        backward: see `crate_jax.Crate`.
        remat: see `crate_jax.Crate`.
    """

    num_classes: int
    form: str = "self"
    depth: int = 3
    num_heads: int = 3
    head_dim: int = 100
    cross_head_dim: int = 50
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"
    remat: str = "none"

    @nn.compact
    def __call__(self, patches_BxPxd: Array) -> Array:
        """Patch tokens (B, P, d) of any dtype to masks (B, P, Y), float32.

        Raises:
            ValueError: an unknown form, or these are no tokens.
        """
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {self.form}.")
        if patches_BxPxd.ndim != 3:
            raise ValueError(
                f"patches must be (B, P, d); got {patches_BxPxd.shape}. "
                "Take those of forward_features, without the class token."
            )
        Z_BxPxd = patches_BxPxd.astype(self.dtype)
        B, P, d = Z_BxPxd.shape
        Q_Yxd = parameter(self, "class_embedding", kernel_init, (self.num_classes, d))
        Q_BxYxd = jnp.broadcast_to(Q_Yxd.astype(self.dtype), (B, *Q_Yxd.shape))
        Q_BxYxd = placement.beside(Q_BxYxd, Z_BxPxd)
        kernel = "auto" if self.backward == "derived" else None
        start = dict(kernel_init=init.normal(d**-0.5), step_init=step_init)
        sizes = (self.num_heads, self.head_dim, self.dtype, kernel)
        attention = Part("mssa", functools.partial(TiedMSSA, *sizes, **start), TiedMSSA.TAPS)
        if self.form == "self":
            Z_BxNxd = jnp.concatenate([Z_BxPxd, Q_BxYxd], axis=1)
            Z_BxNxd = self._layers("blocks", attention)(Z_BxNxd, None, Context())[0]
            Z_BxNxd = self._norm("norm")(Z_BxNxd)
            Z_BxPxd, Q_BxYxd = Z_BxNxd[:, :P], Z_BxNxd[:, P:]
        else:
            Z_BxPxd = self._layers("blocks", attention)(Z_BxPxd, None, Context())[0]
            Z_BxPxd = self._norm("norm")(Z_BxPxd)
            sizes = (self.num_heads, self.cross_head_dim, self.dtype, self.backward)
            attention = Part("mssa", functools.partial(TiedCrossMSSA, *sizes), TiedCrossMSSA.TAPS)
            cross = self._layers("cross_blocks", attention, norm="none")
            Q_BxYxd = cross(Q_BxYxd, None, Context(others=Z_BxPxd.astype(self.dtype)))[0]
            Q_BxYxd = self._norm("cross_norm")(Q_BxYxd)
        cosines_BxPxY = jnp.einsum("bnd,byd->bny", _unit_length(Z_BxPxd), _unit_length(Q_BxYxd))
        return self._norm("mask_norm")(cosines_BxPxY)

    def _layers(self, name: str, attention: Part, **fields: Any) -> nn.Module:
        """Layers of attention alone."""
        return stack(
            Block,
            self.depth,
            remat=self.remat,
            name=name,
            attention=attention,
            nonlinearity=None,
            dtype=self.dtype,
            backward=self.backward,
            **fields,
        )

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(jnp.float32, self.backward, name=name)


def _unit_length(X_xd: Array) -> Array:
    """Each token scaled to length one; a zero token stays zero, and its gradient is zero."""
    squares_x1 = jnp.square(X_xd).sum(axis=-1, keepdims=True)
    return jnp.where(
        squares_x1 > 0, X_xd * jax.lax.rsqrt(jnp.where(squares_x1 > 0, squares_x1, 1)), 0
    )
