"""Maps of the class token's attention on images, and the mean response of each head."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from crate_jax.analysis.figures.canvas import (
    Picture,
    drawing,
    framed,
    grid_of_axes,
    long_table,
    number,
)

MOST_KINDS = 10


def class_token_maps(seen: Mapping[str, np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """The attention of the class token, (L, B, K, rows, columns), each map with a sum of one.

    It is the row of the class token in the attention. TSSA compares no tokens: there it is how far
    each token belongs to the subspace.
    Source: arXiv 2308.16271 for attention, arXiv 2412.17810 for membership.

    Args:
        seen: taps, ``attention`` (L, B, K, N, N) or ``membership`` (L, B, K, N).
        grid: patches (down, across). N is their number, or one more for the class token in front.
    """
    P = grid[0] * grid[1]
    maps_LxBxKxN = seen["attention"][:, :, :, 0] if "attention" in seen else seen["membership"]
    maps = np.asarray(maps_LxBxKxN, np.float64)[..., -P:]
    maps = maps / np.maximum(maps.sum(axis=-1, keepdims=True), 1e-30)
    return maps.reshape(*maps.shape[:3], *grid)


@drawing
def saliency(
    maps_BxKxRxC: np.ndarray, pixels_BxHxWxc: np.ndarray, *, layer: int, head: int | None = None
) -> Picture:
    """The images, and beside each the map of every head.

    Args:
        maps_BxKxRxC: of `class_token_maps`, of one layer.
        pixels_BxHxWxc: the images, floats in [0, 1].
        layer: its number, for the sentence, counted from 1.
        head: the only one to draw, counted from 1; None: all.
    """
    B, K = maps_BxKxRxC.shape[:2]
    heads = list(range(K)) if head is None else [head - 1]
    figure, panels = grid_of_axes(B, 1 + len(heads), side=0.95, top=0.08)
    for b in range(B):
        show_image(panels[b, 0], pixels_BxHxWxc[b])
        for place, k in enumerate(heads, start=1):
            show_map(panels[b, place], maps_BxKxRxC[b, k])
    for place, k in enumerate(heads, start=1):
        panels[0, place].set_title(f"{k + 1}" if len(heads) > 8 else f"head {k + 1}", fontsize=8)
    shown = maps_BxKxRxC[:, heads]
    share_K = _entropy(shown).mean(axis=0) / max(np.log(shown[0, 0].size), 1e-12)
    sharpest = heads[int(share_K.argmin())] + 1
    alt = (
        f"Where the class token looks in layer {layer}: {B} images, and of each the map of "
        + (f"{K} heads. " if head is None else f"head {head}. ")
        + f"The maps' entropy is {number(share_K.min())} to {number(share_K.max())} of that of an "
        f"even look; head {sharpest} looks most sharply."
    )
    table = long_table(("image", "head", "row", "column", "share"), shown)
    return Picture(figure, alt, table | {"head": np.asarray(heads)[table["head"] - 1] + 1})


@drawing
def heads_by_kind(maps_BxKxRxC: np.ndarray, kind_of_B: Sequence[str], *, layer: int) -> Picture:
    """Draw the mean map of each head over the images of each kind.

    Below each map stands where the head looks more than on the average image: the largest excess of
    its mean map over that of all images, times the number of patches.

    Args:
        maps_BxKxRxC: of `class_token_maps`, of one layer.
        kind_of_B: the class, or the folder, of each image. At most ten kinds are drawn: the first
            by name, where numbers stand in the order of their values.
        layer: its number, counted from 1.
    """
    known = sorted(set(kind_of_B), key=_natural)
    kinds = known[:MOST_KINDS]
    K, P = maps_BxKxRxC.shape[1], maps_BxKxRxC[0, 0].size
    means_JxKxRxC = np.stack(
        [maps_BxKxRxC[np.asarray(kind_of_B) == kind].mean(axis=0) for kind in kinds]
    )
    all_KxRxC = maps_BxKxRxC.mean(axis=0)
    excess_JxK = P * (means_JxKxRxC - all_KxRxC).max(axis=(2, 3))
    figure, panels = grid_of_axes(K, len(kinds) + 1, side=0.85, top=0.16)
    for k in range(K):
        show_map(panels[k, 0], all_KxRxC[k])
        panels[k, 0].set_title(f"head {k + 1}: all", fontsize=7)
        largest = means_JxKxRxC[:, k].max()
        for j, kind in enumerate(kinds):
            show_map(panels[k, j + 1], means_JxKxRxC[j, k], largest=largest)
            panels[k, j + 1].set_title(f"{kind}: {number(excess_JxK[j, k])}", fontsize=7)
    most = np.unravel_index(excess_JxK.argmax(), excess_JxK.shape)
    alt = (
        f"Mean maps of {K} heads in layer {layer} over {len(kind_of_B)} images of {len(known)} "
        f"kinds; {len(kinds)} kinds are drawn. Head {most[1] + 1} leaves its mean most for "
        f"{kinds[most[0]]}, by "
        f"{number(excess_JxK.max())} times an even share."
    )
    table = long_table(("kind", "head", "row", "column", "share"), means_JxKxRxC)
    return Picture(figure, alt, table | {"kind": np.asarray(kinds)[table["kind"] - 1]})


def _natural(kind: str) -> list[tuple[int, str]]:
    """A key to sort by: 2 comes before 10, also where they stand within names."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", kind)
    ]


@drawing
def picture_rows(pixels_nxHxWxc: np.ndarray, name: str) -> Picture:
    """Pictures below each other, such as an original beside what a model made of it.

    Args:
        pixels_nxHxWxc: floats in [0, 1].
        name: what they are called.
    """
    n, H, W, _ = pixels_nxHxWxc.shape
    figure, panels = grid_of_axes(n, 1, side=0.9, top=0.06)
    figure.set_figwidth(0.9 * W / H + 0.1)
    for axes, pixels in zip(panels[:, 0], pixels_nxHxWxc, strict=True):
        show_image(axes, pixels)
    alt = f"{n} pictures of {H} x {W} pixels: {name}."
    means = pixels_nxHxWxc.reshape(n, -1).mean(axis=1)
    return Picture(figure, alt, {"picture": np.arange(1, n + 1), "mean": means})


def show_image(axes, pixels_HxWxc: np.ndarray) -> None:
    """An image of one or three channels."""
    if pixels_HxWxc.shape[-1] == 1:
        axes.imshow(pixels_HxWxc[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(np.clip(pixels_HxWxc, 0, 1))
    framed(axes)


def show_map(axes, map_RxC: np.ndarray, *, largest: float | None = None) -> None:
    """A map, dark where it is zero and yellow at its largest."""
    axes.imshow(map_RxC, cmap="viridis", vmin=0, vmax=largest)
    framed(axes)


def _entropy(maps: np.ndarray) -> np.ndarray:
    """The entropy of maps (…, R, C), in nats."""
    flat = maps.reshape(*maps.shape[:-2], -1)
    return -(flat * np.log(np.maximum(flat, 1e-30))).sum(axis=-1)
