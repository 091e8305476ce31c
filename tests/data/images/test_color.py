"""Colour operations and RandAugment against Pillow, which defines torchvision's."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pillow import by_pillow, small

from crate_jax.data.images import color
from crate_jax.data.images.augment import (
    color_jitter,
    random_blur,
    random_erasing,
    random_grayscale,
    random_solarize,
)
from crate_jax.data.images.randaugment import RANDAUGMENT, SIGNED, randaugment

FACTORS = [0.0, 0.1, 0.7, 1.0, 1.3, 1.9]
ENHANCERS = {
    "adjust_brightness": ImageEnhance.Brightness,
    "adjust_contrast": ImageEnhance.Contrast,
    "adjust_saturation": ImageEnhance.Color,
    "adjust_sharpness": ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ENHANCERS)
def test_enhancement_is_pillows(photographs, name, channels):
    image = small(photographs, channels)
    for factor in FACTORS:
        found = getattr(color, name)(image, factor)
        expected = by_pillow(image, lambda x, f=factor: ENHANCERS[name](x).enhance(f))
        difference = np.abs(found.astype(int) - expected)
        assert found.shape == image.shape
        assert difference.max() <= 1 and difference.mean() < 0.1, factor


@pytest.mark.parametrize("channels", [1, 3])
def test_image_operations_are_pillows(photographs, channels):
    image = (small(photographs, channels) * 0.6 + 31).astype(np.uint8)  # not the whole range
    cases = [(color.autocontrast, ImageOps.autocontrast), (color.equalize, ImageOps.equalize)]
    for bits in range(1, 9):
        cases.append(
            (
                lambda x, b=bits: color.posterize(x, b),
                lambda x, b=bits: ImageOps.posterize(x, b),
            )
        )
    for threshold in (0, 8.5, 128, 255, 256):
        cases.append(
            (
                lambda x, t=threshold: color.solarize(x, t),
                lambda x, t=threshold: ImageOps.solarize(x, t),
            )
        )
    for ours, theirs in cases:
        np.testing.assert_array_equal(ours(image), by_pillow(image, theirs))
    flat = np.full((5, 6, channels), 9, np.uint8)
    np.testing.assert_array_equal(color.autocontrast(flat), flat)
    np.testing.assert_array_equal(color.equalize(flat), flat)


def test_hue_turns_as_pillows_hsv(photographs):
    image = small(photographs)
    for shift in (-0.5, -0.1, 0.0, 0.2, 0.4):

        def turn(x, shift=shift):
            h, s, v = x.convert("HSV").split()
            turned = np.asarray(h) + np.uint8(round(shift * 255) % 256)
            return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")

        found = color.adjust_hue(image, shift)
        assert np.abs(found.astype(int) - by_pillow(image, turn)).mean() < 2.5
    grey = small(photographs, 1)
    assert color.adjust_hue(grey, 0.3) is grey


# --- RandAugment ----------------------------------------------------------------------------------

BINS = 31


def reference(name, image, magnitude, sign):
    """Torchvision's RandAugment operation: its table of 31 magnitudes, through Pillow."""
    height, width = image.shape[:2]
    amount = {
        "shear_x": np.linspace(0, 0.3, BINS),
        "shear_y": np.linspace(0, 0.3, BINS),
        "translate_x": np.linspace(0, 150 / 331 * width, BINS),
        "translate_y": np.linspace(0, 150 / 331 * height, BINS),
        "rotate": np.linspace(0, 30, BINS),
        "posterize": 8 - np.round(np.arange(BINS) / ((BINS - 1) / 4)),
        "solarize": np.linspace(255, 0, BINS),
    }.get(name, np.linspace(0, 0.9, BINS))[magnitude] * sign
    affine, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
    size = (width, height)
    moved = int(amount)
    operations = {
        "identity": lambda x: x,
        "shear_x": lambda x: x.transform(size, affine, (1, amount, 0, 0, 1, 0), nearest),
        "shear_y": lambda x: x.transform(size, affine, (1, 0, 0, amount, 1, 0), nearest),
        "translate_x": lambda x: x.transform(size, affine, (1, 0, -moved, 0, 1, 0), nearest),
        "translate_y": lambda x: x.transform(size, affine, (1, 0, 0, 0, 1, -moved), nearest),
        "rotate": lambda x: x.rotate(amount, nearest),
        "brightness": lambda x: ImageEnhance.Brightness(x).enhance(1 + amount),
        "color": lambda x: ImageEnhance.Color(x).enhance(1 + amount),
        "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1 + amount),
        "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(1 + amount),
        "posterize": lambda x: ImageOps.posterize(x, int(amount)),
        "solarize": lambda x: ImageOps.solarize(x, amount),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }
    assert list(operations) == list(RANDAUGMENT)
    return by_pillow(image, operations[name])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_each_operation_is_torchvisions(photographs, name, channels):
    image = small(photographs, channels)
    for magnitude in (0, 1, 9, 14, 23, 30):
        for sign in (1, -1) if name in SIGNED else (1,):
            found = RANDAUGMENT[name](image, sign * magnitude / 30)
            expected = reference(name, image, magnitude, sign)
            assert found.shape == image.shape and found.dtype == np.uint8
            # Nearest pixels may differ where a place is just between two.
            far = np.abs(found.astype(int) - expected).max(axis=2) > 1
            assert far.mean() < 0.004, (magnitude, sign)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    drawn = []
    for name in RANDAUGMENT:
        monkeypatch.setitem(RANDAUGMENT, name, lambda x, m, n=name: drawn.append((n, m)) or x)
    rng, count = np.random.default_rng(1), 7000
    for _ in range(count):
        randaugment(np.zeros((2, 2, 3), np.uint8), rng, 2, 15)
    assert len(drawn) == 2 * count
    for name in RANDAUGMENT:
        amounts = np.array([m for n, m in drawn if n == name])
        assert abs(len(amounts) / 1000 - 1) < 0.13  # four standard deviations
        assert set(amounts) == ({0.5, -0.5} if name in SIGNED else {0.5})
        if name in SIGNED:
            assert abs((amounts > 0).mean() - 0.5) < 0.07


