"""timm's RandAugment: its operations by their definition through Pillow, and what is drawn."""

import collections
import functools
import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pillow import by_pillow, small

from crate_jax.data.images import randaugment
from crate_jax.data.images.randaugment import TIMM, TIMM_SIGNED, timm_randaugment

FILL = (124, 116, 104)
MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def reference(name, image, level, sign, resample=Image.Resampling.BILINEAR):
    """An operation at a level of 0 … 10, as timm's increasing variants are defined."""
    height, width = image.shape[:2]
    kept, added = 4 - int(level / 10 * 4), int(level / 10 * 110)
    factor, slope = 1 + sign * level / 10 * 0.9, sign * level / 10 * 0.3
    across, down = sign * level / 10 * 0.45 * width, sign * level / 10 * 0.45 * height
    fill = dict(resample=resample, fillcolor=FILL if image.shape[2] == 3 else FILL[0])

    def moved(*inverse):
        return lambda x: x.transform((width, height), Image.Transform.AFFINE, inverse, **fill)

    brighter = [min(255, i + added) if i < 128 else i for i in range(256)]
    operations = {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "posterize": lambda x: x.point(
            [i & ~(2 ** (8 - kept) - 1) for i in range(256)] * image.shape[2]
        ),
        "solarize": lambda x: ImageOps.solarize(x, 256 - int(level / 10 * 256)),
        "solarize_add": lambda x: x.point(brighter * image.shape[2]),
        "color": lambda x: ImageEnhance.Color(x).enhance(factor),
        "contrast": lambda x: ImageEnhance.Contrast(x).enhance(factor),
        "brightness": lambda x: ImageEnhance.Brightness(x).enhance(factor),
        "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(factor),
        "rotate": lambda x: x.rotate(sign * level / 10 * 30, **fill),
        "shear_x": moved(1, slope, 0, 0, 1, 0),
        "shear_y": moved(1, 0, 0, slope, 1, 0),
        "translate_x": moved(1, 0, across, 0, 1, 0),
        "translate_y": moved(1, 0, 0, 0, 1, down),
    }
    assert set(operations) == set(TIMM)
    return by_pillow(image, operations[name])


def apply(name, image, level, sign, interpolation="bilinear"):
    fill = FILL if image.shape[2] == 3 else FILL[0]
    warp = functools.partial(randaugment._smooth_warp, fill=fill, interpolation=interpolation)
    return TIMM[name](image, sign * level / 10, warp)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TIMM)
def test_each_operation_is_timms(photographs, name, channels):
    image = small(photographs, channels)
    # OpenCV 4 weighs in 32nds of a pixel.
    near = 4 if name in MOVING and cv2.__version__ < "5" else 1
    for level in (0.0, 2.3, 5.0, 7.5, 9.0, 9.7, 10.0):
        for sign in (1, -1) if name in TIMM_SIGNED else (1,):
            found = apply(name, image, level, sign)
            expected = reference(name, image, level, sign)
            assert found.shape == image.shape and found.dtype == np.uint8
            far = np.abs(found.astype(int) - expected).max(axis=2) > near
            assert far.mean() < 0.001, (level, sign)


def test_magnitudes_by_hand():
    """At magnitude 9 of 10: what stays of single levels."""
    levels = np.array([[0, 25, 26, 127, 128, 200, 255]], np.uint8)[:, :, None]

    def at_nine(name, sign=1):
        return apply(name, levels, 9.0, sign)[0, :, 0].tolist()

    assert at_nine("posterize") == [0, 0, 0, 0, 128, 128, 128]  # int(3.6) of 4 bits are gone
    assert at_nine("solarize") == [0, 25, 229, 128, 127, 55, 0]  # from 256 − int(230.4) on
    assert at_nine("solarize_add") == [99, 124, 125, 226, 128, 200, 255]  # int(0.9 · 110)
    assert at_nine("brightness", -1) == [0, 4, 4, 24, 24, 38, 48]  # a factor of 0.19
    assert at_nine("invert") == [255, 230, 229, 128, 127, 55, 0]
    wide = np.zeros((1, 100, 1), np.uint8)
    assert (apply("translate_x", wide, 10.0, 1)[0, :, 0] == FILL[0]).nonzero()[0].tolist() == [
        *range(55, 100)
    ]


