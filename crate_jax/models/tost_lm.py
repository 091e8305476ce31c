"""ToST for text: causal TSSA, whose cache is running sums over the tokens so far."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init

from crate_jax.models.block import Part
from crate_jax.models.causal_tssa import CausalTSSA, PastSums, no_sums
from crate_jax.models.fields import TostLMFields
from crate_jax.models.language import LanguageModel
from crate_jax.models.layers import LayerNorm
from crate_jax.models.transformer import MLP, kernel_init


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
            self.dtype,
            context_length=self.context_length,
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
        """The initialiser of the last linear map of either half, as GPT-2's: N(0, 0.02²/(2L))."""
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
