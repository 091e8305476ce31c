"""Per-example transforms in NumPy and OpenCV; randomness is passed in.

A pipeline is written as ``name(arguments)|name(arguments)``, for example
``random_resized_crop(224)|random_flip()``. Every transform takes an image (H, W, c), uint8, and a
`numpy.random.Generator`, and returns an image (H', W', c), uint8. Sizes are pixels: one number for
a square, two for (height, width).
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable

import cv2
import numpy as np

from crate_jax.config import did_you_mean

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Size = int | tuple[int, int]


def resize(image: np.ndarray, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Resize to a fixed size: bilinear, or by pixel areas where it shrinks."""
    height, width = (size, size) if isinstance(size, int) else size
    shrinks = height * width < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return _as_hwc(cv2.resize(image, (width, height), interpolation=method))


def resize_shorter(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Resize so that the shorter side is `size`; the aspect ratio stays."""
    height, width = image.shape[:2]
    if height < width:
        return resize(image, rng, (size, int(size * width / height)))
    return resize(image, rng, (int(size * height / width), size))


def center_crop(image: np.ndarray, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Cut the central window out; the image must be at least as large."""
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[0] < height or image.shape[1] < width:
        raise ValueError(
            f"center_crop must get images of at least {height}x{width}; got "
            f"{image.shape[0]}x{image.shape[1]}. Put resize_shorter before it."
        )
    top = round((image.shape[0] - height) / 2)
    left = round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    min_area: float = 0.08,
    max_area: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
) -> np.ndarray:
    """Crop a window of random area and aspect ratio and resize it; torchvision's distribution.

    The area is a uniform share of the image's, the ratio (width / height) log-uniform; after ten
    windows that do not fit, the largest central window of the nearest allowed ratio is taken.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(min_area, max_area)
        ratio = math.exp(rng.uniform(math.log(min_ratio), math.log(max_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:
        ratio = min(max(width / height, min_ratio), max_ratio)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], rng, size)


def random_flip(
    image: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Mirror left and right with a probability."""
    return image[:, ::-1] if rng.random() < probability else image


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
    return _as_hwc(cv2.warpAffine(image, np.column_stack([linear, offset]), (width, height)))


TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (resize, resize_shorter, center_crop, random_resized_crop, random_flip, random_affine)
}


def parse_transforms(spec: str, field: str) -> list[Transform]:
    """The transforms that a pipeline string names, with their arguments bound.

    Args:
        spec: "name(arguments)|name(arguments)"; empty for none.
        field: what errors call the string, such as ``data.train_transforms``.

    Raises:
        KeyError: an unknown transform; the nearest known one is suggested.
        ValueError: a part is not a call with literal arguments, or they do not fit the transform.
    """
    transforms = []
    for part in filter(None, (p.strip() for p in spec.split("|"))):
        try:
            call = ast.parse(part, mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                raise ValueError(part)
            args = [ast.literal_eval(a) for a in call.args]
            kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"{field} must be name(arguments)|name(arguments); got {part}. "
                "Write for example resize(224)|random_flip()."
            ) from error
        if call.func.id not in TRANSFORMS:
            raise KeyError(
                f"{field} must name known transforms; got {call.func.id}. "
                + did_you_mean(call.func.id, TRANSFORMS)
            )
        function = TRANSFORMS[call.func.id]
        signature = inspect.signature(function)
        try:
            bound = signature.bind(None, None, *args, **kwargs)
        except TypeError as error:
            options = ", ".join(list(signature.parameters)[2:])
            raise ValueError(f"{field}: {part} does not fit {call.func.id}({options}).") from error
        transforms.append(functools.partial(function, **dict(list(bound.arguments.items())[2:])))
    return transforms


def _as_hwc(image: np.ndarray) -> np.ndarray:
    """OpenCV drops the channel axis of grey images; put it back."""
    return image[:, :, None] if image.ndim == 2 else image
