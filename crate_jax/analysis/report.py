"""The pictures of a checkpoint."""

from pathlib import Path

import numpy as np

from crate_jax.files import written_aside


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
