"""ToST for text: causal TSSA, whose sums over the tokens so far are all that it keeps of them."""

import functools
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Part
from crate_jax.models.fields import TostLMFields
from crate_jax.models.language import LanguageModel
from crate_jax.models.layers import Attended, LayerNorm
from crate_jax.models.parameters import parameter
from crate_jax.models.past import PAST
from crate_jax.models.transformer import MLP, kernel_init
from crate_jax.models.tssa import (
    Sums,
    attend_by_past_statistics,
    into_subspaces,
    no_sums,
    out_of_subspaces,
    read_weights,
)


class PastSums(NamedTuple):
    """What causal TSSA keeps of the tokens so far, however many there are.

    Attributes:
        sums: over them.
        length: how many there are, int32.
    """

    sums: Sums
    length: Array


class CausalTSSA(nn.Module):
    """TSSA in which a token sees itself and the tokens before it alone.

    The parameters are those of `crate_jax.models.tssa.TSSA`, and b_place (K, T), which starts at
    zero: the bias of each of the T places and of each subspace in the membership. The equations are
    those of `crate_jax.models.tssa.attend_by_past_statistics`.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("subspace_tokens", "membership")

    num_heads: int
    head_dim: int
    context_length: int
    dtype: DTypeLike = jnp.float32
    subspace_bias: bool = False
    bias: bool = True
    kernel_init: Callable[..., Array] | None = None  # None: nn.Linear's
    out_init: Callable[..., Array] | None = None  # of W_out; None: kernel_init
    bias_init: Callable[..., Array] | None = None  # None: nn.Linear's

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update and all taps.

        Raises:
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError("mask must be None for causal TSSA; got one. It has the order alone.")
        Y_BxNxd, N = Y_BxNxd.astype(self.dtype), Y_BxNxd.shape[1]
        weights = read_weights(self, Y_BxNxd.shape[-1])
        b_KxT = parameter(self, "b_place", init.zeros, (self.num_heads, self.context_length))
        past = self.get_variable(PAST, "sums")
        sums, length = past or PastSums(
            no_sums(len(Y_BxNxd), self.num_heads, self.head_dim, self.dtype), jnp.int32(0)
        )
        b_NxK = jax.lax.dynamic_slice_in_dim(b_KxT, length, N, axis=1).T
        V_BxNxKxp = into_subspaces(Y_BxNxd, weights.U_dxKxp, weights.b_Kxp)
        O_BxNxKxp, Pi_BxNxK, sums = attend_by_past_statistics(V_BxNxKxp, weights.tau_K, b_NxK, sums)
        if past is not None:
            self.put_variable(PAST, "sums", PastSums(sums, length + N))
        seen = {"subspace_tokens": V_BxNxKxp, "membership": Pi_BxNxK.swapaxes(1, 2)}
        update_BxNxd = out_of_subspaces(O_BxNxKxp, weights.W_out_Kxpxd, weights.b_out_d)
        return Attended(update_BxNxd, seen)


class TostLM(TostLMFields, LanguageModel):
    """ToST as a model of language.

    A layer: Z ← Z + g₁ · TSSA(LN(Z)), then Z ← Z + g₂ · MLP(LN(Z)), with causal TSSA. A LayerNorm
    comes before the head. The time and the memory of a layer grow linearly with the text, and what
    generation keeps of a text does not grow at all.
    Source: arXiv 2412.17810 and its code; parameters start as there, in distribution.
    Differs from official: dropout acts on TSSA's output, and not on its statistics too, nor on the
        MLP's output.

    Attributes: as `crate_jax.CrateCausal`, but for those of ISTA and of kernels, and
        bias: whether linear maps and LayerNorms have biases.
        layer_scale: what the factors on both halves start from.
        mlp_ratio: hidden units of the MLP over the width.
    """

    @property
    def attention_part(self) -> Part:
        """Causal TSSA."""
        make = functools.partial(
            CausalTSSA,
            self.num_heads,
            self.subspace_dim,
            self.context_length,
            self.dtype,
            subspace_bias=self.bias,
            bias=self.bias,
            kernel_init=kernel_init,
            out_init=self.out_init,
            bias_init=init.zeros,
        )
        return Part("tssa", make, CausalTSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """An MLP."""
        hidden = self.mlp_ratio * self.width
        make = functools.partial(MLP, hidden, self.dtype, self.bias, self.out_init)
        return Part("mlp", make)

    @property
    def out_init(self) -> Callable[..., Array]:
        """Of the last linear map of either half, as GPT-2's: N(0, 0.02²/(2L))."""
        return init.normal(0.02 * (2 * self.depth) ** -0.5)

    def block_fields(self) -> dict[str, Any]:
        """Both halves are added, times their factors."""
        norm = "affine" if self.bias else "scaled"
        return {"residual": True, "layer_scale": self.layer_scale, "norm": norm}

    def mask(self, tokens_BxN: Array, before: Array | int, length: int) -> None:
        """None: causal TSSA knows the order of the tokens by itself."""
        del tokens_BxN, before, length

    def make_head_norm(self) -> nn.Module:
        """The LayerNorm before the head."""
        how = (self.dtype, self.backward, self.EPSILON)
        return LayerNorm(*how, bias=self.bias, name="head_norm")

    def layer_past(self, batch_size: int) -> dict[str, Any]:
        """Running sums."""
        sums = no_sums(batch_size, self.num_heads, self.subspace_dim, self.dtype)
        return {"sums": PastSums(sums, jnp.int32(0))}