@pytest.mark.parametrize("name", MOVING)
def test_bicubic_is_nearly_pillows(photographs, name):
    image = small(photographs)
    found = apply(name, image, 7.7, -1, "bicubic").astype(int)
    cubic = reference(name, image, 7.7, -1, Image.Resampling.BICUBIC)
    linear = reference(name, image, 7.7, -1)
    difference = np.abs(found - cubic).mean()
    assert difference < 1.3 and difference < 0.8 * np.abs(found - linear).mean()
    outside = (cubic == FILL).all(axis=2)
    assert 0.1 < outside.mean() < 0.5 and (found[outside] == FILL).all()


def drawn(monkeypatch, count, *arguments, **options):
    """For each of many images, the operations that were applied and their amounts."""
    images, seen = [], []
    for name in TIMM:
        monkeypatch.setitem(TIMM, name, lambda x, m, warp, n=name: seen.append((n, m)) or x)
    rng, image = np.random.default_rng(1), np.zeros((2, 2, 3), np.uint8)
    for _ in range(count):
        seen.clear()
        assert timm_randaugment(image, rng, *arguments, **options) is image
        images.append(tuple(seen))
    return images


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    images = drawn(monkeypatch, 9000, 2, 9)
    counts = collections.Counter(len(each) for each in images)
    for number, share in enumerate((0.25, 0.5, 0.25)):  # each of two is applied half of the time
        assert abs(counts[number] / 9000 - share) < 0.022  # over four standard deviations
    applied = [pair for each in images for pair in each]
    assert len(TIMM) == 15 and len(TIMM_SIGNED) == 9
    for name in TIMM:
        amounts = np.array([m for n, m in applied if n == name])
        assert abs(len(amounts) / 600 - 1) < 0.17
        assert set(amounts) == ({0.9, -0.9} if name in TIMM_SIGNED else {0.9})
        if name in TIMM_SIGNED:
            assert abs((amounts > 0).mean() - 0.5) < 0.09


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_probability_of_an_operation(monkeypatch, probability):
    images = drawn(monkeypatch, 50, 3, 4.5, probability=probability)
    assert {len(each) for each in images} == {3 * probability}
    assert {abs(m) for each in images for _, m in each} <= {0.45}


def test_magnitudes_are_normal_and_cut_off(monkeypatch):
    images = drawn(monkeypatch, 4000, 2, 9, 0.5, probability=1.0)
    pairs = np.abs([[m for _, m in each] for each in images]) * 10
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.07  # each operation has its own
    magnitudes = np.sort(pairs.ravel())
    assert magnitudes[-1] == 10.0 and 6.5 < magnitudes[0] < 7.7
    assert abs((magnitudes == 10.0).mean() - 0.02275) < 0.007  # two deviations and more above 9
    for bound in (8.0, 8.5, 9.0, 9.25, 9.75):
        share = 0.5 * (1 + math.erf((bound - 9) / 0.5 / math.sqrt(2)))
        assert abs((magnitudes < bound).mean() - share) < 0.022, bound
    low = drawn(monkeypatch, 500, 2, 0, 0.5, probability=1.0)
    at_zero = np.mean([m == 0 for each in low for _, m in each])
    assert abs(at_zero - 0.5) < 0.07


def test_the_same_generator_gives_the_same_pixels(photographs):
    image = small(photographs)
    before = image.copy()
    first, again = (
        [
            timm_randaugment(image, np.random.default_rng(seed), 2, 9, 0.5, fill=FILL)
            for seed in range(12)
        ]
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    assert len({each.tobytes() for each in first}) > 6
    np.testing.assert_array_equal(image, before)
