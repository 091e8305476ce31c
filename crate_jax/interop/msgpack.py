"""Flax's msgpack files: a tree of arrays, as `flax.serialization.to_bytes` writes it."""

from pathlib import Path

import numpy as np

from crate_jax.errors import first_line
from crate_jax.interop.kinds import not_whole, unreadable
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.names import Known, unwrap


def read(path: Path, known: Known) -> tuple[Arrays, list[str]]:
    """The variables by path: of a bare tree, of a model's variables, or of a train state.

    Args:
        path: the path of the file.
        known: the names that are known.

    Returns:
        Arrays by the paths in the file; and one line for each choice that was made, see `unwrap`.

    Raises:
        ValueError: it is damaged, or holds no tree of arrays.
    """
    from flax import serialization

    try:
        content = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack has several classes of its own
        said = not_whole(path, "a whole msgpack file of Flax", first_line(error))
        raise unreadable(path, error) or ValueError(said) from None
    found = unwrap(content, path, known)
    leaves = {**found.state, **found.beside}
    return {k: v for k, v in leaves.items() if isinstance(v, np.ndarray)}, found.said
