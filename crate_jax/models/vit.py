"""The ViT baseline, in the block of the family: MHSA and an MLP, both with residuals."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init

from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.fields import VitFields
from crate_jax.models.layers import Linear
from crate_jax.models.transformer import MHSA, MLP, kernel_init


class ViT(VitFields, ImageClassifier):
    """The Vision Transformer, as timm builds it and as CRATE's repository trains it.

    A layer: Z ← Z + MHSA(LN(Z)), then Z ← Z + MLP(LN(Z)). Patches are embedded by a convolution.
    Source: arXiv 2010.11929, section 3.1; timm's initialisation.

    Attributes: as `crate_jax.Crate`, and
        pool: what the head reads: "cls", the class token; "patches", the mean of the other tokens;
            "patches_twice", that mean through the same LayerNorm twice, as the baseline of CRATE's
            repository computes it.
        mlp_ratio: hidden units of the MLP over the width.
    """

    EPSILON = 1e-6

    @property
    def attention_part(self) -> Part:
        """Multi-head self-attention with biases."""
        make = functools.partial(MHSA, self.num_heads, self.subspace_dim, self.dtype, qkv_bias=True)
        return Part("mhsa", make, MHSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """An MLP."""
        return Part("mlp", functools.partial(MLP, self.mlp_ratio * self.width, self.dtype))

    def block_fields(self) -> dict[str, bool]:
        """The MLP's output is added."""
        return {"residual": True}

    def embed(self, train: bool) -> nn.Module:
        """A convolution of stride h, w, which starts as PyTorch's."""
        del train
        return PatchEmbedding(
            pair(self.patch_size),
            self.width,
            self.dtype,
            self.backward,
            norms=False,
            cls_init=init.normal(1e-6),
            pos_init=kernel_init,
            name="embedding",
        )

    def pooled(self, Z_BxNxd: Array) -> Array:
        """The class token or the mean of the patches, normalised."""
        norm = self.make_head_norm()
        pooled_Bxd = Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd[:, 1:].mean(axis=1)
        pooled_Bxd = norm(pooled_Bxd)
        return norm(pooled_Bxd) if self.pool == "patches_twice" else pooled_Bxd

    def make_head(self) -> nn.Module:
        """Weights from N(0, 0.02²), a bias of zero."""
        return Linear(self.num_classes, jnp.float32, kernel_init, bias_init=init.zeros, name="head")
