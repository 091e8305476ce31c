"""Mixup and CutMix of whole batches, on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Mix = Callable[[Array, Array, Array], tuple[Array, Array]]


def make_mix(
    *, num_classes: int, mixup_alpha: float, cutmix_alpha: float, switch: float = 0.5
) -> Mix | None:
    """Build ``mix(key, images, labels) -> (images, targets)``; pure, for use inside jit.

    Each image is combined with its partner, the image at the same place from the batch's end, with
    a weight of its own that one draw of Beta(α, α) decides for the whole batch:

    - Mixup (arXiv 1710.09412): x̃ = λ x + (1 − λ) x'.
    - CutMix (arXiv 1905.04899): x̃ is x with a box of x', of area (1 − λ) H W before it is cut off
      at the border; λ is then what is left of x.

    The target is λ one-hot(y) + (1 − λ) one-hot(y') either way. Where both are on, CutMix is taken
    with probability `switch`.

    Args:
        num_classes: Y.
        mixup_alpha: α of Mixup, >= 0; 0: no Mixup.
        cutmix_alpha: α of CutMix, >= 0; 0: no CutMix.
        switch: probability of CutMix, in [0, 1].

    Returns:
        The function: key, images (B, H, W, c) float32 and labels (B,) integers to mixed images of
        that shape and soft targets (B, Y), float32, rows of sum 1. None if both are off.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    probability = switch if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)

    def mix(key: Array, images_BxHxWxc: Array, labels_B: Array) -> tuple[Array, Array]:
        images_BxHxWxc = images_BxHxWxc.astype(jnp.float32)
        _, H, W, _ = images_BxHxWxc.shape
        choose, blend, cut = jax.random.split(key, 3)
        keep_HxW = jnp.where(
            jax.random.bernoulli(choose, np.float32(probability)),
            _cutmix_share(cut, H, W, cutmix_alpha or 1.0),
            jnp.full((H, W), _beta(blend, mixup_alpha or 1.0)),
        )
        keep = keep_HxW[None, :, :, None]
        targets_BxY = jax.nn.one_hot(labels_B, num_classes, dtype=jnp.float32)
        images = keep * images_BxHxWxc + (1 - keep) * images_BxHxWxc[::-1]
        lam = keep_HxW.mean()
        return images, lam * targets_BxY + (1 - lam) * targets_BxY[::-1]

    return mix


def _cutmix_share(key: Array, H: int, W: int, alpha: float) -> Array:
    """1 where an image keeps its pixel, 0 in the box (H, W), float32."""
    size, middle_y, middle_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - _beta(size, alpha))  # of the box, as a share

    def inside(key: Array, length: int) -> Array:
        half = jnp.floor(side * length) / 2
        middle = jax.random.randint(key, (), 0, length, jnp.int32).astype(jnp.float32)
        places = jnp.arange(length, dtype=jnp.float32) + 0.5
        return (places > middle - half) & (places < middle + half)

    box_HxW = inside(middle_y, H)[:, None] & inside(middle_x, W)[None, :]
    return 1 - box_HxW.astype(jnp.float32)


def _beta(key: Array, alpha: float) -> Array:
    """A draw of Beta(α, α), float32."""
    return jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
