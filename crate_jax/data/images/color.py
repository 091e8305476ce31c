"""Transforms of colours and not of places: the operations of Pillow's ImageOps and ImageEnhance.

torchvision's augmentations are defined by these. Images are (H, W, c) uint8 with c = 1 or 3, and
come out in the same shape.
"""

import cv2
import numpy as np

from crate_jax.data.images.resize import as_hwc

_LEVELS = np.arange(256, dtype=np.float32)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: factor 0 is black, 1 the image, more is brighter."""
    return _lookup(image, _LEVELS * factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey."""
    mean = np.float32(int(_grey(image).mean() + 0.5))
    return _lookup(image, mean + factor * (_LEVELS - mean))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image; a grey one stays as it is."""
    return image if image.shape[2] == 1 else _blend(_grey(image), image, factor)


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed image (3 x 3, the middle weighs 5 of 13); the border stays."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    smooth[1:-1, 1:-1] = as_hwc(cv2.filter2D(image, -1, kernel / 13))[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by a share of the circle; a grey image stays as it is."""
    if image.shape[2] == 1:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(shift * 255) % 256)  # wraps round, as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keep the highest bits of every value."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Invert what is at least the threshold."""
    return _lookup(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, amount: float, threshold: float = 128) -> np.ndarray:
    """Add to what is below the threshold."""
    return _lookup(image, np.where(threshold > _LEVELS, _LEVELS + amount, _LEVELS))


def invert(image: np.ndarray) -> np.ndarray:
    """Turn every value over."""
    return 255 - image


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to the whole range."""
    channels = []
    for channel in cv2.split(image):
        low, high = int(channel.min()), int(channel.max())
        if high > low:
            channel = _lookup(channel, (_LEVELS - low) * (255 / (high - low)))
        channels.append(channel)
    return as_hwc(cv2.merge(channels))


def equalize(image: np.ndarray) -> np.ndarray:
    """Make each channel's histogram flat."""
    channels = []
    for channel in cv2.split(image):
        counts = np.bincount(channel.ravel(), minlength=256)
        used = counts[counts > 0]
        step = int(used.sum() - used[-1]) // 255
        if step:
            below = np.concatenate([[0], np.cumsum(counts)[:-1]])
            channel = _lookup(channel, (below + step // 2) // step)
        channels.append(channel)
    return as_hwc(cv2.merge(channels))


def _lookup(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Replace each level by its value, cut off to whole numbers in [0, 255]."""
    return as_hwc(cv2.LUT(image, np.clip(values, 0, 255).astype(np.uint8))).reshape(image.shape)


def _blend(low: np.ndarray, high: np.ndarray, factor: float) -> np.ndarray:
    """Low + factor · (high − low), cut off to whole numbers in [0, 255]."""
    low32 = low.astype(np.float32)
    return np.clip(low32 + np.float32(factor) * (high - low32), 0, 255).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 1): the luma, as Pillow rounds it."""
    if image.shape[2] == 1:
        return image
    weights = np.array([[19595, 38470, 7471]], np.float32) / 65536
    return as_hwc(cv2.transform(image, weights))
