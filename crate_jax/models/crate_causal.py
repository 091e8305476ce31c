"""Causal CRATE and CRATE-LM: CRATE as models of language, with ISTA and with a wide dictionary."""

import functools
from typing import ClassVar

import flax.linen as nn
from jax.nn import initializers as init

from crate_jax.models.block import Part
from crate_jax.models.crate_alpha import OvercompleteISTA
from crate_jax.models.fields import CausalFields, CrateLMFields
from crate_jax.models.language import LanguageModel
from crate_jax.models.layers import ISTA, MSSA, LayerNorm


def causal_mssa(model: "CrateCausal | CrateLM") -> Part:
    """MSSA, which starts as GPT-2's attention: W_out from N(0, 0.02²/(2L)), no bias."""
    make = functools.partial(
        MSSA,
        model.num_heads,
        model.subspace_dim,
        model.dtype,
        model.kernel,
        kernel_init=init.normal(0.02),
        out_init=init.normal(0.02 * (2 * model.depth) ** -0.5),
        bias_init=init.zeros,
    )
    return Part("mssa", make, MSSA.TAPS)


class CrateCausal(CausalFields, LanguageModel):
    """CRATE as a model of language.

    A layer is CRATE's, but a token sees itself and what comes before it: Z^{l+1/2} = Z^l +
    MSSA(LN(Z^l)), Z^{l+1} = ISTA(LN(Z^{l+1/2})). The logits are the products of the last layer's
    tokens, which are sparse and not negative, with the table of token embeddings. There is no last
    LayerNorm. Parameters start as the official code's do, in distribution.
    Source: arXiv 2311.13110, and pull request 13 of its code. With ``nonlinearity="none"`` a layer
    is Z ← Z + MSSA(LN(Z)) alone, as in the attention-only transformer (AoT) of arXiv 2506.03790,
    which has no official code.
    Differs from official: dropout acts on MSSA's output, and not on its attention too.

    Attributes:
        context_length: T, the most tokens that it sees at once.
        vocab_size: V, how many tokens there are.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K, the number of subspaces.
        head_dim: p, the dimension of a subspace; None: width / num_heads.
        dropout: share of the entries dropped while training, of the embedded tokens and of MSSA's
            output; needs a "dropout" key when it is not 0.
        tied: whether the head reads with the table of token embeddings, or has a matrix of its own.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.
        nonlinearity: "ista" or "none".
        dtype, backward, attention_kernel, remat, scan_unroll: see `crate_jax.Crate`. No kernel
            knows a mask, so that "auto" takes XLA's program and a kernel by name is refused.
    """

    @property
    def attention_part(self) -> Part:
        """MSSA."""
        return causal_mssa(self)

    @property
    def nonlinearity_part(self) -> Part | None:
        """ISTA, or nothing."""
        if self.nonlinearity == "none":
            return None
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))


class CrateLM(CrateLMFields, LanguageModel):
    """CRATE-LM: causal CRATE with a sparse code in an overcomplete dictionary.

    A layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ODL(LN(Z^{l+1/2})), the ODL of CRATE-α
    with one dictionary for both of its ends, D₁ = D, and without a residual. A LayerNorm comes
    before the head. The entries of the code are the units that its authors interpret;
    `crate_jax.models.steering` sets one of them.
    Source: arXiv 2410.16443 and its code; parameters start as there, in distribution.
    Differs from official: as `CrateCausal`.

    Attributes: as `CrateCausal`, but for nonlinearity, and
        overcompleteness: atoms of the dictionary over the width.
    """

    decoupled: ClassVar[bool] = False  # the code is read with the dictionary that makes it

    @property
    def attention_part(self) -> Part:
        """MSSA."""
        return causal_mssa(self)

    @property
    def nonlinearity_part(self) -> Part:
        """ODL with one dictionary."""
        atoms = self.overcompleteness * self.width
        make = functools.partial(
            OvercompleteISTA, self.eta, self.lmbda, atoms, self.decoupled, self.dtype
        )
        return Part("odl", make, OvercompleteISTA.TAPS)

    def make_head_norm(self) -> nn.Module:
        """The LayerNorm before the head."""
        return LayerNorm(self.dtype, self.backward, self.EPSILON, name="head_norm")
