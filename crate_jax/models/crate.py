"""CRATE, the classifier: alternating compression (MSSA) and sparsification (ISTA)."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.layers import ISTA, MSSA


class Crate(ImageClassifier):
    """The CRATE image classifier.

    A layer: Z^{l+1/2} = Z^l + MSSA(LN(Z^l)), then Z^{l+1} = ISTA(LN(Z^{l+1/2})), without a residual
    (equation 18). Parameters start as the official code's do, in distribution.
    Source: arXiv 2306.01129.

    Attributes:
        image_size: pixels, a side or (height, width).
        patch_size: pixels, a side or (height, width); divides image_size.
        num_classes: Y, the number of logits.
        width: d, the length of a token.
        depth: L, the number of layers.
        num_heads: K, the number of subspaces.
        head_dim: p, the dimension of a subspace; None: width / num_heads.
        pool: what the head reads: "cls", the class token, or "mean", the mean over all tokens, the
            class token included.
        in_channels: channels of the images.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.
        dropout: share of the entries dropped while training, of the embedded tokens and of MSSA's
            output; needs a "dropout" key when it is not 0.
        dtype: of the computation, float32 or bfloat16.
        backward: "derived", the written backward passes of `crate_jax.models.derivatives`; or
            "autodiff", slower and larger, which forward mode (`jax.jvp`) needs.
        remat: what the backward pass computes again: "none"; "dots", all but matrix products;
            "full".
        scan_unroll: layers per iteration of the compiled loop over layers.
    """

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    num_classes: int
    width: int
    depth: int
    num_heads: int
    head_dim: int | None = None
    pool: str = "cls"
    in_channels: int = 3
    eta: float = 0.1
    lmbda: float = 0.1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"
    remat: str = "none"
    scan_unroll: int = 1

    @property
    def attention_part(self) -> Part:
        """MSSA."""
        make = functools.partial(
            MSSA, self.num_heads, self.subspace_dim, self.dtype, self.backward
        )
        return Part("mssa", make, ("subspace_tokens", "attention"))

    @property
    def nonlinearity_part(self) -> Part:
        """ISTA."""
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))

    def embed(self) -> nn.Module:
        """Patches between two LayerNorms."""
        patch_size = pair(self.patch_size)
        return PatchEmbedding(
            patch_size, self.width, self.dtype, self.backward, name="embedding"
        )
