"""A model's parameters into files."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from crate_jax.files import written_aside
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
    class_names: Sequence[str] = (),
) -> None:
    """Write a model's parameters to a file, whole or not at all; float32, bit for bit.

    Args:
        path: ``.safetensors`` (with the model's configuration and the names of its classes as
            metadata), ``.npz`` (with these names as the entry ``class_names``), or ``.pth`` or
            ``.pt`` (a bare state dict, which the official model's ``load_state_dict`` takes). What
            is there is replaced at the end.
        params: the parameter tree, arrays of any kind that this process holds whole.
        model: the model they belong to.
        layout: whose names and shapes: one of `crate_jax.interop.layouts`; None: the paths of our
            tree, and in PyTorch files the first layout of the model's family that agrees with it.
        class_names: of the model's outputs, in their order; (): none are written.

    Raises:
        ValueError: the kind of file or the layout is not known, PyTorch is missing, the tree is not
            that of the model (every fault is named), or names of classes are not as many as the
            model's outputs, or the kind of file does not hold them.
        FileNotFoundError: there is no such folder.
    """
    path, tree = Path(path), tree_of(model)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    wrong = faults({name: array.shape for name, array in arrays.items()}, tree.shapes)
    if wrong:
        raise ValueError(
            f"params must be those of the model and nothing else; got {wrong}. "
            "Save them with the model that they were trained with."
        )
    write = _writer(path, model, class_names)
    if class_names and write is pth.write_checkpoint:
        raise ValueError(
            f"class_names must be () for a bare state dict; got {len(class_names)} for {path}. "
            "Write .safetensors or .npz, or leave them out."
        )
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(
            f"class_names must be one for each of the {model.num_classes} outputs of the model; "
            f"got {len(class_names)}. Name all of them, or none."
        )
    if layout is not None or write is pth.write_checkpoint:
        names = find_layout(model, layout, torch=write is pth.write_checkpoint)
        official = names.to_official(arrays, tree)
        arrays = {names.prefix + name: array for name, array in official.items()}
    with written_aside(path) as aside:
        write(aside, arrays)


def holds_class_names(path: str | Path) -> bool:
    """Whether the kind of file that `save_weights` writes to a path can name classes."""
    return Path(path).suffix.lower() in (".npz", ".safetensors")


def _writer(
    path: Path, model: ImageClassifier, class_names: Sequence[str]
) -> Callable[[Path, Arrays], None]:
    """How to write a file of this suffix."""

    def write_safetensors(aside: Path, arrays: Arrays) -> None:
        fields = architecture(model) if has_family(model) else {}
        safetensors.write(aside, arrays, fields, class_names)

    write_npz = functools.partial(npz.write, class_names=class_names)
    writers = {".npz": write_npz, ".safetensors": write_safetensors}
    writers |= dict.fromkeys(_TORCH, pth.write_checkpoint)
    if path.suffix.lower() not in writers:
        raise ValueError(
            f"weights must be written as {', '.join(writers)}; got {path}. Change its suffix."
        )
    return writers[path.suffix.lower()]
