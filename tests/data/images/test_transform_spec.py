"""Pipelines written as strings: what they build, and what is said of those that do not fit."""

import numpy as np
import pytest

from crate_jax.config import DataConfig
from crate_jax.data.images.augment import center_crop, random_affine, random_flip
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.images.transform_spec import RULES, TRANSFORMS, parse_transforms


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def run(spec, image, seed=0):
    rng = np.random.default_rng(seed)
    for transform in parse_transforms(spec, "data.train_transforms"):
        image = transform(image, rng)
    return image


@pytest.mark.parametrize(
    "spec, shape",
    [
        ("", (12, 10, 3)),
        ("  ", (12, 10, 3)),
        ("resize((8, 6))", (8, 6, 3)),
        ("resize(size=(8, 6))|", (8, 6, 3)),
        (" resize_shorter(5) | center_crop((5, 4)) ", (5, 4, 3)),
        ("random_resized_crop((7, 9), min_area=0.5)|random_flip()", (7, 9, 3)),
    ],
)
def test_parsed_pipelines(spec, shape):
    assert run(spec, noise(12, 10)).shape == shape


def test_parsed_pipeline_runs_in_order_with_its_arguments():
    image = noise(12, 10)
    rng = np.random.default_rng(3)
    expected = random_affine(image, rng, 10.0, shear=0.5)
    expected = random_flip(expected, rng, probability=0.5)[3:9, 2:8]
    spec = "random_affine(10.0, shear=0.5)|random_flip(probability=0.5)|center_crop(6)"
    np.testing.assert_array_equal(run(spec, image, seed=3), expected)


def test_every_transform_has_its_name():
    assert set(TRANSFORMS) == {
        "resize",
        "resize_shorter",
        "center_crop",
        "random_resized_crop",
        "random_flip",
        "random_affine",
        "randaugment",
        "timm_randaugment",
        "color_jitter",
        "random_grayscale",
        "random_solarize",
        "random_blur",
        "random_erasing",
    }
    assert TRANSFORMS["center_crop"] is center_crop


def test_unknown_transform_suggests_the_nearest():
    message = r"data\.train_transforms must name known transforms; got randomflip\. Did you mean ra"
    with pytest.raises(KeyError, match=message):
        parse_transforms("resize(8)|randomflip()", "data.train_transforms")


@pytest.mark.parametrize(
    "part",
    [
        "resize",
        "resize(8",
        "resize 8",
        "cv2.resize(8)",
        "resize(8)(9)",
        "resize(SIZE)",
        "resize(__import__('os').getpid())",
        "resize(*[8])",
        "resize({[]: 1})",
        "8",
    ],
)
def test_malformed_part(part):
    with pytest.raises(ValueError) as caught:
        parse_transforms(f"random_flip()|{part}", "data.eval_transforms")
    assert str(caught.value) == (
        f"data.eval_transforms must be name(arguments)|name(arguments); got {part}. "
        "Write for example resize(224)|random_flip()."
    )


@pytest.mark.parametrize(
    "part, options",
    [
        ("resize()", "resize(size, interpolation, antialias)"),
        ("resize(8, 'bilinear', True, 4)", "resize(size, interpolation, antialias)"),
        ("center_crop(side=8)", "center_crop(size)"),
        ("random_flip(0.5, probability=0.5)", "random_flip(probability)"),
        ("random_affine(rng=3)", "random_affine(degrees, shift, scale, shear)"),
        ("resize(**{'size': 8})", "resize(size, interpolation, antialias)"),
    ],
)
def test_arguments_that_do_not_fit(part, options):
    with pytest.raises(ValueError) as caught:
        parse_transforms(part, "data.train_transforms")
    assert str(caught.value) == f"data.train_transforms: {part} does not fit {options}."


SIZES = "a positive whole number of pixels, or (height, width), of at most 134217728 in all"
KERNELS = "interpolation must be one of bilinear, bicubic"
NOISE = "deviation must be 0 if value is 'noise'"
FILLS = "a level in 0 … 255, or one for each channel"
DEVIATIONS = "in [0, 255], or one for each channel"
LEVELS = "a level in 0 … 255, one for each channel, or 'noise'"


