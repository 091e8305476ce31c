"""Numbers of a file as parameters take them: floats, float32, finite."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from crate_jax.interop.layouts.layout import Arrays


def is_float(array: np.ndarray) -> bool:
    """True for an array of floats; NumPy's archives return bfloat16 as two bytes, untyped."""
    return array.dtype == np.dtype("V2") or jnp.issubdtype(array.dtype, jnp.floating)


def as_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Any float as float32."""
    if array.dtype == np.dtype("V2"):
        array = array.view(jnp.bfloat16)
    if not is_float(array):
        raise ValueError(
            f"{name} must be of floats; got {array.dtype} in {path}. Save the weights alone."
        )
    return np.asarray(array, np.float32)


def check_finite(flat: Arrays, path: Path) -> None:
    """Refuse arrays with a NaN or an infinity; each is named."""
    for name, leaf in flat.items():
        if not np.isfinite(leaf).all():
            count = int(np.sum(~np.isfinite(leaf)))
            raise ValueError(
                f"{name} must be finite; got {count} values of NaN or infinity in {path}. "
                "Take an earlier checkpoint."
            )
