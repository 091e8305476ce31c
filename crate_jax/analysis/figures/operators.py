"""Several models on the same images: MSSA or MHSA with ISTA or an MLP, side by side."""

from collections.abc import Mapping

import numpy as np

from crate_jax.analysis.figures.attention import show_image, show_map
from crate_jax.analysis.figures.canvas import Picture, drawing, grid_of_axes, long_table, number


@drawing
def side_by_side(
    maps: Mapping[str, np.ndarray], pixels_BxHxWxc: np.ndarray, *, layer: str = "the last layer"
) -> Picture:
    """The images in rows, and in each column where a model looks: the mean map of its heads.

    Source: the figures of arXiv 2308.16271, section 4.3, which set the four operators side by side.

    Args:
        maps: (B, K, rows, columns) of `crate_jax.analysis.figures.attention.class_token_maps`, of
            one layer, by the model's name.
        pixels_BxHxWxc: the images, floats in [0, 1].
        layer: its number, for the sentence.
    """
    B = len(pixels_BxHxWxc)
    figure, panels = grid_of_axes(B, 1 + len(maps), side=1.1, top=0.08)
    sentences, tables = [], []
    for b in range(B):
        show_image(panels[b, 0], pixels_BxHxWxc[b])
    for place, (name, maps_BxKxRxC) in enumerate(maps.items(), start=1):
        mean_BxRxC = maps_BxKxRxC.mean(axis=1)
        for b in range(B):
            show_map(panels[b, place], mean_BxRxC[b])
        panels[0, place].set_title(name, fontsize=7)
        flat = maps_BxKxRxC.reshape(B, maps_BxKxRxC.shape[1], -1)
        top = np.sort(flat, axis=-1)[..., -max(1, flat.shape[-1] // 10) :].sum(axis=-1).mean()
        sentences.append(f"{name}: {number(top)}")
        table = long_table(("image", "row", "column", "share"), mean_BxRxC)
        tables.append({"model": np.full(mean_BxRxC.size, name)} | table)
    alt = (
        f"Where the class token of {len(maps)} models looks on {B} images in {layer}, as the mean "
        "over heads. The share of a head's look that falls on its first tenth of the patches is "
        + ", ".join(sentences)
        + "."
    )
    joined = {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}
    return Picture(figure, alt, joined)