@pytest.mark.parametrize("magnitude", [-1, 31])
def test_magnitude_out_of_range(magnitude):
    with pytest.raises(ValueError, match=r"randaugment's magnitude must be in 0 … 30; got"):
        randaugment(np.zeros((2, 2, 3), np.uint8), np.random.default_rng(0), 2, magnitude)


# --- the others -----------------------------------------------------------------------------------


def test_jitter_draws_its_factors(monkeypatch):
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    drawn = []
    for name in names:
        monkeypatch.setattr(color, name, lambda x, f, n=name: drawn.append((n, f)) or x)
    rng, image = np.random.default_rng(0), np.zeros((1, 1, 3), np.uint8)
    for _ in range(1000):
        color_jitter(image, rng, 0.4, 0.2, 1.5, 0.1)
    bounds = {names[0]: (0.6, 1.4), names[1]: (0.8, 1.2), names[2]: (0, 2.5), names[3]: (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        factors = np.array([f for n, f in drawn if n == name])
        assert len(factors) == 1000
        assert low <= factors.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.06 * (high - low)
    first = [drawn[i][0] for i in range(0, 4000, 4)]
    assert all(abs(first.count(name) - 250) < 60 for name in names)  # any order
    drawn.clear()
    color_jitter(image, rng, brightness=0.3)
    assert [n for n, _ in drawn] == ["adjust_brightness"]


def test_jitter_leaves_a_share_of_the_images_alone(photographs):
    image, rng = small(photographs), np.random.default_rng(0)
    jittered = [color_jitter(image, rng, 0.9, 0.9, probability=0.8) for _ in range(300)]
    alone = sum(found is image for found in jittered)
    assert abs(alone - 60) < 25
    # Where all are changed, no number is drawn for that: older runs go on with their pixels.
    first, second = (np.random.default_rng(1) for _ in range(2))
    np.testing.assert_array_equal(
        color_jitter(image, first, 0.4), color_jitter(image, second, 0.4, probability=1.0)
    )
    assert first.random() == second.random()


def test_blur_is_a_gaussian(photographs):
    image = small(photographs)
    rng = np.random.default_rng(0)
    found = random_blur(image, rng, 1.5, 1.5, probability=1.0).astype(float)
    x = np.arange(-8, 9)
    taps = np.exp(-(x**2) / (2 * 1.5**2))
    taps /= taps.sum()
    padded = np.pad(image.astype(float), ((8, 8), (8, 8), (0, 0)), mode="reflect")
    rows = sum(t * padded[i : i + image.shape[0]] for i, t in enumerate(taps))
    expected = sum(t * rows[:, i : i + image.shape[1]] for i, t in enumerate(taps))
    assert np.abs(found - expected).mean() < 0.5
    assert random_blur(image, rng, probability=0.0) is image


def test_solarize_and_grayscale_with_a_probability(photographs):
    image, rng = small(photographs), np.random.default_rng(0)
    changed = [(random_solarize(image, rng, 100, 0.3) != image).any() for _ in range(300)]
    assert 60 < sum(changed) < 120
    expected = by_pillow(image, lambda x: x.convert("L").convert("RGB"))
    np.testing.assert_array_equal(random_grayscale(image, rng, 1.0), expected)
    assert random_grayscale(image, rng, 0.0) is image


def test_erasing_fills_one_window():
    image, rng = np.full((60, 80, 3), 7, np.uint8), np.random.default_rng(3)
    areas, ratios, erased = [], [], 0
    for _ in range(1500):
        out = random_erasing(image, rng, probability=0.5, value=(1, 2, 3))
        rows, columns = np.nonzero((out != 7).all(axis=2))
        if not len(rows):
            continue
        erased += 1
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == h * w  # a window without holes
        assert (out[rows, columns] == (1, 2, 3)).all()
        areas.append(h * w / 4800)
        ratios.append(h / w)
    assert abs(erased / 1500 - 0.5) < 0.06
    assert 0.015 < min(areas) < 0.04 and 0.25 < max(areas) < 0.36
    assert 0.25 < min(ratios) < 0.4 and 2.5 < max(ratios) < 3.9
    assert abs(np.mean(np.log(ratios))) < 0.15  # as often upright as lying
    assert (image == 7).all()
    noise = random_erasing(image, rng, 1.0, value="noise")
    filled = noise[(noise != 7).any(axis=2)]
    assert math.isclose(filled.mean(), 127.5, abs_tol=15)


def test_erasing_with_normal_pixels():
    image = np.full((40, 50, 3), 7, np.uint8)
    rng, values = np.random.default_rng(0), []
    for _ in range(60):
        out = random_erasing(image, rng, 1.0, value=(124, 100, 250), deviation=(58, 5, 57))
        values.append(out[(out != 7).any(axis=2)])
    red, green, blue = np.concatenate(values).astype(float).T
    assert len(red) > 15_000
    assert abs(red.mean() - 124) < 1.5 and abs(green.mean() - 100) < 0.2
    assert abs(green.std() - 5) < 0.15  # and of the rounding
    # P(N(124, 58²) < 0.5) and P(N(250, 57²) > 254.5): cut off at black and at white.
    assert abs((red == 0).mean() - 0.0167) < 0.005
    assert abs((blue == 255).mean() - 0.4685) < 0.02
    assert abs(np.corrcoef(red, green)[0, 1]) < 0.05
    grey = random_erasing(image[:, :, :1], rng, 1.0, value=128, deviation=30.0)
    assert grey.shape == (40, 50, 1) and len(np.unique(grey)) > 20


def test_erasing_without_a_deviation_draws_nothing_for_the_pixels():
    image, states = np.full((40, 50, 3), 7, np.uint8), []
    for deviation in (0, (0, 0, 0), 3):
        rng = np.random.default_rng(5)
        out = random_erasing(image, rng, 1.0, value=9, deviation=deviation)
        states.append(rng.bit_generator.state)
        assert ((out == 7) | (out == 9)).all() == (deviation != 3)
    assert states[0] == states[1] != states[2]
