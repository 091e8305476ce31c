"""The pictures of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from crate_jax.files import written_aside


def by_layer(scalars: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """The measures of the objective, an array (L,) each.

    Args:
        scalars: ``objective/<measure>/layer00`` … of `Task.inspect`; others are left out.
    """
    found: dict[str, list[float]] = {}
    for name in sorted(scalars):
        if name.startswith("objective/"):
            found.setdefault(name.split("/")[1], []).append(np.asarray(scalars[name]).item())
    return {name: np.array(values) for name, values in found.items()}


def draw_rows(pictures: np.ndarray, path: str | Path) -> None:
    """Write pictures below each other, small ones enlarged.

    Args:
        pictures: (n, H, W, c), floats in [0, 1] or uint8, of 1 or 3 channels.
        path: picture file; its suffix names the format.

    Raises:
        ValueError: OpenCV writes no such format.
    """
    import cv2  # here: models and measures do without it

    n, height, width, channels = pictures.shape
    pixels = pictures if pictures.dtype == np.uint8 else np.round(255 * pictures).astype(np.uint8)
    rows = pixels.reshape(n * height, width, channels)
    times = max(1, 128 // height)
    enlarged = rows.repeat(times, axis=0).repeat(times, axis=1)
    suffix = Path(path).suffix
    try:
        _, encoded = cv2.imencode(suffix, enlarged[..., ::-1])  # OpenCV's order is BGR
    except cv2.error as error:
        raise ValueError(
            f"the picture must be a file of a known format; got {path}. End it in .png."
        ) from error
    with written_aside(path) as aside:
        aside.write_bytes(encoded.tobytes())


def draw_layerwise(values: Mapping[str, np.ndarray], path: str | Path, *, title: str) -> None:
    """Draw R^c and sparsity over the layers, as figure 3 of arXiv 2306.01129 does.

    A model without subspaces has R in the place of R^c; one that makes nothing sparse has no second
    panel.

    Args:
        values: of `layerwise` by the paper's definition, arrays (L,).
        path: picture file; its suffix names the format.
        title: what was measured.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "report must have matplotlib to draw with; it is missing. "
            "Install it: pip install 'crate-jax[plot]'"
        ) from error
    panels = 1 + ("zero_fraction" in values)
    figure = Figure(figsize=(4 * panels, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rate, *zeros = figure.subplots(1, panels, squeeze=False)[0]
    layers = np.arange(1, len(values["rate_mean"]) + 1)
    if "coding_rate_mean" in values:
        mean, std = np.asarray(values["coding_rate_mean"]), np.asarray(values["coding_rate_std"])
        rate.fill_between(layers, mean - std, mean + std, alpha=0.2, color="tab:blue", linewidth=0)
        rate.set(title="compression", ylabel=r"$R^c(Z^{\ell+1/2};\,U^{\ell})$ in nats")
    else:
        mean = np.asarray(values["rate_mean"])
        rate.set(title="coding rate", ylabel=r"$R(Z^{\ell+1/2})$ in nats")
    rate.plot(layers, mean, marker="o", color="tab:blue")
    for axes in zeros:
        axes.plot(layers, np.asarray(values["zero_fraction"]), marker="o", color="tab:orange")
        axes.set(title="sparsification", ylabel="share of zeros")
    for axes in (rate, *zeros):
        axes.set(xlabel=r"layer $\ell$", xticks=layers)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    with written_aside(path) as aside:
        figure.savefig(aside, format=Path(path).suffix[1:] or "png")
