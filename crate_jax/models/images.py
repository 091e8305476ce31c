"""Check images for a model, and describe the fault of wrong ones in one line."""

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


def check_images(images: object, shape: tuple[int, int, int]) -> None:
    """Refuse arrays that are no batch of normalised images.

    Args:
        images: what a model was given, an array or a tracer of one.
        shape: (H, W, c) of an image of the model.

    Raises:
        ValueError: they are no array, not of floats, or of another shape.
    """
    if not isinstance(images, jax.Array | np.ndarray):
        how = "numpy.stack" if isinstance(images, list | tuple) else "numpy.asarray"
        raise ValueError(
            f"images must be one array of NumPy or JAX; got {type(images).__name__}. Make it one: "
            f"{how}(images)."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        values = "images / 255" if images.dtype == np.uint8 else "values in [0, 1]"
        raise ValueError(
            f"images must be floats, normalised; got {images.dtype}. Normalise them as the weights "
            f"were trained: ({values} - mean) / std."
        )
    if images.ndim != 4 or images.shape[1:] != shape:
        raise ValueError(
            f"images must be (B, {', '.join(map(str, shape))}) for this model; got "
            f"{images.shape}. {_remedy(images.shape, shape)}"
        )


def check_masked(masked: object, shape: tuple[int, int]) -> None:
    """Refuse an array that does not say for every patch whether it is hidden.

    Args:
        masked: what a model was given, an array or a tracer of one; None: nothing is hidden.
        shape: (B, P).

    Raises:
        ValueError: it is no array of truth values, or of another shape.
    """
    if masked is None:
        return
    got = type(masked).__name__
    if isinstance(masked, jax.Array | np.ndarray):
        if masked.shape == shape and masked.dtype == np.bool_:
            return
        got = f"{masked.dtype} {masked.shape}"
    raise ValueError(
        f"masked must be an array {shape} of True and False for these images; got {got}. "
        "Say for every patch whether it is hidden."
    )


def _remedy(got: Shape, shape: tuple[int, int, int]) -> str:
    """The remedy that turns images of one shape into images of another."""
    H, W, c = shape
    if c == 1 and got[-2:] == (H, W) and len(got) in (2, 3):
        return f"Add the axes that lack: images.reshape(-1, {H}, {W}, 1)."
    steps = []
    channels_first = len(got) in (3, 4) and got[-3] == c != got[-1]
    if channels_first:
        got = (*got[:-3], *got[-2:], c)
        steps.append("Put channels last: numpy.moveaxis(images, -3, -1).")
    if len(got) == 3:
        steps.append("Add the batch axis: images[None].")
    if len(got) > 4:
        steps.append("Merge the axes in front: images.reshape(-1, *images.shape[-3:]).")
    if got[-3:] != shape:
        steps.append("Resize them, or set image_size and in_channels.")
    return " ".join(steps)
