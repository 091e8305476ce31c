"""CRATE, the classifier: alternating compression (MSSA) and sparsification (ISTA)."""

import functools
from typing import Any, ClassVar

import flax.linen as nn

from crate_jax.models.attentions import subspace_attention
from crate_jax.models.block import Context, Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.fields import CrateFields
from crate_jax.models.layers import ISTA, MSSA
from crate_jax.models.stem import ConvolutionalEmbedding, stage_sizes
from crate_jax.models.theory import IteratedISTA, StepSizes, TiedMSSA, learned_sizes
from crate_jax.models.transformer import MHSA, MLP


class Crate(CrateFields, ImageClassifier):
    """The CRATE image classifier.

    A layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})), without a residual
    (equation 18). Parameters start as the official code's do, in distribution.
    Source: arXiv 2306.01129. With ``attention="mhsa"`` or ``nonlinearity="mlp"`` a half of the
    layer is that of a ViT, the MLP with its residual: the four models of arXiv 2308.16271,
    section 4.3.
    With ``attention="cbsa"`` and ``stem="convolutions"`` it is the CBT of arXiv 2509.16875, which
    holds CBSA against TSSA and MSSA in the same frame. With ``nonlinearity="none"`` a layer is
    Z ← Z + MSSA(LN(Z)) alone, as in the attention-only transformer (AoT) of arXiv 2506.03790.

    Attributes:
        image_size: pixels, a side or (height, width).
        patch_size: pixels, a side or (height, width); divides image_size.
        num_classes: Y, the number of logits; 0: no head, and features (B, d) in their place.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K, the number of subspaces.
        head_dim: p, the dimension of a subspace; None: width / num_heads.
        pool: what the head reads: "cls", the class token, or "mean", the mean over all tokens, the
            class token included.
        in_channels: channels of the images.
        dropout: share of the entries dropped while training, of the embedded tokens and of the
            attention's output; needs a "dropout" key when it is not 0.
        dtype: the dtype of the computation, float32 or bfloat16.
        backward: "derived", the written backward passes of `crate_jax.models.attention` and
            `crate_jax.models.derivatives`; or "autodiff", slower and larger, which forward mode
            (`jax.jvp`) needs.
        attention_kernel: by whom MSSA is computed where the backward pass is derived, one of
            `crate_jax.models.attention.KERNELS`.
        remat: what the backward pass computes again: "none"; "dots", all but matrix products;
            "full".
        scan_unroll: layers per iteration of the compiled loop over layers; None: all of them where
            JAX's devices are GPUs and remat is "none", else one.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.
        attention: "mssa", "mhsa", "tssa" or "cbsa".
        nonlinearity: "ista", "mlp" or "none".
        attention_sign: of the attention's step, "plus", or "minus": Z^l − MSSA(LN(Z^l)), the
            CRATE-N of OpenReview CAC74VuMWX.
        tied_output: `crate_jax.models.theory.TiedMSSA` in the place of MSSA.
        threshold: of `crate_jax.models.theory.ista`, "relu" or "soft".
        ista_steps: of the same.
        step_sizes: "fixed": eta and lmbda are numbers; "shared": they start there and are learned,
            one of each for all layers; "per_layer": one of each for every layer.
        representatives: of CBSA, the cells that cut the grid of patches: a side, or (down, across).
        stem: "patches", cut out and mapped between two LayerNorms; or "convolutions",
            `crate_jax.models.stem.Stem`, whose running statistics are variables beside the
            parameters.
    """

    NORMED_PATCHES = True
    mlp_ratio: ClassVar[int] = 4  # hidden units over the width, of an MLP in the place of ISTA

    def check_fields(self) -> None:
        """Refuse switches of an operator that the model does not have, and a learned λ of 0."""
        if self.attention != "mssa" and self.tied_output:
            raise ValueError(
                f"model.tied_output must be False if model.attention is {self.attention}; got "
                "True. It is a switch of mssa."
            )
        if self.nonlinearity != "ista":
            for field, value in dict(threshold="relu", ista_steps=1, step_sizes="fixed").items():
                if (got := getattr(self, field)) != value:
                    raise ValueError(
                        f"model.{field} must be {value} if model.nonlinearity is "
                        f"{self.nonlinearity}; got {got}. It is a switch of ista."
                    )
        if self.step_sizes != "fixed" and not self.lmbda > 0:
            raise ValueError(
                f"model.lmbda must be > 0 if model.step_sizes is {self.step_sizes}, which "
                f"learns its logarithm; got {self.lmbda}. Set model.lmbda."
            )

    @property
    def attention_part(self) -> Part:
        """MSSA or another attention in subspaces, or multi-head self-attention."""
        if self.attention != "mhsa" and not self.tied_output:
            return subspace_attention(self)
        sizes = (self.num_heads, self.subspace_dim, self.dtype)
        if self.tied_output:
            return Part("mssa", functools.partial(TiedMSSA, *sizes, self.kernel), MSSA.TAPS)
        return Part("mhsa", functools.partial(MHSA, *sizes), MHSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part | None:
        """ISTA, an MLP, or nothing."""
        if self.nonlinearity == "none":
            return None
        if self.nonlinearity == "mlp":
            return Part("mlp", functools.partial(MLP, self.mlp_ratio * self.width, self.dtype))
        make = functools.partial(ISTA, self.eta, self.lmbda, self.dtype)
        if (self.threshold, self.ista_steps, self.step_sizes) != ("relu", 1, "fixed"):
            make = functools.partial(
                IteratedISTA,
                self.eta,
                self.lmbda,
                self.dtype,
                steps=self.ista_steps,
                soft=self.threshold == "soft",
                learned=self.step_sizes == "per_layer",
            )
        return Part("ista", make)

    def block_fields(self) -> dict[str, Any]:
        """The sign; ISTA's output replaces the tokens, an MLP's is added to them."""
        sign = -1 if self.attention_sign == "minus" else 1
        return {"residual": self.nonlinearity == "mlp", "sign": sign}

    def shared_context(self) -> Context:
        """η and λ, where all layers share learned ones."""
        if self.step_sizes != "shared":
            return Context()
        return Context(step_sizes=learned_sizes(self, StepSizes(self.eta, self.lmbda)))

    def embed(self, train: bool) -> nn.Module:
        """Patches between two LayerNorms, or convolutions."""
        patch_size = pair(self.patch_size)
        if self.stem == "convolutions":
            return ConvolutionalEmbedding(
                patch_size, self.width, train, self.dtype, name="embedding"
            )
        return PatchEmbedding(patch_size, self.width, self.dtype, self.backward, name="embedding")

    @property
    def stages(self) -> list[tuple[int, int]]:
        """`stage_sizes` of a convolutional stem; [] of patches."""
        if self.stem == "patches":
            return []
        return stage_sizes(self.input_shape, pair(self.patch_size), self.width)
