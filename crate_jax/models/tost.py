"""ToST, the token statistics transformer: a ViT whose attention is TSSA, in the frame of XCiT."""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init

from crate_jax.models.attentions import subspace_attention
from crate_jax.models.block import Context, Part, stack
from crate_jax.models.class_attention import ClassBlock, ClassCost, class_cost
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import hide, prepend
from crate_jax.models.fields import TostFields
from crate_jax.models.layers import Linear
from crate_jax.models.parameters import parameter
from crate_jax.models.stem import Stem, StemFields, stage_sizes
from crate_jax.models.transformer import MLP, kernel_init

BANDS = 32  # waves a side, of the positions


def fourier_positions(grid: tuple[int, int]) -> np.ndarray:
    """Encode the places of the cells of a grid as waves: P rows of 2 · `BANDS` values, float32.

    Row i of R is at y = 2π i/R, i counted from 1, and columns likewise. Value j of y is sin(y/t_j)
    for even j and cos(y/t_j) for odd j, with t_j = 10⁴ to the power of 2⌊j/2⌋/`BANDS`. The values
    of y come first.
    Source: XCiT's positions, which arXiv 2412.17810 takes.
    """
    periods = 10_000 ** (2 * (np.arange(BANDS) // 2) / BANDS)
    of_side = []
    for n in grid:
        angles = 2 * np.pi * np.arange(1, n + 1) / (n + 1e-6)
        waves = angles[:, None] / periods
        even = np.arange(BANDS) % 2 == 0
        of_side.append(np.where(even, np.sin(waves), np.cos(waves)))
    shape = (*grid, BANDS)
    both = [np.broadcast_to(of_side[0][:, None], shape), np.broadcast_to(of_side[1][None], shape)]
    return np.concatenate(both, axis=-1).reshape(math.prod(grid), 2 * BANDS).astype(np.float32)


class FourierEmbedding(StemFields, nn.Module):
    """`Stem` → positions added, a learned linear map of `fourier_positions`. No class token yet."""

    @nn.compact
    def __call__(self, images_BxHxWxc: Array, hidden: tuple[Array, Array] | None = None) -> Array:
        """Images (B, H, W, c) to tokens (B, P, d), some of them hidden by `hide`."""
        (_, H, W, _), (h, w) = images_BxHxWxc.shape, self.patch_size
        stem = Stem(self.patch_size, self.width, self.train, self.dtype, name="stem")
        Z_BxPxd = hide(stem(images_BxHxWxc), hidden)
        waves_Pxk = jnp.asarray(fourier_positions((H // h, W // w)))
        pos_Pxd = Linear(self.width, name="positions")(waves_Pxk)  # once for all images
        return Z_BxPxd + pos_Pxd.astype(self.dtype)[None]


class ToST(TostFields, ImageClassifier):
    """The ToST image classifier.

    A layer: Z ← Z + g₁ · TSSA(LN(Z)), then Z ← Z + g₂ · MLP(LN(Z)), on patches alone. After the
    layers a class token joins, and looks at them in blocks of class attention. A convolutional stem
    embeds the patches, and its running statistics are variables beside the parameters.
    Source: arXiv 2412.17810 and its code. Parameters start as there, in distribution.
    Differs from official: in training mode too a call returns its logits once.

    Attributes: as `crate_jax.Crate`, and
        attention: "tssa"; or "mssa" or "cbsa" in its place.
        mlp_ratio: hidden units of the MLPs over the width.
        layer_scale: what the factors on both halves of every block start from.
        class_layers: blocks of class attention.
        tokens_norm: of `crate_jax.models.class_attention.ClassBlock`.
        drop_path: rate of stochastic depth of every layer; it needs a "dropout" key.
    """

    EPSILON = 1e-6

    @property
    def attention_part(self) -> Part:
        """TSSA with biases, or another attention in subspaces."""
        return subspace_attention(
            self, subspace_bias=True, kernel_init=kernel_init, bias_init=init.zeros
        )

    @property
    def nonlinearity_part(self) -> Part:
        """An MLP."""
        return Part("mlp", functools.partial(MLP, self.mlp_ratio * self.width, self.dtype))

    def block_fields(self) -> dict[str, bool | float]:
        """The MLP's output is added; both halves have LayerScale."""
        return {"residual": True, "layer_scale": self.layer_scale}

    def drop_path_rates(self) -> Array | None:
        """The same for every layer."""
        return jnp.full(self.depth, self.drop_path, jnp.float32) if self.drop_path else None

    def embed(self, train: bool) -> nn.Module:
        """A convolutional stem, and Fourier positions."""
        patch_size = pair(self.patch_size)
        return FourierEmbedding(patch_size, self.width, train, self.dtype, name="embedding")

    @property
    def first_patch(self) -> int:
        """The patches are all tokens; the class token joins after the layers."""
        return 0

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The stages of the stem."""
        return stage_sizes(self.input_shape, pair(self.patch_size), self.width)

    @property
    def class_block(self) -> ClassCost:
        """The cost of a block of class attention."""
        inner = self.num_heads * self.subspace_dim
        return class_cost(self.num_patches + 1, self.width, inner, self.mlp_ratio * self.width)

    @property
    def head_products(self) -> int:
        """Multiply-adds of class attention and of the linear map to the logits."""
        return self.class_layers * self.class_block.products + super().head_products

    @property
    def head_again(self) -> int:
        """Multiply-adds of class attention that the backward pass computes again."""
        return self.class_layers * self.class_block.again[self.remat]

    @property
    def kept_outside(self) -> int:
        """The values that the stem and class attention save."""
        return super().kept_outside + self.class_layers * self.class_block.kept[self.remat]

    def pooled(self, Z_BxNxd: Array) -> Array:
        """The class token after class attention, normalised."""
        cls_d = parameter(self, "cls_token", kernel_init, (self.width,))
        blocks = stack(
            ClassBlock,
            self.class_layers,
            remat=self.remat,
            name="class_blocks",
            num_heads=self.num_heads,
            head_dim=self.subspace_dim,
            hidden=self.mlp_ratio * self.width,
            layer_scale=self.layer_scale,
            tokens_norm=self.tokens_norm,
            dtype=self.dtype,
            backward=self.backward,
            epsilon=self.EPSILON,
        )
        Z_BxNxd, _ = blocks(prepend(cls_d, Z_BxNxd), None, Context())
        return super().pooled(Z_BxNxd)

    def make_head(self) -> nn.Module:
        """Weights from N(0, 0.02²), a bias of zero."""
        return Linear(self.num_classes, jnp.float32, kernel_init, bias_init=init.zeros, name="head")