@pytest.mark.parametrize(
    "part, problem",
    [
        ("resize(0)", f"size must be {SIZES}; got 0"),
        ("resize(8.0)", f"size must be {SIZES}; got 8.0"),
        ("center_crop((8,))", f"size must be {SIZES}; got (8,)"),
        ("resize_shorter((8, 8))", "size must be a positive whole number of pixels; got (8, 8)"),
        ("resize(8, 'nearest')", "interpolation must be one of bilinear, bicubic; got 'nearest'"),
        ("resize(8, antialias=2)", "antialias must be True or False; got 2"),
        ("random_flip(7)", "probability must be in [0, 1]; got 7"),
        ("random_flip('yes')", "probability must be in [0, 1]; got 'yes'"),
        ("random_resized_crop(8, min_area=0)", "min_area must be in (0, 1]; got 0"),
        ("random_resized_crop(8, 0.9, 0.5)", "min_area must be at most max_area; got 0.9 and 0.5"),
        ("random_erasing(min_ratio=4)", "min_ratio must be at most max_ratio; got 4 and 3.3"),
        ("random_erasing(value=(1, 2))", f"value must be {LEVELS}; got (1, 2)"),
        ("random_erasing(value=300)", f"value must be {LEVELS}; got 300"),
        ("resize(99999)", f"size must be {SIZES}; got 99999"),
        ("resize(8, ['a'])", "interpolation must be one of bilinear, bicubic; got ['a']"),
        ("random_blur(0, 0, 1)", "min_sigma must be in (0, 100] pixels; got 0"),
        ("random_blur(1, 1e300)", "max_sigma must be in (0, 100] pixels; got 1e+300"),
        ("random_resized_crop(8, min_ratio=0.001)", "min_ratio must be in [0.01, 100]; got 0.001"),
        ("color_jitter(hue=0.9)", "hue must be in [0, 0.5]; got 0.9"),
        ("color_jitter(-1)", "brightness must be in [0, 100]; got -1"),
        ("color_jitter(1e999)", "brightness must be in [0, 100]; got inf"),
        ("randaugment(-2)", "num_ops must be a whole number >= 0; got -2"),
        ("randaugment(2, 31)", "magnitude must be a whole number in 0 … 30; got 31"),
        ("timm_randaugment(2, 11)", "magnitude must be in [0, 10]; got 11"),
        ("timm_randaugment(2, 9, -1)", "magnitude_std must be in [0, 10]; got -1"),
        ("timm_randaugment(2, 9, fill='noise')", f"fill must be {FILLS}; got 'noise'"),
        ("timm_randaugment(2, 9, fill=(1, 2))", f"fill must be {FILLS}; got (1, 2)"),
        ("timm_randaugment(2.0)", "num_ops must be a whole number >= 0; got 2.0"),
        ("timm_randaugment(interpolation=3)", f"{KERNELS}; got 3"),
        ("random_erasing(deviation=256)", f"deviation must be {DEVIATIONS}; got 256"),
        ("random_erasing(deviation=(1, 2))", f"deviation must be {DEVIATIONS}; got (1, 2)"),
        ("random_erasing(value='noise', deviation=3)", f"{NOISE}; got 3"),
        ("random_affine(scale=1.0)", "scale must be in [0, 1); got 1.0"),
        ("random_affine(shear=90)", "shear must be in [0, 90) degrees; got 90"),
        ("random_solarize(-1)", "threshold must be in [0, 256]; got -1"),
    ],
)  # fmt: skip
def test_arguments_that_break_a_rule(part, problem):
    with pytest.raises(ValueError) as caught:
        parse_transforms(part, "data.train_transforms")
    assert str(caught.value) == f"data.train_transforms: in {part}, {problem}. Correct it."


def test_every_argument_has_a_rule_that_its_default_keeps():
    for name in TRANSFORMS:
        size = "8" if "size" in TRANSFORMS[name].__code__.co_varnames[:3] else ""
        (transform,) = parse_transforms(f"{name}({size})", "x")
        assert set(transform.keywords) <= set(RULES)


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("timm_randaugment(fill=(1, 2, 3))", "fill"),
        ("random_erasing(deviation=(1, 2, 3))", "deviation"),
        ("random_erasing(value=(1, 2, 3))", "value"),
    ],
)
def test_levels_are_as_many_as_channels(spec, argument):
    assert parse_transforms(spec, "x", channels=3) and parse_transforms(spec, "x")
    message = rf"x: in .*, {argument} must have a level for each of 1 channels; got \(1, 2, 3\)\."
    with pytest.raises(ValueError, match=message):
        parse_transforms(spec, "x", channels=1)
    with pytest.raises(ValueError, match=rf"{argument} must have a level for each of 1 channels"):
        make_pipeline(DataConfig(train_transforms=spec), (8, 8, 1), train=True)


def test_narrow_fallback_crop_has_pixels():
    (crop,) = parse_transforms("random_resized_crop(4, min_ratio=0.01, max_ratio=0.011)", "x")
    assert crop(noise(9, 9), np.random.default_rng(0)).shape == (4, 4, 3)
