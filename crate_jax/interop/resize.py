"""Patch kernels and positions of other sizes, by the ways there are.

"right" is the way of `crate_jax.models.embedding`: a kernel by the pseudo-inverse, positions
bicubically. "crate_alpha" is what CRATE-α's official fine-tuning does, to follow it: both
bilinearly, the kernel as if it were an image. Its fine-tuning for CLIPA resizes the positions, the
class token's row among them, as if they lay in a row; here they lie on their grid either way.
"official_maps" resizes positions as the notebook behind the published attention maps does, also to
the size that they have; a kernel as "right" does.
"""

import jax
import numpy as np

from crate_jax.models.embedding import (
    resize_patch_kernel,
    resize_positions,
    resize_positions_as_official_maps,
)

Size = tuple[int, int]

METHODS = ("right", "crate_alpha", "official_maps")


def resized_kernel(kernel_hxwxcxd: np.ndarray, new: Size, method: str) -> np.ndarray:
    """The linear map of a patch for patches of another size: (height, width, c, d) float32."""
    h, w = kernel_hxwxcxd.shape[:2]
    if method != "crate_alpha":
        return resize_patch_kernel(kernel_hxwxcxd, (h, w), new)
    shape = (*new, *kernel_hxwxcxd.shape[2:])
    return np.asarray(jax.image.resize(kernel_hxwxcxd.astype(np.float32), shape, "bilinear"))


def resized_positions(pos_Mxd: np.ndarray, old: Size, new: Size, method: str) -> np.ndarray:
    """Positions (new height · width + 1, d) of another grid; the class token's row stays."""
    if method == "right":
        return np.asarray(resize_positions(pos_Mxd, old, new))
    if method == "official_maps":
        return np.asarray(resize_positions_as_official_maps(pos_Mxd, old, new))
    grid = pos_Mxd[1:].reshape(*old, -1)
    for axis, size in enumerate(new):
        grid = _zoom(grid, axis, size)
    return np.concatenate([pos_Mxd[:1], grid.reshape(-1, pos_Mxd.shape[1])]).astype(pos_Mxd.dtype)


def _zoom(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear between neighbours, first on first and last on last (SciPy's ``zoom``, order 1)."""
    old = values.shape[axis]
    at = np.linspace(0, old - 1, size)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = (at - low).reshape(-1, *[1] * (values.ndim - axis - 1))
    return values.take(low, axis) * (1 - share) + values.take(high, axis) * share
