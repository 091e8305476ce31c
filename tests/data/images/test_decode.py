"""Encoded bytes to pixels, against pixels that are known before they are encoded."""

import io
import struct
import subprocess
import sys
from zlib import crc32

import cv2
import numpy as np
import pytest
import simplejpeg
from command import ROOT
from PIL import Image

from crate_jax.data.images.decode import EncodedImage, array_pixels, decode_image
from crate_jax.data.images.resize import resize_pixels
from crate_jax.data.rows import BadExampleError

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
    message = r"image must have 1 … 134217728 pixels; its header says 100000x100000\. Remove"
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


# --- whatever people store, against Pillow --------------------------------------------------------


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def saved(image, format, mode=None, **options):
    """Pixels as a file by Pillow, converted to a mode before."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, format, **options)
    return file.getvalue()


STORED = {
    "jpeg 4:2:0": ("JPEG", None, {"quality": 92, "subsampling": 2}),
    "jpeg 4:2:2": ("JPEG", None, {"quality": 92, "subsampling": 1}),
    "jpeg 4:4:4": ("JPEG", None, {"quality": 92, "subsampling": 0}),
    "jpeg progressive": ("JPEG", None, {"quality": 92, "progressive": True}),
    "jpeg restarts": ("JPEG", None, {"quality": 92, "restart_marker_rows": 1}),
    "jpeg grey": ("JPEG", "L", {"quality": 92}),
    "jpeg cmyk": ("JPEG", "CMYK", {"quality": 95}),
    "png": ("PNG", None, {}),
    "png grey": ("PNG", "L", {}),
    "png palette": ("PNG", "P", {}),
    "png one bit": ("PNG", "1", {}),
    "webp": ("WEBP", None, {"quality": 92}),
    "webp lossless": ("WEBP", None, {"lossless": True}),
}


@pytest.mark.parametrize("kind", STORED)
def test_photograph_is_decoded_as_by_pillow(photographs, kind):
    format, mode, options = STORED[kind]
    data = saved(photographs[0], format, mode, **options)
    expected = by_pillow(data)
    # Colours of print have no one conversion; JPEG decoders may differ by a few levels.
    bound = 1.5 if "cmyk" in kind else 0.6
    assert np.abs(decode_image(data, channels=3).astype(int) - expected).mean() < bound
    fast = EncodedImage(data, channels=3, fast=True)
    assert fast.shape == expected.shape
    assert np.abs(fast.pixels().astype(int) - expected).mean() < bound + 2
    luma = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode_image(data, channels=1)[:, :, 0] - luma).mean() < bound


@pytest.mark.parametrize("kind", [k for k in STORED if k.startswith("jpeg")])
@pytest.mark.parametrize("window", [(0, 0, 50, 60), (37, 101, 120, 130), (300, 600, 127, 40)])
def test_window_has_the_pixels_of_the_whole(photographs, kind, window):
    format, mode, options = STORED[kind]
    data = saved(photographs[1], format, mode, **options)
    top, left, height, width = window
    for fast in (False, True):
        whole = EncodedImage(data, channels=3, fast=fast).pixels()
        part = EncodedImage(data, channels=3, fast=fast).window(*window, size=(224, 224))
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(part, expected)


def test_rows_below_a_window_are_not_decoded(photographs, monkeypatch):
    data = saved(photographs[0], "JPEG", quality=92)
    decoded = []
    original = simplejpeg.decode_jpeg

    def decode(*args, **options):
        decoded.append(original(*args, **options))
        return decoded[-1]

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    EncodedImage(data, channels=3, fast=True).window(10, 20, 100, 110, size=(224, 224))
    assert decoded[0].shape == (112, 640, 3)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_large_window_is_decoded_smaller(photographs, reduction):
    image = np.ascontiguousarray(np.tile(photographs[0], (2, 2, 1))[:851, :1277])
    data = saved(image, "JPEG", quality=95)
    window, size = (33, 65, 640, 700), (640 // reduction, 600 // reduction)
    part = EncodedImage(data, channels=3, fast=True).window(*window, size=size)
    assert part.shape[0] in (640 // reduction, 640 // reduction + 1)
    assert part.shape[0] >= size[0] and part.shape[1] >= size[1]
    whole = EncodedImage(data, channels=3).window(*window, size=size)
    assert whole.shape == (640, 700, 3)  # evaluation takes every pixel
    small = resize_pixels(np.ascontiguousarray(whole), part.shape[:2])
    assert np.abs(small.astype(int) - part).mean() < 8
    other = resize_pixels(np.ascontiguousarray(whole[:, ::-1]), part.shape[:2])
    assert np.abs(other.astype(int) - part).mean() > 20
    # One size less, and it is not reduced as far.
    size = (640 // reduction + 1, 640 // reduction + 1)
    finer = EncodedImage(data, channels=3, fast=True).window(*window, size=size)
    assert finer.shape[0] > 1.9 * part.shape[0]


def test_cut_off_jpeg_is_found_though_the_window_is_above(photographs):
    data = saved(photographs[0], "JPEG", quality=92)
    for cut in (2, 1000, len(data) // 2):
        image = EncodedImage(data[:-cut], channels=3, name="here.jpg", fast=True)
        with pytest.raises(BadExampleError, match=r"here\.jpg must be an image; its"):
            image.window(0, 0, 30, 30, size=(30, 30))


def test_untidy_jpeg_is_read(photographs):
    data = saved(photographs[0], "JPEG", quality=92)
    middle = len(data) * 3 // 4
    noise = np.random.default_rng(0).integers(0, 255, 30, np.uint8).tobytes()
    untidy = data[:middle] + noise + data[middle + 30 :]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(untidy)
    upper = decode_image(untidy, channels=3)[:200]
    np.testing.assert_allclose(upper, decode_image(data, channels=3)[:200], atol=6)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_bomb_is_refused_by_its_header(suffix):
    flat = np.zeros((16, 16, 3), np.uint8)
    data = bytearray(encode(flat, suffix))
    if suffix == ".png":
        data[16:24] = struct.pack(">II", 20_000, 20_000)
    else:
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", 20_000, 20_000)
    message = r"here must have 1 … 134217728 pixels; its header says 20000x20000\. Remove or"
    with pytest.raises(BadExampleError, match=message):
        EncodedImage(bytes(data), channels=3, name="here")


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_bomb_of_another_format_is_refused_before_memory_is_taken(format):
    """In a program of its own: OpenCV takes its limit when it is imported."""
    program = f"""
