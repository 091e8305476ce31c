"""Stored images to pixels: JPEG by libjpeg-turbo, other files by OpenCV, and arrays."""

import re
import struct
from typing import Any

import cv2
import numpy as np
import simplejpeg

from crate_jax.data.rows import BadExampleError

# A header may promise any number of pixels; more than this is refused before memory is asked for.
MAX_PIXELS = 2**27

TIFF = (b"II*\0", b"MM\0*")
JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how files begin
END = b"\xff\xd9"  # how a JPEG ends
# The first bytes of files of floats that OpenCV reads: PFM, Radiance.
FLOATS = (b"Pf", b"PF", b"#?")
# Of PGM and PPM: width, height and the level that is white, with comments between them.
NETPBM = re.compile(rb"P[2356]" + 3 * rb"(?:\s+(?:#[^\n]*\n\s*)*)(\d+)")


class EncodedImage:
    """The bytes of an image. Only the pixels that are asked for are decoded.

    Grey images become RGB by repetition, colour images grey by luma; transparency is dropped and
    the EXIF orientation ignored, as the usual ImageNet pipelines do. Of 16 bits the upper 8 count,
    as for libpng and tf.image.decode_png.

    Args:
        data: the file's bytes: JPEG, PNG, WebP or any other format that OpenCV reads.
        channels: 1 (grey) or 3 (RGB).
        name: the name of the image in errors.
        fast: take libjpeg-turbo's quicker inverse transform and chroma upsampling, which change
            pixels by a few of 255, decode no rows below a window, and a large window at a half, a
            quarter or an eighth of its size. For training; evaluation wants the pixels that every
            decoder agrees on.

    Raises:
        ValueError: channels is neither 1 nor 3.
        BadExampleError: the header says none or more than `MAX_PIXELS` pixels; or, by `shape`,
            `pixels` and `window`, the bytes are no image, or one of other than 8 or 16 bits.
        MemoryError: by the same, OpenCV gets too little memory.
    """

    def __init__(self, data: bytes, *, channels: int, name: str = "image", fast: bool = False):
        if channels not in (1, 3):
            raise ValueError(
                f"model.in_channels must be 1 or 3 for encoded images; got {channels}. "
                "Store other images as arrays."
            )
        self._data, self._channels, self._name, self._fast = data, channels, name, fast
        self._size = _declared_size(data)
        if self._size is not None and not 0 < self._size[0] * self._size[1] <= MAX_PIXELS:
            raise BadExampleError(
                f"{name} must have 1 … {MAX_PIXELS} pixels; its header says "
                f"{self._size[0]}x{self._size[1]}. Remove or shrink it."
            )
        self._pixels: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, channels); of a JPEG or PNG without decoding it."""
        if self._size is None or self._pixels is not None:
            return self.pixels().shape  # type: ignore[return-value]
        return (*self._size, self._channels)

    def pixels(self) -> np.ndarray:
        """The whole image (H, W, channels), uint8."""
        if self._pixels is None:
            pixels = self._decode_jpeg()
            self._pixels = self._decode_any() if pixels is None else pixels
        return self._pixels

    def window(
        self, top: int, left: int, height: int, width: int, size: tuple[int, int]
    ) -> np.ndarray:
        """The pixels of a window that is about to be resized.

        Args:
            top: first row.
            left: first column.
            height: rows.
            width: columns.
            size: (height, width) that the window is resized to. A fast image may come reduced by
                2, 4 or 8, but never below it.

        Returns:
            Pixels (h, w, channels), uint8; h = height and w = width unless reduced.
        """
        reduction, pixels = 1, None
        if self._fast and self._pixels is None:
            spare = min(height / size[0], width / size[1])
            reduction = next((f for f in (8, 4, 2) if spare >= f), 1)
            pixels = self._decode_jpeg(reduction, rows=top + height)
        if pixels is None:
            reduction, pixels = 1, self.pixels()
        bottom, right = -(-(top + height) // reduction), -(-(left + width) // reduction)
        return pixels[top // reduction : bottom, left // reduction : right]

    def _decode_jpeg(self, reduction: int = 1, rows: int | None = None) -> np.ndarray | None:
        """A JPEG's pixels, at least so many rows; None: it is none, or is damaged."""
        if self._data[:2] != JPEG or self._size is None:
            return None
        (height, width), data = self._size, self._data
        above = height if rows is None else -(-rows // 16) * 16  # 16 rows are coded together
        if above < height and (shorter := _shortened(data, above)) is not None:
            height, data = above, shorter
        try:
            return simplejpeg.decode_jpeg(
                data,
                "GRAY" if self._channels == 1 else "RGB",
                fastdct=self._fast,
                fastupsample=self._fast,
                min_height=-(-height // reduction) if reduction > 1 else 0,
                min_width=-(-width // reduction) if reduction > 1 else 0,
                strict=data is self._data,  # what follows the rows of a shorter one is no damage
            )
        except ValueError:
            return None

    def _decode_any(self) -> np.ndarray:
        """The pixels of whatever OpenCV reads: untidy JPEGs too, of which ImageNet has some."""
        mode = cv2.IMREAD_GRAYSCALE if self._channels == 1 else cv2.IMREAD_COLOR_RGB
        buffer = np.frombuffer(self._data, np.uint8)
        try:
            image = cv2.imdecode(buffer, mode | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error as error:  # no bytes, or a header that promises more than OpenCV allows
            if error.code == cv2.Error.StsNoMem:
                raise MemoryError(error.err) from error
            image = None
        if other := _other_levels(self._data, decoded=image is not None):
            raise BadExampleError(
                f"{self._name} must have levels of 8 or 16 bits; got {other}. Save it as PNG."
            )
        if image is not None and self._data.startswith(TIFF):
            _check_tiff(buffer, self._name)
        if image is None:
            raise BadExampleError(
                f"{self._name} must be an image; its {len(self._data)} bytes do not decode. "
                "Remove or replace it."
            )
        return image.reshape(*image.shape[:2], self._channels)


def array_pixels(image: np.ndarray, *, channels: int, name: str = "image") -> np.ndarray:
    """The pixels of a stored array, as an encoded image has them.

    Of uint16 the upper 8 bits count, floats from 0 to 1 become levels from 0 to 255 (rounded), and
    False and True are 0 and 255. Grey images become RGB and colour images grey.

    Args:
        image: (H, W) or (H, W, c).
        channels: c of the result; 1 and 3 are made of each other.
        name: the name of the image in errors.

    Returns:
        (H, W, channels), uint8.

    Raises:
        ValueError: the array has another type, rank or number of channels.
        BadExampleError: it has none or more than `MAX_PIXELS` pixels, or floats beyond 0 and 1.
    """
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be an array of (height, width, channels); got {image.shape}. "
            "Choose another feature, or store single images."
        )
    pixels = image if image.ndim == 3 else image[:, :, None]
    height, width, found = pixels.shape
    if not 0 < height * width <= MAX_PIXELS:
        raise BadExampleError(
            f"{name} must have 1 … {MAX_PIXELS} pixels; it has {height}x{width}. Remove or "
            "shrink it."
        )
    if found != channels and {found, channels} != {1, 3}:
        raise ValueError(
            f"{name} must have {channels} channels, as model.in_channels says; got {found}. "
            f"Set --config.model.in_channels={found}, or store it otherwise."
        )
    pixels = _levels(pixels, name)
    if found == channels:
        return pixels
    code = cv2.COLOR_GRAY2RGB if found == 1 else cv2.COLOR_RGB2GRAY
    return cv2.cvtColor(np.ascontiguousarray(pixels), code).reshape(height, width, channels)


def _levels(image: np.ndarray, name: str) -> np.ndarray:
    """Values of any type as uint8."""
    kind, size = image.dtype.kind, image.dtype.itemsize
    if kind == "u" and size == 1:
        return image
    if kind == "u" and size == 2:
        return (image >> 8).astype(np.uint8)
    if kind == "b":
        return image.astype(np.uint8) * np.uint8(255)
    if kind != "f":
        raise ValueError(
            f"{name} must hold pixels of uint8, uint16, bool or floats; got {image.dtype}. "
            "Store levels from 0 to 255 as uint8."
        )
    levels = np.rint(image.astype(np.float32) * 255)
    low, high = float(levels.min()), float(levels.max())  # not a number if there is one
    if not 0 <= low <= high <= 255:
        raise BadExampleError(
            f"{name} must hold floats from 0 to 1; got {low / 255:.4g} … {high / 255:.4g} "
            f"({image.dtype}). Scale them, or store levels from 0 to 255 as uint8."
        )
    return levels.astype(np.uint8)


def decode_image(data: bytes, *, channels: int, name: str = "image") -> np.ndarray:
    """The pixels (H, W, channels), uint8, of an encoded image; see `EncodedImage`."""
    return EncodedImage(data, channels=channels, name=name).pixels()


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by the header of a JPEG or PNG; None: another format, or no header."""
    if data[:8] == PNG and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    if data[:2] == JPEG:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
            return int(height), int(width)
        except (ValueError, KeyError):  # KeyError: of a header without a frame
            return None
    return None


def _other_levels(data: bytes, *, decoded: bool) -> str | None:
    """Describe the levels of an image that has neither 8 nor 16 bits.

    OpenCV takes some for pixels of 8 bits as they are, which would be all but black.
    """
    if data.startswith(FLOATS):
        return "floats"
    if (header := NETPBM.match(data)) and int(header[3]) not in (255, 65535):
        return f"levels up to {int(header[3])}"
    if decoded:
        return None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if image is None or image.dtype in (np.uint8, np.uint16) else str(image.dtype)


def _check_tiff(buffer: np.ndarray, name: str) -> None:
    """Refuse TIFFs whose pixels OpenCV changes on the way to 8 bits.

    Raises:
        BadExampleError: the levels are signed, or pixels are transparent: libtiff has multiplied
            their colours by it.
    """
    image: Any = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    if image is None:
        return
    if image.dtype not in (np.uint8, np.uint16):
        raise BadExampleError(
            f"{name} must have levels of 8 or 16 bits; got {image.dtype}. Save it as PNG."
        )
    with_alpha = image.ndim == 3 and image.shape[2] == 4
    if with_alpha and image[..., 3].min() < np.iinfo(image.dtype).max:
        raise BadExampleError(
            f"{name} must be opaque to be read as TIFF; got transparent pixels, whose colours are "
            "darkened by it. Save it as PNG."
        )


def _shortened(data: bytes, rows: int) -> bytearray | None:
    """A JPEG whose header says that it ends after so many rows, so that no more are decoded.

    simplejpeg has no such option. Random crops of the two photographs of scikit-learn (500 x 375)
    took 8 % longer without this: 778 instead of 840 images a second, on one core with the resizing.

    None: it is not sequential, or not whole: then all of it is decoded, so that damage is found.
    """
    place = 2
    while data[-2:] == END and data[place] == 0xFF and place + 9 < len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1):  # the frame header: length, bits per sample, height, width
            shorter = bytearray(data)
            shorter[place + 5 : place + 7] = rows.to_bytes(2, "big")
            return shorter
        if marker in (0xC2, 0xDA):  # progressive, or the pixels have begun
            return None
        place += 2 + length
    return None
