"""Per-example transforms in NumPy and OpenCV; randomness is passed in.

Every transform takes an image (H, W, c), uint8, and a
`numpy.random.Generator`, and returns an image (H', W', c), uint8. Sizes are pixels: one number for
a square, two for (height, width). Where torchvision has a transform of that name, this has its
distribution.
"""

import math

import cv2
import numpy as np

from crate_jax.data.images import color
from crate_jax.data.images.decode import MAX_PIXELS, EncodedImage
from crate_jax.data.images.resize import as_hwc, resize_pixels

Size = int | tuple[int, int]


class UnfitImageError(ValueError):
    """A transform cannot be applied to this image."""


def resize(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> np.ndarray:
    """Resize to a fixed size, "bilinear" or "bicubic"; see `resize_pixels`."""
    return resize_pixels(image, _pair(size), interpolation=interpolation, antialias=antialias)


def resize_shorter(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> np.ndarray:
    """Resize so that the shorter side is `size`; the aspect ratio stays.

    Raises:
        UnfitImageError: the longer side would be so long that the image has more than `MAX_PIXELS`.
    """
    height, width = image.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    if size * longer > MAX_PIXELS:
        raise UnfitImageError(
            f"resize_shorter({size}) must give at most {MAX_PIXELS} pixels; got an image of "
            f"{height}x{width}. Crop or remove it."
        )
    target = (size, longer) if height < width else (longer, size)
    return resize(image, rng, target, interpolation, antialias)


def center_crop(image: np.ndarray, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Cut the central window out.

    Raises:
        UnfitImageError: the image is smaller.
    """
    height, width = _pair(size)
    if image.shape[0] < height or image.shape[1] < width:
        raise UnfitImageError(
            f"center_crop must get images of at least {height}x{width}; got "
            f"{image.shape[0]}x{image.shape[1]}. Put resize_shorter before it."
        )
    top = round((image.shape[0] - height) / 2)
    left = round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def random_resized_crop(
    image: np.ndarray | EncodedImage,
    rng: np.random.Generator,
    size: Size,
    min_area: float = 0.08,
    max_area: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> np.ndarray:
    """Crop a window of random area and aspect ratio and resize it.

    The area is a uniform share of the image's, the ratio (width / height) log-uniform; after ten
    windows that do not fit, the largest central window of the nearest allowed ratio is taken. An
    image that is encoded still is decoded no finer than the window needs.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(min_area, max_area)
        ratio = math.exp(rng.uniform(math.log(min_ratio), math.log(max_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:
        ratio = min(max(width / height, min_ratio), max_ratio)
        w = max(1, min(width, round(height * ratio)))
        h = max(1, min(height, round(width / ratio)))
        top, left = (height - h) // 2, (width - w) // 2
    if isinstance(image, EncodedImage):
        window = image.window(top, left, h, w, _pair(size))
    else:
        window = image[top : top + h, left : left + w]
    return resize(window, rng, size, interpolation, antialias)


def random_flip(
    image: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Mirror left and right with a probability."""
    return as_hwc(cv2.flip(image, 1)) if rng.random() < probability else image


def random_affine(
    image: np.ndarray,
    rng: np.random.Generator,
    degrees: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
) -> np.ndarray:
    """Rotate, scale, shear and shift about the centre, each by a uniform random amount.

    Args:
        image: (H, W, c), uint8; what comes in from outside is black.
        rng: source of the amounts.
        degrees: largest rotation, either way.
        shift: largest shift, either way, as a share of the side.
        scale: largest change of the size, either way, as a share.
        shear: largest horizontal shear, either way, in degrees.
    """
    height, width = image.shape[:2]
    angle, slant = np.radians(rng.uniform(-1, 1, 2) * (degrees, shear))
    size = 1 + rng.uniform(-scale, scale)
    dx, dy = rng.uniform(-shift, shift, 2) * (width, height)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = size * rotation @ np.array([[1, np.tan(slant)], [0, 1]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + (dx, dy)
    return as_hwc(cv2.warpAffine(image, np.column_stack([linear, offset]), (width, height)))


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> np.ndarray:
    """Change four properties in random order: factors within 1 ± amount (not below 0), hue ± hue.

    Hue is a share of the circle, at most 0.5. With a probability below 1 some images stay as they
    are.
    """
    if probability < 1 and rng.random() >= probability:
        return image
    for i in rng.permutation(4):
        if i == 3 and hue:
            image = color.adjust_hue(image, rng.uniform(-hue, hue))
        elif i < 3 and (amount := (brightness, contrast, saturation)[i]):
            adjust = (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation)[i]
            image = adjust(image, rng.uniform(max(0.0, 1 - amount), 1 + amount))
    return image


def random_grayscale(
    image: np.ndarray, rng: np.random.Generator, probability: float = 0.1
) -> np.ndarray:
    """Take the colours away with a probability; the number of channels stays."""
    return color.adjust_saturation(image, 0.0) if rng.random() < probability else image


def random_solarize(
    image: np.ndarray, rng: np.random.Generator, threshold: float = 128, probability: float = 0.5
) -> np.ndarray:
    """Invert the values from a threshold on, with a probability."""
    return color.solarize(image, threshold) if rng.random() < probability else image


def random_blur(
    image: np.ndarray,
    rng: np.random.Generator,
    min_sigma: float = 0.1,
    max_sigma: float = 2.0,
    probability: float = 0.5,
) -> np.ndarray:
    """Blur by a Gaussian of random deviation in pixels, with a probability."""
    if rng.random() >= probability:
        return image
    sigma = rng.uniform(min_sigma, max_sigma)
    return as_hwc(cv2.GaussianBlur(image, (0, 0), sigma))


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 0.33,
    min_ratio: float = 0.3,
    max_ratio: float = 3.3,
    value: int | tuple[int, ...] | str = 128,
    deviation: float | tuple[float, ...] = 0,
) -> np.ndarray:
    """Fill a window of random area and aspect ratio, with a probability (arXiv 1708.04896).

    torchvision erases normalised images, where 0 is the data set's mean pixel: give 255 times
    that mean, for ImageNet (124, 116, 104). A deviation fills with normal random pixels about the
    value, ``"noise"`` with uniform ones. timm's mode ``pixel`` is of deviation 1 after
    normalisation: give 255 times that of the data set, for ImageNet (58, 57, 57).
    Differs from official: a random pixel is cut off at black and white.
    """
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(min_area, max_area)
        ratio = math.exp(rng.uniform(math.log(min_ratio), math.log(max_ratio)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()
            image[top : top + h, left : left + w] = _fill(rng, (h, w, channels), value, deviation)
            break
    return image


def _fill(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    value: int | tuple[int, ...] | str,
    deviation: float | tuple[float, ...],
) -> np.ndarray | int | tuple[int, ...]:
    """The filling of an erased window; see `random_erasing`."""
    if isinstance(value, str):
        return rng.integers(0, 256, shape, np.uint8)
    if not np.any(deviation):
        return value
    return np.clip(np.rint(rng.normal(value, deviation, shape)), 0, 255).astype(np.uint8)


def _pair(size: Size) -> tuple[int, int]:
    """One number for a square, two for (height, width)."""
    return (size, size) if isinstance(size, int) else size
