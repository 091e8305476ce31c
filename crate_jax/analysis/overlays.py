"""Pictures of masks, maps and components upon the image that they are of."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crate_jax.files import written_aside

# Colours of the masks in turn, RGB: distinct also for colour-blind people (Okabe & Ito).
COLOURS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [213, 94, 0], [0, 114, 178]],
    np.float64,
)
STRENGTH = 0.55  # of a colour upon the image
BETWEEN = 4  # white pixels between two panels
SMALLEST = 128  # pixels that a side should have: small images are enlarged
LARGEST = 1280  # pixels of a side that a picture to be looked at needs


def overlay(image_HxWxc: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """An image with masks upon it, each in a colour of its own, the last one on top.

    Args:
        image_HxWxc: uint8, of one channel or three.
        masks: (H, W) bool each.

    Returns:
        (H, W, 3), uint8.
    """
    shown = rgb(image_HxWxc).astype(np.float64)
    for place, mask_HxW in enumerate(masks):
        colour_3 = COLOURS[place % len(COLOURS)]
        shown[mask_HxW] = (1 - STRENGTH) * shown[mask_HxW] + STRENGTH * colour_3[None]
    return np.rint(shown).astype(np.uint8)


def heat(map_HxW: np.ndarray) -> np.ndarray:
    """Values >= 0 as light, the largest white, (H, W, 3) uint8; black where all are 0."""
    top = map_HxW.max()
    grey = np.rint(255 * map_HxW / (top if top > 0 else 1)).astype(np.uint8)
    return rgb(grey[..., None])


def rgb(image_HxWxc: np.ndarray) -> np.ndarray:
    """A grey image in three channels; one of three as it is."""
    return np.broadcast_to(image_HxWxc, (*image_HxWxc.shape[:2], 3))


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns in which an image is drawn: its own, or fewer of a large one.

    >>> shown_size(480, 640), shown_size(3000, 4000)
    ((480, 640), (960, 1280))
    """
    scale = min(1.0, LARGEST / max(height, width))
    return max(1, round(scale * height)), max(1, round(scale * width))


def write_panels(path: str | Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Write pictures of one size beside and below each other, small ones enlarged, as a PNG.

    Args:
        path: the file.
        rows: pictures (H, W, 3) uint8, as many in each row.
    """
    import cv2  # here: models and measures do without it

    height, width = rows[0][0].shape[:2]
    times = max(1, min(SMALLEST // min(height, width), LARGEST // max(height, width)))
    step = (times * height + BETWEEN, times * width + BETWEEN)
    sheet = np.full((len(rows) * step[0], len(rows[0]) * step[1], 3), 255, np.uint8)
    for i, j in np.ndindex(len(rows), len(rows[0])):
        large = rows[i][j].repeat(times, axis=0).repeat(times, axis=1)
        sheet[i * step[0] :, j * step[1] :][: step[0] - BETWEEN, : step[1] - BETWEEN] = large
    _, encoded = cv2.imencode(".png", sheet[:-BETWEEN, :-BETWEEN, ::-1])  # OpenCV's is BGR
    with written_aside(path) as aside:
        aside.write_bytes(encoded.tobytes())
