"""Images to tokens: P patches, class token, positions; N = P + 1."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.layers import LayerNorm, Linear
from crate_jax.models.parameters import linear_kernel_init, parameter


def patchify(images_BxHxWxc: Array, patch_size: tuple[int, int]) -> Array:
    """Cut images into patches, row by row; each is flattened as (row, column, channel).

    Args:
        images_BxHxWxc: images whose sides are multiples of the patch's.
        patch_size: (height, width) of a patch in pixels.

    Returns:
        Patches (B, P, height · width · c).

    Raises:
        ValueError: a side of the image is not a multiple of the patch's.
    """
    B, H, W, c = images_BxHxWxc.shape
    h, w = patch_size
    check_sides((H, W), patch_size)
    grid_BxRxhxCxwxc = placement.reshape(images_BxHxWxc, (B, H // h, h, W // w, w, c))
    grid_BxRxCxhxwxc = grid_BxRxhxCxwxc.transpose(0, 1, 3, 2, 4, 5)
    return placement.reshape(grid_BxRxCxhxwxc, (B, (H // h) * (W // w), h * w * c))


def unpatchify(X_BxPxk: Array, patch_size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """The images (B, H, W, c) that `patchify` cuts into these patches.

    Args:
        X_BxPxk: patches, row by row.
        patch_size: (height, width) of a patch in pixels.
        grid: patches (down, across).
    """
    (h, w), (R, C) = patch_size, grid
    grid_BxRxCxhxwxc = placement.reshape(X_BxPxk, (len(X_BxPxk), R, C, h, w, -1))
    grid_BxRxhxCxwxc = grid_BxRxCxhxwxc.transpose(0, 1, 3, 2, 4, 5)
    return placement.reshape(grid_BxRxhxCxwxc, (len(X_BxPxk), R * h, C * w, -1))


def check_sides(
    image_size: tuple[int, int], patch_size: tuple[int, int], field: str = "model.image_size"
) -> None:
    """Refuse images that cannot be cut into patches.

    Args:
        image_size: pixels (down, across).
        patch_size: likewise.
        field: whose value the former is, for the error.

    Raises:
        ValueError: a side of the image is not a multiple of the patch's.
    """
    (H, W), (h, w) = image_size, patch_size
    if H % h or W % w:
        raise ValueError(
            f"{field} must be a multiple of model.patch_size; got {H}x{W} and {h}x{w}. "
            f"Nearest that fits: {max(1, round(H / h)) * h}x{max(1, round(W / w)) * w}."
        )


def with_class_token(
    module: nn.Module,
    Z_BxPxd: Array,
    cls_init: Callable[..., Array],
    pos_init: Callable[..., Array],
    positions: Callable[[int, int], Array] | None = None,
) -> Array:
    """Patches with a class token in front, and positions added; both are parameters of the module.

    They are ``cls_token`` (d,) and ``pos_embedding`` (N, d), whose row 0 is the class token's.

    Args:
        module: which has them.
        Z_BxPxd: patches.
        cls_init: how the class token starts.
        pos_init: how the positions do.
        positions: from N and d to positions that are fixed; None: they are learned.

    Returns:
        Tokens (B, N, d), of the patches' dtype.
    """
    _, P, d = Z_BxPxd.shape
    cls_d = parameter(module, "cls_token", cls_init, (d,))
    if positions:
        pos_Nxd = positions(P + 1, d)
    else:
        pos_Nxd = parameter(module, "pos_embedding", pos_init, (P + 1, d))
    return prepend(cls_d, Z_BxPxd) + pos_Nxd.astype(Z_BxPxd.dtype)[None]


def hide(Z_BxPxd: Array, hidden: tuple[Array, Array] | None) -> Array:
    """Replace some of the patches, before positions are added.

    Args:
        Z_BxPxd: patches.
        hidden: which (B, P), and the token (d,) that stands there instead; None: none.
    """
    if hidden is None:
        return Z_BxPxd
    masked_BxP, token_d = hidden
    return jnp.where(masked_BxP[..., None], token_d.astype(Z_BxPxd.dtype)[None, None], Z_BxPxd)


def prepend(cls_d: Array, Z_BxPxd: Array) -> Array:
    """Patches with the class token in front, (B, P + 1, d), of the patches' dtype."""
    B, _, d = Z_BxPxd.shape
    cls_Bx1xd = jnp.broadcast_to(cls_d.astype(Z_BxPxd.dtype), (B, 1, d))
    return jnp.concatenate([placement.beside(cls_Bx1xd, Z_BxPxd), Z_BxPxd], axis=1)


