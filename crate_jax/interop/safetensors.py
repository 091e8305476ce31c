"""Safetensors: named arrays, and the model's configuration in the file's metadata."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crate_jax.errors import first_line
from crate_jax.files import Json
from crate_jax.interop.kinds import not_whole, unreadable

# Keys of the model's configuration and of the names of its classes: both hold JSON.
METADATA_KEY, NAMES_KEY = "crate_jax", "crate_jax.class_names"


def read(path: str | Path) -> tuple[dict[str, np.ndarray], Json]:
    """All arrays by name, and the configuration that `write` put beside them.

    Returns:
        The arrays, and the fields of the model; {} for a file of another program.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return arrays, json.loads(metadata.get(METADATA_KEY, "{}"))
    except AttributeError as error:  # of a type that NumPy lacks
        raise ValueError(
            f"{path} must be of float64, float32, float16 or bfloat16; reading it ended in: "
            f"{error}. Save the weights in one of these."
        ) from None
    except (SafetensorError, OSError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str | Path, error: Exception) -> OSError | ValueError:
    what = "a whole safetensors file"
    return unreadable(path, error) or ValueError(not_whole(path, what, first_line(error)))


def read_names(path: Path) -> object:
    """The names of classes that `write` put into a file; [] if there are none.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    return _metadata(path, NAMES_KEY) or []


def read_fields(path: Path) -> object:
    """The configuration that `write` put into a file; {} if there is none.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    return _metadata(path, METADATA_KEY) or {}


def _metadata(path: Path, key: str) -> object:
    """An entry of a file's metadata; None if there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, OSError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from None


def write(
    path: Path, arrays: Mapping[str, np.ndarray], fields: Json, class_names: Sequence[str] = ()
) -> None:
    """Write arrays by name; the fields of their model and the names of its classes as metadata."""
    from safetensors.numpy import save_file

    metadata = {"format": "flax", METADATA_KEY: json.dumps(dict(fields))}
    if class_names:
        metadata[NAMES_KEY] = json.dumps(list(class_names))
    # The library writes the memory of an array as it lies.
    contiguous = {
        # A scalar would come back with an axis.
        name: np.ascontiguousarray(array).reshape(array.shape)
        for name, array in arrays.items()
    }
    save_file(contiguous, path, metadata=metadata)
