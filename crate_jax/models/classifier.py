"""The frame of the family's image classifiers: images → tokens → blocks → one token → logits."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from crate_jax.models.fields import ImageFields
from crate_jax.models.images import check_images
from crate_jax.models.intermediates import arranged, check_format, chosen_layers
from crate_jax.models.layers import LayerNorm, Linear
from crate_jax.models.stacked import BlockModel


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as a side or as (height, width)."""
    sides = tuple(size) if isinstance(size, Sequence) else (size,)
    return (int(sides[0]), int(sides[-1]))


def of_images(model: object) -> "ImageClassifier":
    """Check that a model classifies images, and return it.

    Raises:
        ValueError: it does not.
    """
    if isinstance(model, ImageClassifier):
        return model
    raise ValueError(
        f"model must classify images here; got a {type(model).__name__}, of text. Choose a "
        "model of images, or the task next_token."
    )


class ImageClassifier(ImageFields, BlockModel):
    """A stack of blocks between an embedding and a head; each model names its blocks.

    A model is a `BlockModel` that also gives `embed`, and overrides what differs of `pooled`,
    `make_head_norm` and `make_head`. A model of ``num_classes=0`` has no head: its logits are what
    a head would read.
    """

    OPTIONAL: ClassVar[Mapping[str, tuple[str, ...]]] = {"num_classes": ("head",)}
    NORMED_PATCHES: ClassVar[bool] = False  # whether a LayerNorm stands before their linear map

    @nn.nowrap
    def embed(self, train: bool) -> nn.Module:
        """From images (B, H, W, c) to tokens (B, N, d); to be made in a compact method.

        Args:
            train: whether statistics are those of the batch, for an embedding that has any.
        """
        raise TypeError("a model must say how it embeds images")

    @nn.nowrap
    def pooled(self, Z_BxNxd: Array) -> Array:
        """The input of the head, (B, d) float32, normalised by ``head_norm``."""
        pooled_Bxd = Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd.mean(axis=1)
        return self.make_head_norm()(pooled_Bxd)

    @nn.nowrap
    def make_head_norm(self) -> nn.Module:
        """The LayerNorm before the head."""
        return LayerNorm(jnp.float32, self.backward, self.EPSILON, name="head_norm")

    @nn.nowrap
    def make_head(self) -> nn.Module:
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
    def num_patches(self) -> int:
        """P: the cells of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def first_patch(self) -> int:
        """The place of the first patch among the tokens; the class token comes before it."""
        return 1

    @property
    def num_tokens(self) -> int:
        """N: the patches and the tokens before them."""
        return self.first_patch + self.num_patches

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The convolutional stem as `crate_jax.models.stem.stage_sizes`; [] of another kind."""
        return []

    @property
    def embedding_products(self) -> int:
        """Multiply-adds of the linear map of the patches, or of the convolutions."""
        h, w = pair(self.patch_size)
        one_map = self.num_patches * h * w * self.in_channels * self.width
        return sum(products for _, products in self.stages) or one_map

    @property
    def first_products(self) -> int:
        """The first convolution, or the linear map of patches without a LayerNorm before it."""
        if self.stages:
            return self.stages[0][1]
        return 0 if self.NORMED_PATCHES else self.embedding_products

    @property
    def kept_outside(self) -> int:
        """The values of the convolutions."""
        return sum(values for values, _ in self.stages)

    @property
    def head_products(self) -> int:
        """Multiply-adds of the linear map to the logits."""
        return self.width * self.num_classes

    @nn.nowrap
    def sample_input(self) -> Array:
        """One blank image of the size the model takes, (1, H, W, c) float32."""
        return jnp.zeros((1, *self.input_shape), jnp.float32)

    def __call__(self, images_BxHxWxc: Array, *, train: bool) -> Array:
        """Classify images.

        Args:
            images_BxHxWxc: normalised images of the model's `input_shape`, any float dtype.
            train: whether dropout and stochastic depth act, and statistics are those of the batch.
                The first two need a "dropout" key.

        Returns:
            Logits (B, Y), float32; of a model without a head the features (B, d) of `forward_head`.

        Raises:
            ValueError: a field or the images break a rule.
        """
        return self.forward(images_BxHxWxc, train=train)[0]

    def forward(
        self, images_BxHxWxc: Array, *, train: bool, taps: str | Iterable[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """Classify images, and return the taps of the layers.

        Args:
            images_BxHxWxc: as for a call.
            train: as for a call.
            taps: names out of `tap_names`, or one; each costs the memory of its array for every
                layer.

        Returns:
            Logits as of a call, and {name: array} with the layers on axis 0:
            ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), others (L, B, N, d).

        Raises:
            ValueError: a field or the images break a rule.
            KeyError: an unknown tap.
        """

        def compute() -> tuple[Array, dict[str, Array]]:
            Z_BxNxd, seen = self._tokens(images_BxHxWxc, train, taps)
            return self._read(Z_BxNxd, pre_logits=False), seen

        return self.with_layers(compute)

    def forward_features(
        self, images_BxHxWxc: Array, *, train: bool, hidden: tuple[Array, Array] | None = None
    ) -> Array:
        """The tokens after the last block; no norm follows in the blocks.

        The last LayerNorm belongs to the head and acts on the one token that `forward_head` reads.
        timm's method of this name has normalised every token of a ViT by it: with ``pool`` cls its
        class token is what ``forward_head(tokens, pre_logits=True)`` returns.

        Args:
            images_BxHxWxc: as for a call.
            train: as for a call.
            hidden: which patches are hidden (B, P), and the token (d,) that stands in their place,
                at their positions; None: no patch is.

        Returns:
            Tokens (B, N, d) in the model's dtype, the class token first. A ToST has patches alone:
            its class token joins after the layers, in `forward_head`.

        Raises:
            ValueError: a field or the images break a rule.
        """
        return self.with_layers(lambda: self._tokens(images_BxHxWxc, train, (), hidden)[0])

    def forward_head(self, Z_BxNxd: Array, *, pre_logits: bool = False) -> Array:
        """Compute the result of a call from the tokens of `forward_features`.

        Args:
            Z_BxNxd: tokens of the last block.
            pre_logits: stop before the head.

        Returns:
            Logits (B, Y), float32. With ``pre_logits``, and of a model without a head, the features
            that a head reads: the pooled token, normalised, (B, d) float32.

        Raises:
            ValueError: a field breaks a rule, or these are no tokens of the model.
        """
        if Z_BxNxd.ndim != 3 or Z_BxNxd.shape[-1] != self.width:
            raise ValueError(
                f"tokens must be (B, N, {self.width}) for this model; got {Z_BxNxd.shape}. "
                "Take those of forward_features."
            )
        return self.with_layers(lambda: self._read(Z_BxNxd, pre_logits))

    def forward_norm(self, Z_BxNxd: Array) -> Array:
        """Tokens of `forward_features`, each normalised by the LayerNorm before the head."""
        return self.with_layers(lambda: self.make_head_norm()(Z_BxNxd))

    def forward_intermediates(
        self,
        images_BxHxWxc: Array,
        *,
        train: bool,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NHWC",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """The tokens after some of the blocks, as timm's method of this name returns them.

        Args:
            images_BxHxWxc: as for a call.
            train: as for a call.
            indices: layers, counted from 0, a negative one from the last; or a number n: the last
                n; None: all.
            norm: whether each is normalised by the LayerNorm before the head.
            output_fmt: of the patches: "NHWC", on their grid, (B, down, across, d); or "NLC",
                (B, P, d).
            return_prefix_tokens: whether each is a pair: the patches, and the tokens that come
                before them, such as the class token.
            intermediates_only: whether nothing else is returned.

        Returns:
            Tokens (B, N, d) of `forward_features`, which `forward_head` takes; and a list with the
            patches of each of those layers, in the model's dtype, or float32 with ``norm``.

        Raises:
            ValueError: a field, the images, an index or the format break a rule.
        """
        chosen = chosen_layers(indices, self.depth)
        check_format(output_fmt)

        def compute() -> Any:
            Z_BxNxd, seen = self._tokens(images_BxHxWxc, train, "out")
            normalise = self.make_head_norm() if norm else lambda Z_BxNxd: Z_BxNxd
            found = [
                arranged(normalise(seen["out"][i]), self.first_patch, self.grid, output_fmt)
                for i in chosen
            ]
            layers = found if return_prefix_tokens else [patches for patches, _ in found]
            return layers if intermediates_only else (Z_BxNxd, layers)

        return self.with_layers(compute)

    @nn.nowrap
    def _tokens(
        self,
        images_BxHxWxc: Array,
        train: bool,
        taps: str | Iterable[str],
        hidden: tuple[Array, Array] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Tokens after the last block, and the taps."""
        check_images(images_BxHxWxc, self.input_shape)
        given = (images_BxHxWxc,) if hidden is None else (images_BxHxWxc, hidden)
        return self.run_blocks(self.embed(train)(*given), train=train, taps=taps)

    @nn.nowrap
    def _read(self, Z_BxNxd: Array, pre_logits: bool) -> Array:
        """Logits, or the features that they are computed from."""
        pooled_Bxd = self.pooled(Z_BxNxd)
        return pooled_Bxd if pre_logits or not self.num_classes else self.make_head()(pooled_Bxd)
