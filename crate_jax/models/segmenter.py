"""Segmentation: an image classifier without its head, and a decoder of its patch tokens."""

import flax.linen as nn
import jax
from jax import Array

from crate_jax import placement
from crate_jax.models.classifier import ImageClassifier


class Segmenter(nn.Module):
    """A backbone and a decoder: from images to the logits of the classes at every pixel.

    The decoder takes the patch tokens of the backbone's last block; its masks are enlarged to the
    size of the image, with linear interpolation in both directions. The parameters are those of
    both, under their names: ``{"backbone": …, "decoder": …}``. A head that the backbone's weights
    have besides is not read.

    Attributes:
        backbone: any model of `crate_jax.create_model` for images.
        decoder: from patch tokens (B, P, d) to masks (B, P, Y), such as `Depict`.
        norm: whether the LayerNorm of the backbone's head acts on every patch before the decoder
            does, as in the code of arXiv 2411.03033.
    """

    backbone: ImageClassifier
    decoder: nn.Module
    norm: bool = True

    def __call__(self, images_BxHxWxc: Array, *, train: bool) -> Array:
        """Images of the backbone's `input_shape` to logits (B, H, W, Y), float32.

        ``train`` is the backbone's.

        Raises:
            ValueError: the images do not fit the backbone, or a field breaks a rule.
        """
        backbone, (rows, columns) = self.backbone, self.backbone.grid

        def features() -> Array:
            Z_BxNxd = backbone.forward_features(images_BxHxWxc, train=train)
            return backbone.make_head_norm()(Z_BxNxd) if self.norm else Z_BxNxd

        Z_BxPxd = backbone.with_layers(features)[:, -rows * columns :]
        masks_BxPxY = self.decoder(Z_BxPxd)
        B, H, W, _ = images_BxHxWxc.shape
        masks_BxRxCxY = placement.reshape(masks_BxPxY, (B, rows, columns, masks_BxPxY.shape[-1]))
        return jax.image.resize(masks_BxRxCxY, (B, H, W, masks_BxRxCxY.shape[-1]), "linear")
