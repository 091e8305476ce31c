"""A model's parameters into files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from crate_jax.files import expanded, written_aside
from crate_jax.interop import npz, pth, safetensors
from crate_jax.interop.convert import find_layout
from crate_jax.interop.faults import faults
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.tree import flatten, tree_of
from crate_jax.models.classifier import ImageClassifier, Params
from crate_jax.models.zoo import architecture, has_family

_TORCH = (".pth", ".pt")


def save_weights(
    path: str | Path,
    params: Params,
    model: ImageClassifier,
    *,
    layout: str | None = None,
) -> None:
    """Write a model's parameters to a file, whole or not at all; float32, bit for bit.

    Args:
        path: ``.safetensors`` (with the model's configuration as metadata), ``.npz``, or ``.pth``
            or ``.pt`` (a bare state dict, which the official model's ``load_state_dict`` takes).
            What is there is replaced at the end.
        params: the parameter tree, arrays of any kind that this process holds whole.
        model: the model they belong to.
        layout: whose names and shapes: one of `crate_jax.interop.layouts`; None: the paths of our
            tree, and in PyTorch files the first layout of the model's family that agrees with it.

    Raises:
        ValueError: the kind of file or the layout is not known, PyTorch is missing, or the tree is
            not that of the model; every fault is named.
        FileNotFoundError: there is no such folder.
    """
    path, tree = Path(expanded(path, "weights")), tree_of(model)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    wrong = faults({name: array.shape for name, array in arrays.items()}, tree.shapes)
    if wrong:
        raise ValueError(
            f"params must be those of the model and nothing else; got {wrong}. "
            "Save them with the model that they were trained with."
        )
    write = _writer(path, model)
    if layout is not None or write is pth.write_checkpoint:
        names = find_layout(model, layout, torch=write is pth.write_checkpoint)
        official = names.to_official(arrays, tree)
        arrays = {names.prefix + name: array for name, array in official.items()}
    with written_aside(path) as aside:
        write(aside, arrays)


def _writer(path: Path, model: ImageClassifier) -> Callable[[Path, Arrays], None]:
    """How to write a file of this suffix."""

    def write_safetensors(aside: Path, arrays: Arrays) -> None:
        safetensors.write(aside, arrays, architecture(model) if has_family(model) else {})

    writers = {".npz": npz.write, ".safetensors": write_safetensors}
    writers |= dict.fromkeys(_TORCH, pth.write_checkpoint)
    if path.suffix.lower() not in writers:
        raise ValueError(
            f"weights must be written as {', '.join(writers)}; got {path}. Change its suffix."
        )
    return writers[path.suffix.lower()]
