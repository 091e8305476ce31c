"""What the image classifiers of the family share: images → tokens → blocks → one token → logits."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from crate_jax import placement
from crate_jax.models.block import Block, Context, Dropout, Part, chosen_taps, stack, tap_names
from crate_jax.models.images import check_images
from crate_jax.models.layers import LayerNorm, Linear
from crate_jax.models.variants import ImageFields
from crate_jax.options import option_of

Params = Mapping[str, Any]  # the parameters of a model: arrays, or their shapes, in nested dicts


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as a side or as (height, width)."""
    sides = tuple(size) if isinstance(size, Sequence) else (size,)
    return (int(sides[0]), int(sides[-1]))


class ImageClassifier(ImageFields, nn.Module):
    """A stack of blocks between an embedding and a head; a model says which.

    A model is a subclass with the fields of its family (`crate_jax.models.variants`) that gives
    `attention_part`, `nonlinearity_part` and `embed`, and overrides what differs of `block_fields`,
    `drop_path_rates`, `pooled` and `make_head`. Parameters are float32; the computation is in
    ``dtype``, with norms, softmax and logits in float32. Layers are stacked on axis 0 of every leaf
    under ``blocks``. A model of ``num_classes=0`` has no head: its logits are what a head would
    read.
    """

    EPSILON: ClassVar[float] = 1e-5  # of the LayerNorms of blocks and head

    def __init_subclass__(cls, **options: Any) -> None:
        """Mark what a subclass overrides of the helpers here as the helpers are marked.

        Flax would record what they return, modules among it, under ``capture_intermediates``.
        """
        for name, method in vars(cls).items():
            if hasattr(getattr(ImageClassifier, name, None), "nowrap"):
                nn.nowrap(method)
        super().__init_subclass__(**options)

    @property
    def attention_part(self) -> Part:
        """The first half of a block."""
        raise TypeError("a model must say what its attention is")

    @property
    def nonlinearity_part(self) -> Part | None:
        """The second half of a block."""
        raise TypeError("a model must say what its nonlinearity is")

    @nn.nowrap
    def embed(self) -> nn.Module:
        """From images (B, H, W, c) to tokens (B, N, d); to be made in a compact method."""
        raise TypeError("a model must say how it embeds images")

    @nn.nowrap
    def block_fields(self) -> dict[str, Any]:
        """Fields of `Block` that are not its defaults."""
        return {}

    @nn.nowrap
    def drop_path_rates(self) -> Array | None:
        """The rate of stochastic depth of every layer (L,); None: no half is ever skipped."""
        return None

    @nn.nowrap
    def pooled(self, Z_BxNxd: Array) -> Array:
        """What the head reads, (B, d) float32, normalised by ``head_norm``."""
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
    def layers_at_once(self) -> int:
        """Layers per iteration of the compiled loop.

        A loop copies what each layer keeps in and out of one array for all: on an H100 that is a
        third of a training step of CRATE-B, and compiling all layers takes some seconds longer.
        With remat memory comes first, and a loop is certain to forget what is computed again.
        """
        if self.scan_unroll is not None:
            return self.scan_unroll
        return self.depth if placement.platform() == "gpu" and self.remat == "none" else 1

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
            Logits (B, Y), float32; of a model without a head the features (B, d) of `forward_head`.

        Raises:
            ValueError: a field or the images break a rule.
        """
        return self.forward(images_BxHxWxc, train=train)[0]

    def forward(
        self, images_BxHxWxc: Array, *, train: bool, taps: str | Iterable[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """Classify images, and return what the layers computed on the way.

        Args:
            images_BxHxWxc: as for a call.
            train: likewise.
            taps: names out of `tap_names`, or one; each costs the memory of its array for every
                layer.

        Returns:
            Logits as of a call, and {name: array} with the layers on axis 0:
            ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), others (L, B, N, d).

        Raises:
            ValueError: a field or the images break a rule.
            KeyError: an unknown tap.
        """
        names = chosen_taps(taps, self.tap_names)

        def compute() -> tuple[Array, dict[str, Array]]:
            Z_BxNxd, seen = self._tokens(images_BxHxWxc, train, names)
            return self._read(Z_BxNxd, pre_logits=False), seen

        return self._with_layers(compute)

    def forward_features(self, images_BxHxWxc: Array, *, train: bool) -> Array:
        """Tokens as they come out of the last block; no norm follows in the blocks.

        The last LayerNorm belongs to the head and acts on the one token that `forward_head` reads.
        timm's method of this name has normalised every token of a ViT by it: with ``pool`` cls its
        class token is what ``forward_head(tokens, pre_logits=True)`` returns.

        Args:
            images_BxHxWxc: as for a call.
            train: likewise.

        Returns:
            Tokens (B, N, d) in the model's dtype, the class token first.

        Raises:
            ValueError: a field or the images break a rule.
        """
        return self._with_layers(lambda: self._tokens(images_BxHxWxc, train, ())[0])

    def forward_head(self, Z_BxNxd: Array, *, pre_logits: bool = False) -> Array:
        """What a call makes of the tokens of `forward_features`.

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
        return self._with_layers(lambda: self._read(Z_BxNxd, pre_logits))

    @nn.compact
    def _with_layers(self, compute: Callable[[], Any]) -> Any:
        """What a function returns that makes layers; Flax has one method of a module make them."""
        for field in dataclasses.fields(self):
            choices = option_of(field).choices if "option" in field.metadata else ()
            value = getattr(self, field.name)
            if choices and isinstance(value, str) and value not in choices:
                raise ValueError(
                    f"model.{field.name} must be one of {', '.join(choices)}; got {value}."
                )
        kernel = getattr(self, "attention_kernel", "auto")
        if kernel in ("pallas", "cudnn") and (
            self.backward == "autodiff" or self.attention_part.name != "mssa"
        ):
            raise ValueError(
                "model.attention_kernel must be auto or xla without MSSA, and with "
                f"model.backward=autodiff; got {kernel}. Leave it unset."
            )
        return compute()

    @nn.nowrap
    def _tokens(
        self, images_BxHxWxc: Array, train: bool, taps: tuple[str, ...]
    ) -> tuple[Array, dict[str, Array]]:
        """Tokens after the last block, and the taps."""
        check_images(images_BxHxWxc, self.input_shape)
        Z_BxNxd = self.embed()(images_BxHxWxc)
        Z_BxNxd = Dropout(self.dropout, train)(Z_BxNxd)
        blocks = stack(
            Block,
            self.depth,
            remat=self.remat,
            unroll=self.layers_at_once,
            attention=self.attention_part,
            nonlinearity=self.nonlinearity_part,
            dtype=self.dtype,
            backward=self.backward,
            epsilon=self.EPSILON,
            dropout=self.dropout,
            train=train,
            taps=taps,
            **self.block_fields(),
        )
        return blocks(Z_BxNxd, self.drop_path_rates(), Context())

    @nn.nowrap
    def _read(self, Z_BxNxd: Array, pre_logits: bool) -> Array:
        """Logits, or the features that they are computed from."""
        pooled_Bxd = self.pooled(Z_BxNxd)
        return pooled_Bxd if pre_logits or not self.num_classes else self.make_head()(pooled_Bxd)
