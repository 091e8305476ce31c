"""RandAugment: operations drawn at random, as torchvision and as timm define them."""

import functools
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


def timm_randaugment(
    image: np.ndarray,
    rng: np.random.Generator,
    num_ops: int = 2,
    magnitude: float = 9,
    magnitude_std: float = 0.0,
    probability: float = 0.5,
    fill: int | tuple[int, ...] = 128,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Apply timm's operations that grow with the magnitude, drawn at random.

    Each operation that is applied has a magnitude of its own: a draw of N(magnitude,
    magnitude_std²), cut off at 0 and 10. timm's ``rand-m9-mstd0.5-inc1`` is (2, 9, 0.5).

    Args:
        image: (H, W, c), uint8.
        rng: source of operations, magnitudes and signs.
        num_ops: how many are drawn, one after the other; each is one of fifteen.
        magnitude: 0 … 10: rotation to 30 degrees, shear to 0.3, shift to 0.45 of the side,
            enhancement by 1 ± 0.9, posterisation from 4 bits to none, solarisation from 256 to 0,
            addition of up to 110 to levels below 128. The other three have none.
        magnitude_std: standard deviation of the magnitude.
        probability: that an operation which was drawn is applied.
        fill: what comes in from outside: a level, or one a channel. timm's recipes take the mean
            pixel, for ImageNet (124, 116, 104).
        interpolation: "bilinear" or "bicubic", of rotation, shear and shift. DeiT's recipe takes
            bicubic.

    Differs from official: OpenCV's bicubic has Keys' a = −3/4, Pillow's −1.
    """
    warp = functools.partial(_smooth_warp, fill=fill, interpolation=interpolation)
    for _ in range(num_ops):
        name = list(TIMM)[rng.integers(len(TIMM))]
        if rng.random() < probability:
            share = np.clip(rng.normal(magnitude, magnitude_std), 0, 10) / 10
            sign = -1.0 if name in TIMM_SIGNED and rng.integers(2) else 1.0
            image = TIMM[name](image, sign * float(share), warp)
    return image


# Two rows of an affine map that takes places of the result to places of the image. Places are as
# Pillow counts them: the middle of the first pixel is at (1/2, 1/2).
Inverse = list[list[float]]


def _shear_x(factor: float) -> Inverse:
    return [[1, factor, 0], [0, 1, 0]]


def _shear_y(factor: float) -> Inverse:
    return [[1, 0, 0], [factor, 1, 0]]


def _shift(columns: float, rows: float) -> Inverse:
    return [[1, 0, columns], [0, 1, rows]]


def _rotation(image: np.ndarray, degrees: float) -> Inverse:
    """Counter-clockwise, about the middle."""
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin, cx - cos * cx + sin * cy], [sin, cos, cy - sin * cx - cos * cy]]


def _warp(
    image: np.ndarray,
    inverse: Inverse,
    *,
    flags: int = cv2.INTER_NEAREST,
    border: int = cv2.BORDER_CONSTANT,
) -> np.ndarray:
    """The nearest pixel, black from outside; or as OpenCV's flags and kind of border say."""
    matrix = np.array(inverse, np.float64)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV's first pixel is at (0, 0)
    size, flags = image.shape[1::-1], flags | cv2.WARP_INVERSE_MAP
    return as_hwc(cv2.warpAffine(image, matrix, size, flags=flags, borderMode=border))


def _smooth_warp(
    image: np.ndarray, inverse: Inverse, *, fill: int | tuple[int, ...], interpolation: str
) -> np.ndarray:
    """Interpolated; pixels whose middles come from outside are filled, and mixed with no others."""
    flags = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[interpolation]
    warped = _warp(image, inverse, flags=flags, border=cv2.BORDER_REPLICATE)
    inside = _warp(np.ones(image.shape[:2], np.uint8), inverse)
    warped[inside[:, :, 0] == 0] = fill
    return warped


# Each takes its amount as a share of the largest, negative for the other way.
RANDAUGMENT: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda x, m: x,
    "shear_x": lambda x, m: _warp(x, _shear_x(0.3 * m)),
    "shear_y": lambda x, m: _warp(x, _shear_y(0.3 * m)),
    "translate_x": lambda x, m: _warp(x, _shift(-int(150 / 331 * x.shape[1] * m), 0)),
    "translate_y": lambda x, m: _warp(x, _shift(0, -int(150 / 331 * x.shape[0] * m))),
    "rotate": lambda x, m: _warp(x, _rotation(x, 30 * m)),
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


Warp = Callable[[np.ndarray, Inverse], np.ndarray]
# Likewise; and what to warp with.
TIMM: dict[str, Callable[[np.ndarray, float, Warp], np.ndarray]] = {
    "autocontrast": lambda x, m, warp: color.autocontrast(x),
    "equalize": lambda x, m, warp: color.equalize(x),
    "invert": lambda x, m, warp: color.invert(x),
    "posterize": lambda x, m, warp: color.posterize(x, 4 - int(4 * m)),
    "solarize": lambda x, m, warp: color.solarize(x, 256 - int(256 * m)),
    "solarize_add": lambda x, m, warp: color.solarize_add(x, int(110 * m)),
    "color": lambda x, m, warp: color.adjust_saturation(x, 1 + 0.9 * m),
    "contrast": lambda x, m, warp: color.adjust_contrast(x, 1 + 0.9 * m),
    "brightness": lambda x, m, warp: color.adjust_brightness(x, 1 + 0.9 * m),
    "sharpness": lambda x, m, warp: color.adjust_sharpness(x, 1 + 0.9 * m),
    "rotate": lambda x, m, warp: warp(x, _rotation(x, 30 * m)),
    "shear_x": lambda x, m, warp: warp(x, _shear_x(0.3 * m)),
    "shear_y": lambda x, m, warp: warp(x, _shear_y(0.3 * m)),
    "translate_x": lambda x, m, warp: warp(x, _shift(0.45 * m * x.shape[1], 0)),
    "translate_y": lambda x, m, warp: warp(x, _shift(0, 0.45 * m * x.shape[0])),
}
TIMM_SIGNED = tuple(TIMM)[6:]
