"""Resizing against Pillow, on photographs."""

import numpy as np
import pytest
from PIL import Image

from crate_jax.data.images.resize import resize_pixels
from crate_jax.data.images.transform_spec import parse_transforms

METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pillow(image, size, interpolation):
    resized = Image.fromarray(image).resize(size[::-1], METHODS[interpolation])
    return np.asarray(resized).astype(float)


@pytest.mark.parametrize("interpolation", METHODS)
@pytest.mark.parametrize(
    "size",
    [
        (420, 630),
        (395, 592),
        (340, 500),
        (300, 450),
        (256, 383),
        (224, 224),
        (128, 192),
        (40, 60),
        (600, 900),
    ],
)
def test_photographs_are_as_by_pillow(photographs, size, interpolation):
    for image in photographs:
        found = resize_pixels(image, size, interpolation=interpolation)
        assert (found.shape, found.dtype) == ((*size, 3), np.uint8)
        assert np.abs(found - pillow(image, size, interpolation)).mean() < 1.2


@pytest.mark.parametrize("size", [256, 232])
def test_evaluation_geometry_is_torchvisions(photographs, size):
    """Resize(256) and CenterCrop(224), and the newer 232, by Pillow as torchvision calls it."""
    (shorter, crop) = parse_transforms(f"resize_shorter({size})|center_crop(224)", "x")
    rng = np.random.default_rng(0)
    for image in (*photographs, photographs[0].transpose(1, 0, 2).copy()):
        found = crop(shorter(image, rng), rng)
        height, width = image.shape[:2]
        if height < width:
            new = (size, int(size * width / height))
        else:
            new = (int(size * height / width), size)
        top, left = round((new[0] - 224) / 2), round((new[1] - 224) / 2)
        expected = pillow(image, new, "bilinear")[top : top + 224, left : left + 224]
        assert np.abs(found - expected).mean() <= 1.5
        # And it is that window: a pixel off is further away.
        moved = pillow(image, new, "bilinear")[top + 1 : top + 225, left : left + 224]
        assert np.abs(found - moved).mean() > 2 * np.abs(found - expected).mean()


def test_fixed_size_changes_the_ratio_as_torchvision_does(photographs):
    (resize,) = parse_transforms("resize((200, 320), interpolation='bicubic')", "x")
    found = resize(photographs[0], np.random.default_rng(0))
    assert np.abs(found - pillow(photographs[0], (200, 320), "bicubic")).mean() <= 1.5


def test_fine_stripes_do_not_alias():
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    for interpolation in METHODS:
        smooth = resize_pixels(stripes, (90, 90), interpolation=interpolation)[5:-5, 5:-5]
        assert np.abs(smooth.astype(int) - 127).max() < 25
    plain = resize_pixels(stripes, (90, 90), antialias=False)[5:-5, 5:-5]
    assert plain.max() > 200 and plain.min() < 50


@pytest.mark.parametrize("interpolation", METHODS)
def test_flat_stays_flat_and_grey_keeps_its_axis(interpolation):
    for size in ((7, 90), (90, 7), (20, 31), (50, 50)):
        found = resize_pixels(
            np.full((30, 40, 1), 201, np.uint8), size, interpolation=interpolation
        )
        assert found.shape == (*size, 1)
        assert (found == 201).all()


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5, "a"), (5.5, 5)])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match=r"resize must get positive whole numbers of pixels; got"):
        resize_pixels(np.zeros((4, 4, 3), np.uint8), size)


def test_unknown_interpolation():
    with pytest.raises(
        ValueError, match=r"interpolation must be bilinear or bicubic; got lanczos\."
    ):
        resize_pixels(np.zeros((4, 4, 3), np.uint8), (2, 2), interpolation="lanczos")