import io
import resource
from PIL import Image
from crate_jax.data.images.decode import decode_image
side = 12000
options = dict(compression="tiff_deflate") if "{format}" == "TIFF" else {{}}
file = io.BytesIO()
Image.new("L", (side, side)).save(file, "{format}", **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(file.getvalue(), channels=3, name="here")
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    message, small = found.stdout.splitlines()
    assert message.startswith("here must be an image; its") and small == "True"


@pytest.mark.parametrize("alpha", [0, 128, 254])
def test_a_transparent_tiff_is_refused(alpha):
    """Its reader darkens what is transparent, and the colours are lost."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    image, encoded = Image.fromarray(rgb), io.BytesIO()
    image.putalpha(alpha)
    image.save(encoded, "TIFF")
    with pytest.raises(BadExampleError, match=r"^image must be opaque to be read as TIFF"):
        decode_image(encoded.getvalue(), channels=3)


def test_an_opaque_tiff_with_alpha_is_read():
    rgb = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    image, encoded = Image.fromarray(rgb), io.BytesIO()
    image.putalpha(255)
    image.save(encoded, "TIFF")
    np.testing.assert_array_equal(decode_image(encoded.getvalue(), channels=3), rgb)


# --- other levels than 8 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_8_count(suffix, channels):
    deep = np.random.default_rng(2).integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
    deep[0, :4] = [0, 255, 256, 65535]
    image = decode_image(encode(deep, suffix), channels=channels)
    np.testing.assert_array_equal(image, (deep >> 8)[:, :, None].repeat(channels, 2))


def test_16_bits_of_colour_are_those_of_pillow():
    deep = np.random.default_rng(2).integers(0, 2**16, (HEIGHT, WIDTH, 3), np.uint16)
    data = encode(deep)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, channels=3), pillow)


UNIT = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
OTHER_LEVELS = {
    "float32": lambda: encode(UNIT, ".tiff"),
    "float64": lambda: encode(UNIT.astype(np.float64), ".tiff"),
    "floats": lambda: b"Pf\n7 5\n-1.0\n" + UNIT.tobytes(),
    "levels up to 4095": lambda: b"P5\n# a microscope's\n7 5\n4095\n" + bytes(70),
    "levels up to 15": lambda: b"P2 7 5 15\n" + b"15 " * 35,
}


@pytest.mark.parametrize("kind", OTHER_LEVELS)
def test_other_levels_are_refused(kind):
    message = rf"a\.x must have levels of 8 or 16 bits; got {kind}\. Save it as PNG\."
    with pytest.raises(BadExampleError, match=message):
        decode_image(OTHER_LEVELS[kind](), channels=1, name="a.x")


# --- arrays ---------------------------------------------------------------------------------------


def test_colour_arrays_become_grey_by_luma(rgb):
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(array_pixels(rgb, channels=1)[:, :, 0], luma, atol=0.51)


def test_bytes_of_either_order_are_the_same_levels():
    deep = np.random.default_rng(2).integers(0, 2**16, (HEIGHT, WIDTH, 1), np.uint16)
    for order in "<>":
        found = array_pixels(deep.astype(f"{order}u2"), channels=1)
        np.testing.assert_array_equal(found, deep // 256)


def test_floats_are_rounded_to_the_nearest_level():
    halves = np.array([[0, 0.4, 0.6, 127.4, 254.6, 255.4, -0.4]], np.float32) / np.float32(255)
    found = array_pixels(halves.astype(np.float64), channels=1)
    assert found.ravel().tolist() == [0, 0, 1, 127, 255, 255, 0]


@pytest.mark.parametrize(
    "image, message",
    [
        (
            np.zeros((2, 3, 1), np.int32),
            r"must hold pixels of uint8, uint16, .*; got int32\. Store",
        ),
        (np.zeros((2, 3, 1), np.int8), r"must hold pixels of uint8, .*; got int8\."),
        (np.zeros((2, 3, 1), complex), r"must hold pixels of uint8, .*; got complex128\."),
        (np.zeros((2, 3, 1), object), r"must hold pixels of uint8, .*; got object\."),
        (np.zeros((1, 2, 3, 1), np.uint8), r"must be an array of .*; got \(1, 2, 3, 1\)\."),
        (np.zeros(6, np.uint8), r"must be an array of .*; got \(6,\)\."),
        (np.zeros((0, 3, 1), np.uint8), r"must have 1 … 134217728 pixels; it has 0x3\."),
        (np.zeros((2, 3, 2), np.uint8), r"must have 1 channels, .* says; got 2\. Set --config"),
        (np.full((2, 3, 1), np.inf, np.float32), r"must hold floats from 0 to 1; got inf … inf"),
    ],
)
def test_other_arrays_are_refused(image, message):
    with pytest.raises(ValueError, match="a/train\\[3\\] " + message):
        array_pixels(image, channels=1, name="a/train[3]")


def test_signed_levels_of_a_tiff_are_refused():
    """OpenCV would halve them, and lose what is below zero."""
    signed = np.full((HEIGHT, WIDTH), 32767, np.int16)
    with pytest.raises(BadExampleError, match=r"levels of 8 or 16 bits; got int16\. Save it as"):
        decode_image(encode(signed, ".tiff"), channels=1)