def sinusoids(
    at_n: Array | np.ndarray, count: int, *, slowest: int | None = None
) -> tuple[Array, Array]:
    """Sines and cosines of positions at falling frequencies: 10⁻⁴ to the power i / slowest.

    Source: arXiv 1706.03762, section 3.5.

    Args:
        at_n: positions, or steps in time.
        count: of frequencies, i = 0, …, count − 1.
        slowest: the i at which the frequency would be 10⁻⁴; None: count.

    Returns:
        Sines (n, count) and cosines (n, count), float32; of a NumPy array computed in double
        precision.
    """
    known = isinstance(at_n, np.ndarray)
    numbers, dtype = (np, np.float64) if known else (jnp, jnp.float32)
    frequencies_i = np.exp(-np.log(1e4) * np.arange(count) / (slowest or count)).astype(dtype)
    angles_nxi = at_n.astype(dtype)[:, None] * frequencies_i[None]
    sines_nxi, cosines_nxi = numbers.sin(angles_nxi), numbers.cos(angles_nxi)
    return jnp.asarray(sines_nxi, jnp.float32), jnp.asarray(cosines_nxi, jnp.float32)


def grid_positions(grid: tuple[int, int], width: int) -> Array:
    """Fixed positions (N, d) of a grid of patches: sines and cosines of column, then of row.

    A patch has d/4 sines and d/4 cosines of its column, and as many of its row, at the frequencies
    of `crate_jax.models.embedding.sinusoids`. The class token's, in front, are zero.
    Source: the official implementation of arXiv 2404.02446, which has them of arXiv 2111.06377.

    >>> grid_positions((1, 2), 4).round(3).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.8410000205039978, 0.5400000214576721, 0.0, 1.0]]
    """
    rows_P, columns_P = np.indices(grid).reshape(2, -1)
    parts = [*sinusoids(columns_P, width // 4), *sinusoids(rows_P, width // 4)]
    return jnp.concatenate([jnp.zeros((1, width), jnp.float32), jnp.concatenate(parts, axis=1)])


def resize_positions(
    pos_Nxd: Array | np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> Array:
    """Positions of another grid of patches, by bicubic interpolation; the class token's row stays.

    The cubic is Keys's with a = −1/2, smoothed where the grid shrinks: PyTorch's ``interpolate(…,
    mode="bicubic", antialias=True)``.

    Args:
        pos_Nxd: row 0 the class token's, then the patches row by row; N = old height · width + 1.
        old: (height, width) of their grid in patches.
        new: (height, width) of the grid wanted.

    Returns:
        Positions (new height · width + 1, d), of the input's dtype.
    """
    grid_RxCxd = pos_Nxd[1:].reshape(*old, -1)
    resized_RxCxd = jax.image.resize(grid_RxCxd, (*new, grid_RxCxd.shape[-1]), "cubic")
    return jnp.concatenate([pos_Nxd[:1], resized_RxCxd.reshape(new[0] * new[1], -1)])


def resize_positions_as_official_maps(
    pos_Nxd: Array | np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> Array:
    """`resize_positions` as the official notebook of attention maps resizes them.

    The cubic has a = −3/4, without smoothing, and a patch of the new grid lies at (i + ½) n /
    (m + 0.1) − ½ of the old one for n → m patches: PyTorch's ``interpolate(…, scale_factor=(m +
    0.1) / n, mode="bicubic")``. So a grid of the same size is resampled too.
    Source: the notebooks of arXiv 2308.16271.
    Differs from official: an oblong grid lies as its tokens do, by rows. There the grid is made for
    (columns, rows); a call with that as ``new`` gives those positions, entry for entry.

    Args:
        pos_Nxd: see `resize_positions`.
        old: see `resize_positions`.
        new: see `resize_positions`.

    Returns:
        Positions (new height · width + 1, d), of the input's dtype.
    """
    grid_RxCxd = jnp.asarray(pos_Nxd[1:]).reshape(*old, -1)
    rows_rxR, columns_cxC = (_cubic_weights(n, m) for n, m in zip(old, new, strict=True))
    resized_rxcxd = jnp.einsum(
        "rR,RCd,cC->rcd",
        rows_rxR,
        grid_RxCxd.astype(jnp.float32),
        columns_cxC,
        precision="highest",
    )
    patches_Pxd = resized_rxcxd.reshape(new[0] * new[1], -1).astype(grid_RxCxd.dtype)
    return jnp.concatenate([pos_Nxd[:1], patches_Pxd])


def fixed_positions(old: tuple[int, int], new: tuple[int, int], width: int) -> Array:
    """`grid_positions` of the old grid (N, d), resized as officially where the new is another."""
    pos_Nxd = grid_positions(old, width)
    return pos_Nxd if old == new else resize_positions_as_official_maps(pos_Nxd, old, new)


def _cubic_weights(n: int, m: int) -> np.ndarray:
    """From n values in a row to m of them (m, n), float32; beyond the ends the last one counts."""
    at_m = (np.arange(m) + 0.5) * n / (m + 0.1) - 0.5
    weights_mxn = np.zeros((m, n))
    for step in (-1, 0, 1, 2):
        place_m = np.floor(at_m) + step
        x_m = np.abs(at_m - place_m)
        near_m = 1.25 * x_m**3 - 2.25 * x_m**2 + 1
        far_m = -0.75 * (x_m**3 - 5 * x_m**2 + 8 * x_m - 4)
        inside_m = np.clip(place_m, 0, n - 1).astype(int)
        np.add.at(weights_mxn, (np.arange(m), inside_m), np.where(x_m <= 1, near_m, far_m))
    return weights_mxn.astype(np.float32)


def resize_patch_kernel(
    kernel_hxwxcxd: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    """The linear map of a patch for patches of another size.

    With B the bicubic resizing of a patch, the new map w' is the one with ⟨w', B x⟩ = ⟨w, x⟩ for
    every patch x where B enlarges, and nearest to it for white noise where it shrinks: w' =
    (Bᵀ)⁺ w. Source: arXiv 2212.08013, section 3.4.

    Args:
        kernel_hxwxcxd: from the pixels and channels of a patch to d values.
        old: (h, w) in pixels.
        new: (height, width) of the patches wanted, in pixels.

    Returns:
        The kernel (height, width, c, d), float32; computed in double precision.
    """
    h, w = old
    pixels_hwxhxw = np.eye(h * w, dtype=np.float32).reshape(h * w, h, w)
    B_hwxk = jax.image.resize(pixels_hwxhxw, (h * w, *new), "cubic").reshape(h * w, -1)
    flat_hwxcd = kernel_hxwxcxd.reshape(h * w, -1).astype(np.float64)
    resized = np.linalg.pinv(np.asarray(B_hwxk, np.float64)) @ flat_hwxcd
    return resized.reshape(*new, *kernel_hxwxcxd.shape[2:]).astype(np.float32)


class PatchEmbedding(nn.Module):
    """Patches → [LayerNorm →] linear [→ LayerNorm], class token in front, positions added.

    The class token (d,) and the positions (N, d), row 0 the class token's, start as N(0, 1) unless
    told otherwise; ``positions``, from N and d, makes them fixed ones (N, d). Without norms the
    linear map is a convolution whose stride is its size.
    Source: the official implementation of arXiv 2306.01129.
    """

    patch_size: tuple[int, int]
    width: int
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"
    norms: bool = True
    cls_init: Callable[..., Array] = init.normal(1.0)
    pos_init: Callable[..., Array] = init.normal(1.0)
    kernel_init: Callable[..., Array] = linear_kernel_init
    bias_init: Callable[..., Array] | None = None  # None: nn.Linear's
    positions: Callable[[int, int], Array] | None = None  # None: learned

    @nn.compact
    def __call__(self, images_BxHxWxc: Array, hidden: tuple[Array, Array] | None = None) -> Array:
        """Images (B, H, W, c) to tokens (B, N, d).

        Args:
            images_BxHxWxc: as the model takes them.
            hidden: of `hide`.
        """
        X_BxPxk = patchify(images_BxHxWxc.astype(self.dtype), self.patch_size)
        if self.norms:
            X_BxPxk = LayerNorm(self.dtype, self.backward, name="patch_norm")(X_BxPxk)
        projection = Linear(
            self.width, self.dtype, self.kernel_init, self.bias_init, name="projection"
        )
        Z_BxPxd = projection(X_BxPxk)
        if self.norms:
            Z_BxPxd = LayerNorm(self.dtype, self.backward, name="token_norm")(Z_BxPxd)
        Z_BxPxd = hide(Z_BxPxd, hidden)
        return with_class_token(self, Z_BxPxd, self.cls_init, self.pos_init, self.positions)
