"""Encoded bytes to pixels, against pixels that are known before they are encoded."""

import struct
from zlib import crc32

import cv2
import numpy as np
import pytest

from crate_jax.data.decode import BadExampleError, EncodedImage, decode_image

HEIGHT, WIDTH = 5, 7


@pytest.fixture(scope="module")
def rgb():
    """Random pixels; the first is pure red, the second pure blue."""
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image[0, :2] = [(255, 0, 0), (0, 0, 255)]
    return image


@pytest.fixture(scope="module")
def grey():
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


def encode(image, suffix=".png", *options):
    """Encode RGB, RGBA or grey pixels; OpenCV wants blue first."""
    if image.ndim == 3:
        image = image[:, :, [2, 1, 0, *range(3, image.shape[2])]]
    ok, data = cv2.imencode(suffix, image, options)
    assert ok
    return data.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_color_is_rgb(rgb, suffix):
    image = decode_image(encode(rgb, suffix), channels=3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_grey_keeps_its_channel_axis(grey, suffix):
    image = decode_image(encode(grey, suffix), channels=1)
    assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 1), np.uint8)
    np.testing.assert_array_equal(image[:, :, 0], grey)


def test_grey_to_color_is_repeated(grey):
    image = decode_image(encode(grey), channels=3)
    np.testing.assert_array_equal(image, np.stack([grey] * 3, axis=-1))


def test_color_to_grey_is_luma(rgb):
    image = decode_image(encode(rgb), channels=1)
    assert image.shape == (HEIGHT, WIDTH, 1)
    luma = rgb.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(image[:, :, 0] - luma).max() < 1.01
    assert [int(v) for v in image[0, :2, 0]] == [76, 29]  # pure red, pure blue


def test_transparency_is_dropped(rgb):
    alpha = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH, 1)
    image = decode_image(encode(np.concatenate([rgb, alpha], axis=-1)), channels=3)
    np.testing.assert_array_equal(image, rgb)


def test_sixteen_bits_become_eight(grey):
    deep = grey.astype(np.uint16) * 256
    image = decode_image(encode(deep), channels=1)
    assert image.dtype == np.uint8
    assert np.abs(image[:, :, 0].astype(int) - grey).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_are_near(suffix):
    rows, columns = np.mgrid[0:32, 0:48]
    smooth = np.stack([4 * rows, 2 * columns, 100 + rows], axis=-1).astype(np.uint8)
    image = decode_image(encode(smooth, suffix), channels=3).astype(int)
    assert image.shape == (32, 48, 3)
    assert np.abs(image - smooth).mean() < 3


def with_orientation(jpeg, orientation):
    """The same JPEG with an EXIF block after its start marker."""
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    tiff = b"II*\x00\x08\x00\x00\x00" + b"\x01\x00" + entry + b"\x00\x00\x00\x00"
    block = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + jpeg[2:]


@pytest.mark.parametrize("channels", [1, 3])
def test_exif_orientation_is_ignored(rgb, channels):
    jpeg = encode(rgb, ".jpg")
    turned = with_orientation(jpeg, 6)
    control = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert control.shape == (WIDTH, HEIGHT, 3)  # the block is read, by who heeds it
    image = decode_image(turned, channels=channels)
    assert image.shape == (HEIGHT, WIDTH, channels)
    np.testing.assert_array_equal(image, decode_image(jpeg, channels=channels))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" * 9])
def test_bytes_that_are_no_image(data):
    message = (
        rf"^here\.png must be an image; its {len(data)} bytes do not decode\. Remove or replace it"
    )
    with pytest.raises(ValueError, match=message):
        decode_image(data, channels=3, name="here.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_image_that_was_cut_off(rgb, suffix):
    data = encode(np.tile(rgb, (9, 9, 1)), suffix)
    assert decode_image(data, channels=3).shape == (9 * HEIGHT, 9 * WIDTH, 3)
    with pytest.raises(ValueError, match="do not decode"):
        decode_image(data[: len(data) // 2], channels=3)


def test_header_of_a_gigantic_image():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    message = r"image must have at most 134217728 pixels; its header says 100000x100000\. Remove"
    with pytest.raises(BadExampleError, match=message):
        decode_image(data, channels=3)


def test_name_has_a_default():
    with pytest.raises(ValueError, match=r"^image must be an image; its 0 bytes"):
        decode_image(b"", channels=1)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_that_no_image_has(grey, channels):
    message = rf"model\.in_channels must be 1 or 3 for encoded images; got {channels}\. Store"
    with pytest.raises(ValueError, match=message):
        decode_image(encode(grey), channels=channels)
