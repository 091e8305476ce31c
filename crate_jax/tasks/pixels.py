"""Stored pixels to the input of a model, on the device, and back."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def blank_image(shape: tuple[int, ...]) -> dict[str, Array]:
    """A batch of one black image of stored pixels (1, H, W, c), with the label 0."""
    image, label = np.zeros((1, *shape), np.uint8), np.zeros(1, np.int32)
    return {"image": image, "label": label}  # type: ignore[dict-item]


def normalize(images_BxHxWxc: Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x / 255 − mean) / std. Pixels travel to the device as bytes, a quarter of their float size.

    Args:
        images_BxHxWxc: uint8.
        mean: one value, or one a channel, for pixels in [0, 1].
        std: likewise.

    Returns:
        Normalised images, float32, same shape.

    Raises:
        ValueError: the images are of another type, or mean or std has another number of values.
    """
    if images_BxHxWxc.dtype != jnp.uint8:
        raise ValueError(
            f"images must be stored pixels (uint8) or normalised already (floats); got "
            f"{images_BxHxWxc.dtype}. Scale them to 0 … 255 and convert them."
        )
    c = images_BxHxWxc.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, c):
            raise ValueError(
                f"data.{name} must have one value, or one for each of {c} channels; got {values}."
            )
    mean_c = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (c,))
    std_c = jnp.broadcast_to(jnp.asarray(std, jnp.float32), (c,))
    x_BxHxWxc = images_BxHxWxc.astype(jnp.float32) / 255
    return (x_BxHxWxc - mean_c[None, None, None, :]) / std_c[None, None, None, :]


def normalized(images: Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """The input of a model: stored pixels by `normalize`, floats as they are.

    Raises:
        ValueError: images are neither.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return normalize(images, mean=mean, std=std)


def pixels_of(images_BxHxWxc: Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Normalised images as pixels again, cut off at 0 and 1."""
    mean_c, std_c = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (mean, std))
    return jnp.clip(images_BxHxWxc * std_c + mean_c, 0, 1)
