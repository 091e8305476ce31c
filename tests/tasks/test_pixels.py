"""Bytes to normalised floats, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import IMAGENET_MEAN, IMAGENET_STD
from crate_jax.tasks.classify import Classify
from crate_jax.tasks.pixels import normalize


def every_byte(channels):
    """All 256 values in every channel, shifted from one channel to the next."""
    values = (np.arange(256)[:, None] + 85 * np.arange(channels)[None]) % 256
    return values.reshape(4, 8, 8, channels).astype(np.uint8)


@pytest.mark.parametrize(
    "channels, mean, std",
    [
        (3, IMAGENET_MEAN, IMAGENET_STD),
        (3, (0.5,), (0.25,)),
        (3, (0.1, 0.2, 0.3), (0.5,)),
        (1, (0.5,), (0.5,)),
        (2, (0.0, 1.0), (1.0, 2.0)),
    ],
)
def test_normalize(channels, mean, std):
    images = every_byte(channels)
    out = jax.jit(lambda x: normalize(x, mean=mean, std=std))(images)
    expected = (images / 255.0 - np.array(mean)) / np.array(std)  # NumPy broadcasts to channels
    assert (out.dtype, out.shape) == (jnp.float32, images.shape)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    eager = normalize(jnp.asarray(images), mean=mean, std=std)
    np.testing.assert_allclose(eager, expected, rtol=0, atol=2e-6)


def test_ends_of_the_range_are_exact():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    out = normalize(jnp.asarray(images), mean=(0.5,), std=(0.5,))
    assert out.ravel().tolist() == [-1.0, 1.0]


def test_normalize_keeps_the_sharding():
    from crate_jax.parallel import batch_sharding, make_mesh

    sharding = batch_sharding(make_mesh())
    images = jax.device_put(np.zeros((8, 2, 2, 3), np.uint8), sharding)
    out = jax.jit(lambda x: normalize(x, mean=IMAGENET_MEAN, std=IMAGENET_STD))(images)
    assert out.sharding.is_equivalent_to(sharding, out.ndim)


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("values", [(0.5, 0.5), (), (0.5,) * 4])
def test_wrong_number_of_values(name, values):
    statistics = {"mean": (0.5,), "std": (0.5,), name: values}
    images = jnp.zeros((1, 2, 2, 3), jnp.uint8)
    with pytest.raises(ValueError) as caught:
        normalize(images, **statistics)
    assert str(caught.value) == (
        f"data.{name} must have one value, or one for each of 3 channels; got {values}."
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32", "bool"])
def test_other_types_are_no_pixels(dtype):
    images = jnp.zeros((1, 2, 2, 1), dtype)
    message = rf"images must be stored pixels \(uint8\) or normalised already .*; got {dtype}\. Sc"
    with pytest.raises(ValueError, match=message):
        normalize(images, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=message):
        Classify(None).normalized(images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_are_normalised_already(dtype):
    images = jnp.ones((1, 2, 2, 1), dtype)
    assert Classify(None).normalized(images) is images
