"""Pictures of images: shared principal components, coarse masks and objects."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from crate_jax.analysis.coarse_masks import SHARE, share_of_entries
from crate_jax.analysis.figures.attention import show_image, show_map
from crate_jax.analysis.figures.canvas import (
    COLOURS,
    Picture,
    drawing,
    framed,
    grid_of_axes,
    long_table,
    number,
)
from crate_jax.analysis.maskcut import Cut
from crate_jax.analysis.pca import Shown


@drawing
def shared_components(
    shown: Shown, pixels_BxHxWxc: np.ndarray, grid: tuple[int, int], *, layer: int
) -> Picture:
    """Images in rows: the image, the first component, and three more as colours of the foreground.

    Source: the figures of arXiv 2308.16271, appendix B.2.

    Args:
        shown: of `crate_jax.analysis.pca.foreground` over these images.
        pixels_BxHxWxc: the images, floats in [0, 1].
        grid: patches (down, across).
        layer: whose subspace tokens they are, counted from 1.
    """
    B = len(pixels_BxHxWxc)
    figure, panels = grid_of_axes(B, 3, side=1.1, top=0.08)
    for b in range(B):
        show_image(panels[b, 0], pixels_BxHxWxc[b])
        show_map(panels[b, 1], shown.scores_JxP[b].reshape(grid), largest=1.0)
        colours = np.concatenate([shown.colours_JxPx3[b], shown.masks_JxP[b][:, None]], axis=1)
        panels[b, 2].imshow(colours.reshape(*grid, 4))  # nothing where there is no foreground
        framed(panels[b, 2])
    for axes, title in zip(panels[0, 1:], ("first component", "three as colours"), strict=True):
        axes.set_title(title, fontsize=7)
    alt = (
        f"Principal components that the patches of {B} images share in layer {layer}. The first "
        f"has {number(shown.variance_4[0])} of the variance, the three that make the colours "
        f"{number(shown.variance_4[1:].sum())}. The foreground is {number(shown.masks_JxP.mean())} "
        "of the patches."
    )
    table = long_table(("image", "patch", "score"), shown.scores_JxP)
    for name, values in zip("rgb", np.moveaxis(shown.colours_JxPx3, -1, 0), strict=True):
        table[name] = values.ravel()
    return Picture(figure, alt, table | {"foreground": shown.masks_JxP.ravel().astype(int)})


@drawing
def segments(
    maps_BxKxRxC: np.ndarray,
    cuts: Sequence[Sequence[Cut]],
    pixels_BxHxWxc: np.ndarray,
    *,
    layer: int,
) -> Picture:
    """Images in rows: the image, the coarse mask of its sharpest head, and the objects of MaskCut.

    A coarse mask is the share of 0.6 of the patches that the class token looks at most.

    Args:
        maps_BxKxRxC: of `crate_jax.analysis.figures.attention.class_token_maps`, of one layer.
        cuts: of `crate_jax.analysis.maskcut.maskcut`, the objects of each image.
        pixels_BxHxWxc: the images, floats in [0, 1].
        layer: its number, counted from 1.
    """
    B, K, R, C = maps_BxKxRxC.shape
    flat_BxKxP = maps_BxKxRxC.reshape(B, K, R * C)
    sharpest_B = flat_BxKxP.max(axis=2).argmax(axis=1)
    masks_BxP = np.asarray(
        share_of_entries(jnp.asarray(flat_BxKxP[np.arange(B), sharpest_B], jnp.float32))
    )
    objects_BxP = np.zeros((B, R * C), int)
    for b, found in enumerate(cuts):
        for place, cut in enumerate(found, start=1):
            objects_BxP[b][cut.mask_P] = place
    figure, panels = grid_of_axes(B, 3, side=1.1, top=0.08)
    for b in range(B):
        show_image(panels[b, 0], pixels_BxHxWxc[b])
        _show_parts(panels[b, 1], masks_BxP[b].reshape(R, C).astype(int))
        _show_parts(panels[b, 2], objects_BxP[b].reshape(R, C))
        panels[b, 1].set_ylabel(f"head {sharpest_B[b] + 1}", fontsize=7)
    for axes, title in zip(panels[0, 1:], ("coarse mask", "MaskCut"), strict=True):
        axes.set_title(title, fontsize=7)
    counts = [len(found) for found in cuts]
    alt = (
        f"Segmentation of {B} images without training for it, in layer {layer}: the "
        f"{number(SHARE)} of the patches that the sharpest head looks at most, and {sum(counts)} "
        f"objects of MaskCut, {min(counts)} to {max(counts)} an image, in the order in which they "
        "were found."
    )
    table = long_table(("image", "patch", "mask"), masks_BxP.astype(int))
    return Picture(figure, alt, table | {"object": objects_BxP.ravel()})


def _show_parts(axes, parts_RxC: np.ndarray) -> None:
    """Each part in a colour, and nothing at 0."""
    from matplotlib.colors import to_rgba

    colours = np.array([(0.0, 0.0, 0.0, 0.0), *map(to_rgba, COLOURS)])
    axes.imshow(colours[np.minimum(parts_RxC, len(COLOURS))])
    framed(axes)
