"""The ViT baseline, in the block of the family: MHSA and an MLP, both with residuals."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init

from crate_jax import placement
from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.models.fields import VitFields
from crate_jax.models.layers import Linear
from crate_jax.models.parameters import parameter
from crate_jax.models.transformer import MHSA, MLP, kernel_init


class ViT(VitFields, ImageClassifier):
    """The Vision Transformer, as timm builds it and as CRATE's repository trains it.

    A layer: Z ← Z + MHSA(LN(Z)), then Z ← Z + MLP(LN(Z)). Patches are embedded by a convolution.
    Registers, LayerScale and stochastic depth are those of DINOv2: a register has no position.
    Source: arXiv 2010.11929, section 3.1; timm's initialisation; arXiv 2304.07193 and 2309.16588.
    Differs from official: DINOv2 leaves a fixed number of examples of a batch out of each half
        where drop_path is above 0.1; here each example is drawn on its own, as in DINO.

    Attributes: as `crate_jax.Crate`, and
        pool: what the head reads: "cls", the class token; "patches", the mean of the other tokens;
            "patches_twice", that mean through the same LayerNorm twice, as the baseline of CRATE's
            repository computes it.
        mlp_ratio: hidden units of the MLP over the width.
        registers: how many stand between the class token and the patches.
        layer_scale: what the factors on both halves start from; None: there are none.
        drop_path: rate of stochastic depth of the last layer; it grows linearly from 0 at the
            first. It needs a "dropout" key.
        drop_path_uniform: whether every layer has that rate.
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

    def block_fields(self) -> dict[str, bool | float | None]:
        """The MLP's output is added; both halves may have LayerScale."""
        return {"residual": True, "layer_scale": self.layer_scale}

    def drop_path_rates(self) -> Array | None:
        """From 0 at the first layer to ``drop_path`` at the last, or the same for all."""
        if not self.drop_path:
            return None
        first = self.drop_path if self.drop_path_uniform else 0.0
        return jnp.linspace(first, self.drop_path, self.depth, dtype=jnp.float32)

    @property
    def first_patch(self) -> int:
        """Behind the class token and the registers."""
        return 1 + self.registers

    def run_blocks(self, Z_BxNxd: Array, **options: Any) -> tuple[Array, dict[str, Array]]:
        """With the registers behind the class token."""
        if self.registers:
            shape = (self.registers, self.width)
            registers_Rxd = parameter(self, "register_tokens", init.normal(1e-6), shape)
            shape = (Z_BxNxd.shape[0], *shape)
            registers_BxRxd = jnp.broadcast_to(registers_Rxd.astype(Z_BxNxd.dtype), shape)
            registers_BxRxd = placement.beside(registers_BxRxd, Z_BxNxd)
            Z_BxNxd = jnp.concatenate([Z_BxNxd[:, :1], registers_BxRxd, Z_BxNxd[:, 1:]], axis=1)
        return super().run_blocks(Z_BxNxd, **options)

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
        pooled_Bxd = (
            Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd[:, self.first_patch :].mean(axis=1)
        )
        pooled_Bxd = norm(pooled_Bxd)
        return norm(pooled_Bxd) if self.pool == "patches_twice" else pooled_Bxd

    def make_head(self) -> nn.Module:
        """Weights from N(0, 0.02²), a bias of zero."""
        return Linear(self.num_classes, jnp.float32, kernel_init, bias_init=init.zeros, name="head")
