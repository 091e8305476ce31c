"""CRATE-MAE, a masked autoencoder: an encoder that compresses, and a decoder that undoes it."""

import functools
from collections.abc import Iterable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init

from crate_jax.models.block import Part, chosen_taps
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding, check_sides, fixed_positions
from crate_jax.models.fields import MaeFields
from crate_jax.models.images import check_images, check_masked
from crate_jax.models.layers import ISTA, MSSA, LayerNorm
from crate_jax.models.mae_decoder import decoder_cost, decoder_of, pixels_of, tap_names_of, xavier
from crate_jax.models.parameters import parameter


class CrateMae(MaeFields, ImageClassifier):
    """CRATE-MAE: the masked autoencoder, and its encoder as an image classifier.

    The encoder's layers are CRATE's. Its patches are embedded by a convolution, at fixed positions.
    `reconstruct` hides patches behind a learned mask token, which the encoder sees in their place,
    and gives the pixels of all patches. A call and the methods of every image classifier take whole
    images, and know the encoder alone.
    Source: arXiv 2404.02446 and its code. Parameters start as there, in distribution.
    Differs from official: positions of another image size are computed, unless ``position_size``
        says whose are resized; what the official model holds and never reads (``pos_embed``,
        ``decoder_embed``) is no parameter.

    Attributes: as `crate_jax.Crate`, and
        num_classes: 0 of an autoencoder, whose call gives features.
        decoder_depth: layers of the decoder; 0: there is none, nor a mask token.
        lmbda: λ of ISTA. Released weights differ in it, and their files' names tell it.
        position_size: of the images for which positions are computed; where `image_size` is
            another, they are resized as the official code does; 0: of `image_size`.
    """

    OPTIONAL: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **ImageClassifier.OPTIONAL,
        "decoder_depth": ("decoder", "mask_token"),
    }

    def check_fields(self) -> None:
        """Refuse a width without positions, and a head beside a decoder: nothing trains both."""
        if self.width % 4:
            raise ValueError(
                "model.width must be a multiple of 4, for sines and cosines of rows and columns; "
                f"got {self.width}. Set model.width."
            )
        if self.num_classes and self.decoder_depth:
            raise ValueError(
                f"model.decoder_depth must be 0 for a model that classifies; got "
                f"{self.decoder_depth}. Set model.decoder_depth=0: the encoder alone."
            )
        check_sides(pair(self.position_size), pair(self.patch_size), "model.position_size")

    @property
    def attention_part(self) -> Part:
        """MSSA, of the encoder and of the decoder."""
        make = functools.partial(
            MSSA,
            self.num_heads,
            self.subspace_dim,
            self.dtype,
            self.kernel,
            kernel_init=xavier(in_axis=0, out_axis=(1, 2)),
            out_init=xavier(in_axis=(0, 1), out_axis=2),
            bias_init=init.zeros,
        )
        return Part("mssa", make, MSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """ISTA."""
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))

    @property
    def position_grid(self) -> tuple[int, int]:
        """Patches (down, across) for which positions are computed."""
        (H, W), (h, w) = pair(self.position_size), pair(self.patch_size)
        return (H // h, W // w) if H and W else self.grid

    @nn.nowrap
    def positions(self, _: int, d: int) -> Array:
        """The positions that are added to the class token and the patches, (N, d)."""
        return fixed_positions(self.position_grid, self.grid, d)

    def embed(self, train: bool) -> nn.Module:
        """A convolution of stride h, w, at fixed positions."""
        del train
        return PatchEmbedding(
            pair(self.patch_size),
            self.width,
            self.dtype,
            norms=False,
            cls_init=init.normal(0.02),
            kernel_init=xavier(),
            positions=self.positions,
            name="embedding",
        )

    def make_head_norm(self) -> nn.Module:
        """The LayerNorm behind the encoder."""
        return LayerNorm(jnp.float32, self.backward, 1e-6, name="head_norm")

    def pooled(self, Z_BxNxd: Array) -> Array:
        """The class token or the mean of all tokens, normalised."""
        norm = self.make_head_norm()
        if self.decoder_depth and self.is_initializing():  # the parameters of `reconstruct`, too
            self._mask_token()
            decoder_of(self, train=False)(norm(Z_BxNxd))
        return norm(Z_BxNxd[:, 0] if self.pool == "cls" else Z_BxNxd.mean(axis=1))

    def reconstruct(self, images_BxHxWxc: Array, masked_BxP: Array, *, train: bool) -> Array:
        """The pixels of all patches, from images of which some are hidden: of `forward_masked`."""
        return self.forward_masked(images_BxHxWxc, masked_BxP, train=train)[0]

    def forward_masked(
        self,
        images_BxHxWxc: Array,
        masked_BxP: Array | None,
        *,
        train: bool,
        taps: str | Iterable[str] = (),
        decoder_taps: str | Iterable[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """The pixels of all patches, and what layers compute on the way.

        Args:
            images_BxHxWxc: as for a call.
            masked_BxP: True where a patch is hidden, row by row; None: nowhere.
            train: whether dropout acts; it needs a "dropout" key.
            taps: of the encoder, names out of `tap_names`, or one.
            decoder_taps: of the decoder in their place, names out of `decoder_tap_names`, or one.

        Returns:
            Patches (B, P, h · w · c), float32, of what the model was trained to give, pixel by
            pixel as of `crate_jax.models.embedding.patchify`; and {name: array}, layers on axis 0.

        Raises:
            ValueError, KeyError: a field, the images, the mask or a tap break a rule, or there is
                no decoder.
        """
        if not self.decoder_depth:
            raise ValueError(
                "model.decoder_depth must be at least 1 to reconstruct; got 0, the encoder alone. "
                "Set model.decoder_depth."
            )

        def compute() -> tuple[Array, dict[str, Array]]:
            check_images(images_BxHxWxc, self.input_shape)
            hidden = None if masked_BxP is None else (masked_BxP, self._mask_token())
            check_masked(masked_BxP, (len(images_BxHxWxc), self.num_patches))
            Z_BxNxd = self.embed(train)(images_BxHxWxc, hidden)
            Z_BxNxd, seen = self.run_blocks(Z_BxNxd, train=train, taps=taps)
            names = chosen_taps(decoder_taps, self.decoder_tap_names)
            patches, decoded = decoder_of(self, train, names)(self.make_head_norm()(Z_BxNxd))
            return patches, decoded if names else seen

        return self.with_layers(compute)

    @property
    def decoder_tap_names(self) -> tuple[str, ...]:
        """The names of the taps of the decoder's layers, in the order of computation."""
        return tap_names_of(self.attention_part)

    @nn.nowrap
    def _mask_token(self) -> Array:
        return parameter(self, "mask_token", init.normal(0.02), (self.width,))

    @property
    def head_products(self) -> int:
        """Multiply-adds of the decoder and of the linear maps to pixels or logits."""
        pixels = self.num_patches * self.width * pixels_of(self) * bool(self.decoder_depth)
        return super().head_products + self.decoder_depth * decoder_cost(self).products + pixels

    @property
    def head_again(self) -> int:
        """Multiply-adds of the decoder's layers that the backward pass computes again."""
        return self.decoder_depth * decoder_cost(self).again[self.remat]

    @property
    def kept_outside(self) -> int:
        """The values that the decoder's layers save."""
        return self.decoder_depth * decoder_cost(self).kept[self.remat]
