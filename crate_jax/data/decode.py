"""Encoded images to pixels."""

import cv2
import numpy as np


def decode_image(data: bytes, *, channels: int, name: str = "image") -> np.ndarray:
    """Decode a JPEG, PNG, WebP or any other format that OpenCV reads.

    Grey images become RGB by repetition, colour images grey by luma; transparency is dropped and
    the EXIF orientation ignored, as the usual ImageNet pipelines do.

    Args:
        data: the file's bytes.
        channels: 1 (grey) or 3 (RGB).
        name: what an error calls the image.

    Returns:
        Pixels (H, W, channels), uint8.

    Raises:
        ValueError: the bytes are no image, or channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"model.in_channels must be 1 or 3 for encoded images; got {channels}. "
            "Store other images as arrays."
        )
    mode = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    buffer = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(buffer, mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # no bytes at all, or a header that promises more pixels than OpenCV allows
        image = None
    if image is None:
        raise ValueError(
            f"{name} must be an image; its {len(data)} bytes do not decode. Remove or replace it."
        )
    return image.reshape(*image.shape[:2], channels)
