"""CRATE, the classifier: alternating compression (MSSA) and sparsification (ISTA)."""

import functools
from typing import ClassVar

import flax.linen as nn

from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.fields import CrateFields
from crate_jax.models.layers import ISTA, MSSA
from crate_jax.models.transformer import MHSA, MLP


class Crate(CrateFields, ImageClassifier):
    """The CRATE image classifier.

    A layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})), without a residual
    (equation 18). Parameters start as the official code's do, in distribution.
    Source: arXiv 2306.01129. With ``attention="mhsa"`` or ``nonlinearity="mlp"`` a half of the
    layer is that of a ViT, the MLP with its residual: the four models of arXiv 2308.16271,
    section 4.3.

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
        dtype: of the computation, float32 or bfloat16.
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
        attention: "mssa" or "mhsa".
        nonlinearity: "ista" or "mlp".
    """

    mlp_ratio: ClassVar[int] = 4  # hidden units over the width, of an MLP in the place of ISTA

    @property
    def attention_part(self) -> Part:
        """MSSA, or multi-head self-attention."""
        if self.attention == "mhsa":
            make = functools.partial(MHSA, self.num_heads, self.subspace_dim, self.dtype)
            return Part("mhsa", make, MHSA.TAPS)
        make = functools.partial(MSSA, self.num_heads, self.subspace_dim, self.dtype, self.kernel)
        return Part("mssa", make, MSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """ISTA, or an MLP."""
        if self.nonlinearity == "mlp":
            return Part("mlp", functools.partial(MLP, self.mlp_ratio * self.width, self.dtype))
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))

    def block_fields(self) -> dict[str, bool]:
        """ISTA's output replaces the tokens, an MLP's is added to them."""
        return {"residual": self.nonlinearity == "mlp"}

    def embed(self) -> nn.Module:
        """Patches between two LayerNorms."""
        patch_size = pair(self.patch_size)
        return PatchEmbedding(patch_size, self.width, self.dtype, self.backward, name="embedding")
