"""RandAugment: operations drawn at random, with torchvision's bins."""

import math
from collections.abc import Callable

import cv2
import numpy as np

from crate_jax.data.images import color
from crate_jax.data.images.resize import as_hwc


def randaugment(
    image: np.ndarray, rng: np.random.Generator, num_ops: int = 2, magnitude: int = 9
) -> np.ndarray:
    """Apply operations drawn at random, all at one magnitude (Cubuk et al., arXiv 1909.13719).

    Args:
        image: (H, W, c), uint8; what comes in from outside is black.
        rng: source of operations and signs.
        num_ops: how many, one after the other; each is one of fourteen, identity among them.
        magnitude: 0 … 30, one of 31 bins: rotation to 30 degrees, shear to 0.3, shift to 150/331
            of the side, enhancement by 1 ± 0.9, posterisation to 4 bits, solarisation to 0.
    """
    if not 0 <= magnitude <= 30:
        raise ValueError(f"randaugment's magnitude must be in 0 … 30; got {magnitude}.")
    for _ in range(num_ops):
        name = list(RANDAUGMENT)[rng.integers(len(RANDAUGMENT))]
        sign = -1.0 if name in SIGNED and rng.integers(2) else 1.0
        image = RANDAUGMENT[name](image, sign * magnitude / 30)
    return image


def _warp(image: np.ndarray, inverse: list[list[float]]) -> np.ndarray:
    """Nearest-pixel affine map; `inverse` takes places of the result to places of the image.

    Places are as Pillow counts them: the middle of the first pixel is at (1/2, 1/2).
    """
    matrix = np.array(inverse, np.float64)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV's first pixel is at (0, 0)
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return as_hwc(cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags))


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise, about the middle."""
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(
        image, [[cos, -sin, cx - cos * cx + sin * cy], [sin, cos, cy - sin * cx - cos * cy]]
    )


def _shift(image: np.ndarray, columns: int, rows: int) -> np.ndarray:
    return _warp(image, [[1, 0, -columns], [0, 1, -rows]])


# Each takes its amount as a share of the largest, negative for the other way.
RANDAUGMENT: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda x, m: x,
    "shear_x": lambda x, m: _warp(x, [[1, 0.3 * m, 0], [0, 1, 0]]),
    "shear_y": lambda x, m: _warp(x, [[1, 0, 0], [0.3 * m, 1, 0]]),
    "translate_x": lambda x, m: _shift(x, int(150 / 331 * x.shape[1] * m), 0),
    "translate_y": lambda x, m: _shift(x, 0, int(150 / 331 * x.shape[0] * m)),
    "rotate": lambda x, m: _rotate(x, 30 * m),
    "brightness": lambda x, m: color.adjust_brightness(x, 1 + 0.9 * m),
    "color": lambda x, m: color.adjust_saturation(x, 1 + 0.9 * m),
    "contrast": lambda x, m: color.adjust_contrast(x, 1 + 0.9 * m),
    "sharpness": lambda x, m: color.adjust_sharpness(x, 1 + 0.9 * m),
    "posterize": lambda x, m: color.posterize(x, 8 - round(4 * m)),
    "solarize": lambda x, m: color.solarize(x, 255 * (1 - m)),
    "autocontrast": lambda x, m: color.autocontrast(x),
    "equalize": lambda x, m: color.equalize(x),
}
SIGNED = tuple(RANDAUGMENT)[1:10]
