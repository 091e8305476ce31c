"""Every transform by value: exact windows, geometry by hand, and the distribution of the draws."""

import math

import numpy as np
import pytest

from crate_jax.data.images import augment
from crate_jax.data.images.augment import (
    center_crop,
    random_affine,
    random_flip,
    random_resized_crop,
    resize,
    resize_shorter,
)

RNG = np.random.default_rng(0)  # for those that draw nothing


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def coordinates(height, width):
    """Pixels that say where they are: (row, column)."""
    return np.stack(np.mgrid[0:height, 0:width], axis=-1).astype(np.uint8)


class Highest:
    """Stands in for a generator: every uniform draw is the upper bound."""

    def uniform(self, low, high, size=None):
        return float(high) if size is None else np.full(size, float(high))


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_to_the_same_size_changes_nothing(channels):
    image = noise(6, 9, channels)
    np.testing.assert_array_equal(resize(image, RNG, (6, 9)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_takes_height_and_width(channels):
    image = noise(6, 9, channels)
    assert resize(image, RNG, 5).shape == (5, 5, channels)
    assert resize(image, RNG, (4, 7)).shape == (4, 7, channels)
    assert resize(image, RNG, (40, 70)).dtype == np.uint8


def test_resize_grows_bilinearly():
    image = np.array([[0, 100], [200, 100]], np.uint8)[:, :, None]
    # Centres of the four pixels are at 1/2 and 3/2: the new ones are at 1/4, 3/4, 5/4, 7/4.
    share = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
    weights = np.stack([1 - share, share])
    expected = weights.T @ image[:, :, 0].astype(float) @ weights
    assert np.abs(resize(image, RNG, 4)[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize(
    "shape, size, expected",
    [
        ((100, 203), 50, (50, 101)),  # 101.5 is cut off, as torchvision does
        ((203, 100), 50, (101, 50)),
        ((30, 40), 60, (60, 80)),
        ((500, 333), 256, (384, 256)),
        ((7, 7), 9, (9, 9)),
    ],
)
def test_resize_shorter_keeps_the_ratio(shape, size, expected):
    image = np.full((*shape, 3), 77, np.uint8)
    out = resize_shorter(image, RNG, size)
    assert out.shape == (*expected, 3)
    assert (out == 77).all()


def test_resize_shorter_moves_no_content():
    out = resize_shorter(coordinates(40, 80), RNG, 20).astype(float)
    # Each pixel is the mean of 2 x 2: half-way between the even row and the odd one below it.
    rows, columns = np.mgrid[0:20, 0:40] * 2 + 0.5
    assert np.abs(out - np.stack([rows, columns], axis=-1)).max() <= 0.5


@pytest.mark.parametrize(
    "shape, size, top, left",
    [
        ((10, 12), 4, 3, 4),
        ((10, 12), (6, 12), 2, 0),
        ((5, 4), (2, 3), 2, 0),  # 1.5 and 0.5 to the even neighbour, as torchvision does
        ((4, 5), (3, 2), 0, 2),
        ((6, 6), 6, 0, 0),
    ],
)
def test_center_crop_window(shape, size, top, left):
    out = center_crop(coordinates(*shape), RNG, size)
    height, width = (size, size) if isinstance(size, int) else size
    rows = np.arange(top, top + height)[:, None]
    columns = np.arange(left, left + width)[None, :]
    np.testing.assert_array_equal(out[:, :, 0], np.broadcast_to(rows, (height, width)))
    np.testing.assert_array_equal(out[:, :, 1], np.broadcast_to(columns, (height, width)))


def test_resize_shorter_of_a_line_asks_for_no_memory():
    message = r"resize_shorter\(256\) must give at most 134217728 pixels; got an image of "
    for height, width in ((1, 30_000), (30_000, 1)):
        with pytest.raises(augment.UnfitImageError, match=rf"{message}{height}x{width}\. Crop or"):
            resize_shorter(np.zeros((height, width, 3), np.uint8), RNG, 256)


@pytest.mark.parametrize("size", [(9, 4), (4, 9), 9])
def test_center_crop_of_a_small_image(size):
    height, width = (size, size) if isinstance(size, int) else size
    message = rf"center_crop must get images of at least {height}x{width}; got 8x8\. Put resize_sho"
    with pytest.raises(ValueError, match=message):
        center_crop(noise(8, 8), RNG, size)


# --- random_flip ----------------------------------------------------------------------------------


def test_flip_mirrors_columns():
    image = noise(3, 5)
    mirrored = np.stack([image[:, 4 - j] for j in range(5)], axis=1)
    np.testing.assert_array_equal(random_flip(image, RNG, 1.0), mirrored)
    np.testing.assert_array_equal(random_flip(image, RNG, 0.0), image)


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_flip_frequency(probability):
    rng, image = np.random.default_rng(5), coordinates(1, 2)
    flips = sum(int(random_flip(image, rng, probability)[0, 0, 1]) for _ in range(4000))
    assert abs(flips / 4000 - probability) < 0.035  # over four standard deviations


@pytest.mark.parametrize("channels", [1, 3])
def test_flipped_image_goes_through_opencv(channels):
    image = noise(6, 8, channels)
    flipped = random_flip(image, RNG, 1.0)  # a view with a negative stride
    expected = resize(np.ascontiguousarray(image[:, ::-1]), RNG, (3, 4))
    np.testing.assert_array_equal(resize(flipped, RNG, (3, 4)), expected)
    np.testing.assert_array_equal(random_affine(flipped, np.random.default_rng(0)), flipped)


# --- random_resized_crop --------------------------------------------------------------------------


def windows(monkeypatch, height, width, count, *args):
    """(top, left, h, w) of many draws; the resizing is left out, so pixels say where they were."""
    monkeypatch.setattr(augment, "resize", lambda image, *_: image)
    image, rng = coordinates(height, width), np.random.default_rng(7)
    found = []
    for _ in range(count):
        window = random_resized_crop(image, rng, 1, *args)
        (top, left), (h, w) = window[0, 0], window.shape[:2]
        assert tuple(window[-1, -1]) == (top + h - 1, left + w - 1)  # a window, unbroken
        found.append((top, left, h, w))
    return np.array(found, float).T


def distance_from_uniform(values, low, high):
    """Kolmogorov's: the largest difference of the distribution functions."""
    uniform = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(uniform - steps[1:]).max(), np.abs(uniform - steps[:-1]).max())


def test_crop_distribution(monkeypatch):
    # Up to half the area every window fits, so that nothing is drawn twice.
    height, width, count = 240, 250, 4000
    top, left, h, w = windows(monkeypatch, height, width, count, 0.08, 0.5)
    area, ratio = h * w / (height * width), np.log(w / h)
    bound = 1.95 / math.sqrt(count) + 0.01  # one in a thousand, and whole pixels
    assert distance_from_uniform(area, 0.08, 0.5) < bound
    assert distance_from_uniform(ratio, math.log(3 / 4), math.log(4 / 3)) < bound
    assert distance_from_uniform((top + 0.5) / (height - h + 1), 0, 1) < bound
    assert distance_from_uniform((left + 0.5) / (width - w + 1), 0, 1) < bound
    assert (
        np.abs(np.corrcoef([area, ratio, top / (height - h + 1)])[np.triu_indices(3, 1)]).max()
        < 0.07
    )


def test_crop_defaults_reach_the_whole_image(monkeypatch):
    height, width, count = 250, 250, 3000
    _, _, h, w = windows(monkeypatch, height, width, count)
    area = h * w / (height * width)
    # Of area and log ratio, drawn uniformly, those that fit: w = √(a·r) <= 1 and h = √(a/r) <= 1.
    grid_a, grid_r = np.meshgrid(
        np.linspace(0.08, 1, 1500), np.exp(np.linspace(math.log(3 / 4), math.log(4 / 3), 1500))
    )
    fits = (grid_a * grid_r <= 1) & (grid_a / grid_r <= 1)
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        assert abs((area < share).mean() - (grid_a[fits] < share).mean()) < 0.035
    assert area.min() < 0.09
    assert area.max() > 0.97
    assert (w / h).min() > 0.73
    assert (w / h).max() < 1.37


@pytest.mark.parametrize("shape", [(32, 32), (30, 40)])
def test_crop_of_the_whole_area_is_the_image(shape):
    image, ratio = noise(*shape), shape[1] / shape[0]
    for seed in range(5):
        out = random_resized_crop(
            image, np.random.default_rng(seed), shape, 1.0, 1.0, min_ratio=ratio, max_ratio=ratio
        )
        np.testing.assert_array_equal(out, image)


@pytest.mark.parametrize(
    "shape, ratio, expected",
    [
        ((40, 40), 2.0, (10, 0, 20, 40)),  # as wide as it gets
        ((40, 40), 0.5, (0, 10, 40, 20)),
        ((20, 90), 4 / 3, (0, 31, 20, 27)),  # 20 · 4/3 = 26.7, in the middle of 90
    ],
)
def test_crop_that_never_fits_is_the_largest_in_the_middle(monkeypatch, shape, ratio, expected):
    found = windows(monkeypatch, *shape, 3, 1.0, 1.0, ratio, ratio)
    np.testing.assert_array_equal(found.T, [expected] * 3)


def test_crop_is_resized_to_the_size():
    image = noise(30, 40, 1)
    assert random_resized_crop(image, np.random.default_rng(0), 8).shape == (8, 8, 1)
    assert random_resized_crop(image, np.random.default_rng(0), (9, 5)).shape == (9, 5, 1)


# --- random_affine --------------------------------------------------------------------------------


def warp(image, degrees, shift, scale, shear):
    """A point p goes to centre + t + (1 + s)·R·S·(p − centre), bilinear, black from outside."""
    height, width, _ = image.shape
    a, s = math.radians(degrees), math.radians(shear)
    R = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    inverse = np.linalg.inv((1 + scale) * R @ np.array([[1, math.tan(s)], [0, 1]]))
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    out = np.zeros(image.shape)
    for y in range(height):
        for x in range(width):
            px, py = inverse @ (np.array([x - shift * width, y - shift * height]) - centre) + centre
            x0, y0 = math.floor(px), math.floor(py)
            for i, wy in ((y0, y0 + 1 - py), (y0 + 1, py - y0)):
                for j, wx in ((x0, x0 + 1 - px), (x0 + 1, px - x0)):
                    if 0 <= i < height and 0 <= j < width:
                        out[y, x] += wy * wx * image[i, j]
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_of_nothing_is_the_identity(channels):
    image = noise(7, 10, channels)
    for seed in range(3):
        out = random_affine(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, image)


def test_affine_rotates_clockwise():
    image = noise(7, 7)
    clockwise = image[::-1].transpose(1, 0, 2)  # a quarter: the bottom row comes to the left
    np.testing.assert_array_equal(random_affine(image, Highest(), degrees=90), clockwise)


@pytest.mark.parametrize(
    "amounts",
    [
        {"degrees": 30},
        {"scale": 0.3},
        {"shear": 20},
        {"shift": 0.13},
        {"degrees": 20, "shift": 0.1, "scale": 0.2, "shear": 10},
    ],
    ids=lambda amounts: "-".join(amounts),
)
def test_affine_against_the_definition(amounts):
    rows, columns = np.mgrid[0:20, 0:24]
    image = np.stack([60 + 5 * rows, 60 + 4 * columns, 40 + 3 * (rows + columns)], axis=-1)
    out = random_affine(image.astype(np.uint8), Highest(), **amounts)
    expected = warp(image, *(amounts.get(k, 0) for k in ("degrees", "shift", "scale", "shear")))
    assert np.abs(out - expected).max() <= 4  # OpenCV 4 weighs in 32nds of a pixel
    assert np.abs(out - expected).mean() <= 0.5
    assert np.abs(image - expected).mean() > 5  # and it is not the image it was


def test_affine_shift_is_a_share_of_each_side():
    image = noise(6, 8)
    out = random_affine(image, Highest(), shift=0.5)
    np.testing.assert_array_equal(out[3:, 4:], image[:3, :4])
    assert (out[:3] == 0).all() and (out[:, :4] == 0).all()


def test_affine_draws_both_ways():
    # A bright column in the middle tells by where it lands how far it was shifted.
    image = np.zeros((1, 101, 1), np.uint8)
    image[:, 50] = 200
    rng = np.random.default_rng(2)
    moved = []
    for _ in range(1500):
        row = random_affine(image, rng, shift=0.2)[0, :, 0].astype(float)
        if row.sum():  # a shift up or down by a share of one pixel dims it
            moved.append((row @ np.arange(101) / row.sum() - 50) / 101)
    assert len(moved) > 1400
    assert distance_from_uniform(np.array(moved), -0.2, 0.2) < 0.06


RANDOM = {
    "random_resized_crop": lambda image, rng: random_resized_crop(image, rng, 8),
    "random_flip": random_flip,
    "random_affine": lambda image, rng: random_affine(image, rng, 15, 0.1, 0.1, 10),
}


@pytest.mark.parametrize("name", RANDOM)
def test_same_seed_same_pixels(name):
    image = noise(16, 20)
    before = image.copy()
    first, again = (
        [RANDOM[name](image, np.random.default_rng(seed)) for seed in range(20)] for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({a.tobytes() for a in first}) >= 2
    np.testing.assert_array_equal(image, before)  # what comes in is left alone
