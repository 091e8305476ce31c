"""What the image classifiers of the family share: images → tokens → blocks → one token → logits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from crate_jax.models.block import Block, Context, Dropout, Part, stack, tap_names
from crate_jax.models.layers import LayerNorm, Linear
from crate_jax.models.variants import ImageFields
from crate_jax.options import option_of

Params = Mapping[str, Any]  # the parameters of a model: arrays, or their shapes, in nested dicts


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as a side or as (height, width)."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    return (sides[0], sides[-1])


class ImageClassifier(ImageFields, nn.Module):
    """A stack of blocks between an embedding and a head; a model says which.

    A model is a subclass with the fields of its family (`crate_jax.models.variants`) that gives
    `attention_part`, `nonlinearity_part` and `embed`, and overrides what differs of `block_fields`,
    `drop_path_rates`, `pooled` and `head`. Parameters are float32; the computation is in ``dtype``,
    with norms, softmax and logits in float32. Layers are stacked on axis 0 of every leaf under
    ``blocks``.
    """

    EPSILON: ClassVar[float] = 1e-5  # of the LayerNorms of blocks and head

    @property
    def attention_part(self) -> Part:
        """The first half of a block."""
        raise TypeError("a model must say what its attention is")

    @property
    def nonlinearity_part(self) -> Part | None:
        """The second half of a block."""
        raise TypeError("a model must say what its nonlinearity is")

    def embed(self) -> nn.Module:
        """From images (B, H, W, c) to tokens (B, N, d); to be made in a compact method."""
        raise TypeError("a model must say how it embeds images")

    def block_fields(self) -> dict[str, Any]:
        """Fields of `Block` that are not its defaults."""
        return {}

    def drop_path_rates(self) -> Array | None:
        """The rate of stochastic depth of every layer (L,); None: no half is ever skipped."""
        return None

    def pooled(self, Z_BxNxd: Array) -> Array:
        """What the head reads, (B, d) float32, normalised by ``head_norm``."""
        pooled_Bxd = Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd.mean(axis=1)
        return self.head_norm()(pooled_Bxd)

    def head_norm(self) -> nn.Module:
        """The LayerNorm before the head."""
        return LayerNorm(jnp.float32, self.backward, self.EPSILON, name="head_norm")

    def head(self) -> nn.Module:
        """From a normalised token (B, d) to logits (B, Y)."""
        return Linear(self.num_classes, name="head")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, c) of an image."""
        return (*pair(self.image_size), self.in_channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        (H, W), (h, w) = pair(self.image_size), pair(self.patch_size)
        return H // h, W // w

    @property
    def num_tokens(self) -> int:
        """N: patches and the class token."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def subspace_dim(self) -> int:
        """p, the dimension of a subspace.

        Raises:
            ValueError: head_dim is not set and width is not a multiple of num_heads.
        """
        if self.head_dim is not None:
            return self.head_dim
        if self.width % self.num_heads:
            raise ValueError(
                "model.width must be a multiple of model.num_heads when model.head_dim is not set; "
                f"got {self.width} and {self.num_heads}. Set model.head_dim."
            )
        return self.width // self.num_heads

    @property
    def tap_names(self) -> tuple[str, ...]:
        """What `forward` can return of its layers, in the order of computation."""
        return tap_names(self.attention_part, self.nonlinearity_part)

    def __call__(self, images_BxHxWxc: Array, *, train: bool) -> Array:
        """Classify images.

        Args:
            images_BxHxWxc: normalised images of the model's `input_shape`, any float dtype.
            train: whether dropout and stochastic depth act; they need a "dropout" key.

        Returns:
            Logits (B, Y), float32.

        Raises:
            ValueError: a field or the images break a rule.
        """
        return self.forward(images_BxHxWxc, train=train)[0]

    @nn.compact
    def forward(
        self, images_BxHxWxc: Array, *, train: bool, taps: Sequence[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """Classify images, and return what the layers computed on the way.

        Args:
            images_BxHxWxc: as for a call.
            train: likewise.
            taps: names out of `tap_names`; each costs the memory of its array for every layer.

        Returns:
            Logits (B, Y), float32, and {name: array} with the layers on axis 0:
            ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), others (L, B, N, d).

        Raises:
            ValueError: a field or the images break a rule.
            KeyError: an unknown tap.
        """
        self._check(images_BxHxWxc, taps)
        Z_BxNxd = self.embed()(images_BxHxWxc)
        Z_BxNxd = Dropout(self.dropout, train)(Z_BxNxd)
        blocks = stack(
            Block,
            self.depth,
            remat=self.remat,
            unroll=self.scan_unroll,
            attention=self.attention_part,
            nonlinearity=self.nonlinearity_part,
            dtype=self.dtype,
            backward=self.backward,
            epsilon=self.EPSILON,
            dropout=self.dropout,
            train=train,
            taps=tuple(taps),
            **self.block_fields(),
        )
        Z_BxNxd, seen = blocks(Z_BxNxd, self.drop_path_rates(), Context())
        return self.head()(self.pooled(Z_BxNxd)), seen

    def _check(self, images_BxHxWxc: Array, taps: Sequence[str]) -> None:
        """Every rule that a later shape error would state less clearly."""
        for field in dataclasses.fields(self):
            choices = option_of(field).choices if "option" in field.metadata else ()
            value = getattr(self, field.name)
            if choices and isinstance(value, str) and value not in choices:
                raise ValueError(
                    f"model.{field.name} must be one of {', '.join(choices)}; got {value}."
                )
        if images_BxHxWxc.ndim != 4 or images_BxHxWxc.shape[1:] != self.input_shape:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, self.input_shape))}) for this model; got "
                f"{images_BxHxWxc.shape}. Resize them, or set image_size and in_channels."
            )
        for name in taps:
            if name not in self.tap_names:
                raise KeyError(f"taps must be among {', '.join(self.tap_names)}; got {name}.")
