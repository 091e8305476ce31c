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
