"""Images to tokens: patches, class token, positions."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.layers import dense, layer_norm


def patchify(images_BxHxWxc: Array, patch_size: tuple[int, int]) -> Array:
    """Cut images into patches, row by row; each is flattened as (row, column, channel).

    Args:
        images_BxHxWxc: images whose sides are multiples of the patch's.
        patch_size: (height, width) of a patch in pixels.

    Returns:
        Patches (B, N, height · width · c).

    Raises:
        ValueError: a side of the image is not a multiple of the patch's.
    """
    B, H, W, c = images_BxHxWxc.shape
    h, w = patch_size
    if H % h or W % w:
        raise ValueError(
            f"model.image_size must be a multiple of model.patch_size; got {H}x{W} and {h}x{w}. "
            f"Nearest that fits: {max(1, round(H / h)) * h}x{max(1, round(W / w)) * w}."
        )
    grid_BxRxhxCxwxc = images_BxHxWxc.reshape(B, H // h, h, W // w, w, c)
    return grid_BxRxhxCxwxc.transpose(0, 1, 3, 2, 4, 5).reshape(B, (H // h) * (W // w), h * w * c)


class PatchEmbedding(nn.Module):
    """Patches → LayerNorm → linear → LayerNorm, class token in front, positions added.

    The class token (d,) and the positions (N + 1, d), row 0 the class token's, start as N(0, 1).
    Source: the official implementation of arXiv 2306.01129.
    """

    patch_size: tuple[int, int]
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images_BxHxWxc: Array) -> Array:
        """Images (B, H, W, c) to tokens (B, N + 1, d)."""
        X_BxNxk = patchify(images_BxHxWxc.astype(self.dtype), self.patch_size)
        B, N, k = X_BxNxk.shape
        X_BxNxk = layer_norm(X_BxNxk, self.dtype, "patch_norm")
        Z_BxNxd = dense(self.width, k, self.dtype, "projection")(X_BxNxk)
        Z_BxNxd = layer_norm(Z_BxNxd, self.dtype, "token_norm")
        cls_d = self.param("cls_token", init.normal(1.0), (self.width,))
        pos_Mxd = self.param("pos_embedding", init.normal(1.0), (N + 1, self.width))
        cls_Bx1xd = jnp.broadcast_to(cls_d.astype(self.dtype), (B, 1, self.width))
        Z_BxMxd = jnp.concatenate([cls_Bx1xd, Z_BxNxd], axis=1)
        return Z_BxMxd + pos_Mxd.astype(self.dtype)[None]
