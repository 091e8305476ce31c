"""A model's parameters into files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crate_jax.files import located, written_aside
from crate_jax.interop import npz, pth, safetensors
from crate_jax.interop.addresses import is_address
from crate_jax.interop.convert import find_layout
from crate_jax.interop.faults import faults
from crate_jax.interop.hub_folder import WEIGHTS, ModelCard, describe, names_folder, open_folder
from crate_jax.interop.layouts.layout import Tree
from crate_jax.interop.pictures import Preprocessing
from crate_jax.interop.tree import flatten, tree_of
from crate_jax.models.parameters import Params
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import architecture, has_family

# The format of a written file, by the end of its name.
SUFFIXES = (".npz", ".safetensors", *pth.FORMS)


def save_weights(
    path: str | Path,
    params: Params,
    model: BlockModel,
    *,
    layout: str | None = None,
    class_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    card: ModelCard | None = None,
) -> None:
    """Write a model's parameters to a file, whole or not at all; float32, bit for bit.

    Args:
        path: its end, in any case, tells the kind: ``.safetensors`` (with the model's configuration
            and the names of its classes as metadata); ``.npz`` (with these names as the entry
            ``class_names``); ``.pth``, ``.pt`` or ``.bin`` (a bare state dict, which the official
            model's ``load_state_dict`` takes); ``.ckpt`` (that under ``state_dict``, as Lightning
            has it); or ``.pth.tar`` (likewise, every name behind ``module.``, as the official
            scripts read it). A layout of files that hold more than one network puts the state dict
            under the key where they have it. What is there is replaced at the end. A path that ends
            in ``/``, or that of a folder of this machine, gets what a repository on the Hugging
            Face hub needs: ``model.safetensors``, ``config.json`` and the model card ``README.md``.
        params: the parameter tree; of a model with running statistics its variables, {"params": …,
            "batch_stats": …}. Arrays of any kind that this process holds whole, in the boxes of
            Flax's partitioning or not.
        model: the model they belong to.
        layout: whose names and shapes: one of `crate_jax.interop.layouts`; None: the paths of our
            tree, and in PyTorch files the first layout of the model's family that agrees with it.
        class_names: the names of the model's outputs, in their order; (): none are written.
        preprocessing: of pictures, for a folder's configuration; None: it says nothing of it.
        card: what a folder's model card says besides.

    Raises:
        ValueError: the kind of file or the layout is not known, PyTorch is missing, the tree is not
            that of the model (every fault is named), or names of classes are not as many as the
            model's outputs, or the kind of file does not hold them. Or a preprocessing or a card is
            given for a file, or the folder is a run.
        FileNotFoundError: there is no such folder.
    """
    if is_address(path):
        raise ValueError(
            f"weights must be written to a path here, or in a bucket; got {path}. For the hub, "
            "write a folder, and upload it by `hf upload`."
        )
    if names_folder(path):
        folder = open_folder(path)
        save_weights(folder / WEIGHTS, params, model, layout=layout, class_names=class_names)
        describe(folder, model, class_names, preprocessing, card or ModelCard())
        return
    if preprocessing or card:
        raise ValueError(
            f"weights must be written to a folder for a preprocessing or a model card; got {path}. "
            "End the path in a slash, or leave them out."
        )
    path, tree = located(path, "weights"), tree_of(model)
    arrays = _arrays(params, tree)
    suffix = _suffix(path)
    torch = suffix in pth.FORMS
    if torch:
        pth.require_torch(path)
    _check_class_names(class_names, model, path, torch=torch)
    under = ""
    if layout is not None or torch:
        names = find_layout(model, layout, torch=torch)
        official, under = names.to_official(arrays, tree), names.under
        arrays = {names.in_file(name, tree.depth): array for name, array in official.items()}
    with written_aside(path) as aside:
        if torch:
            pth.write_checkpoint(aside, arrays, suffix, under)
        elif suffix == ".npz":
            npz.write(aside, arrays, class_names)
        else:
            fields = architecture(model) if has_family(model) else {}
            safetensors.write(aside, arrays, fields, class_names)


def holds_class_names(path: str | Path) -> bool:
    """True if a file that `save_weights` writes to a path can name classes."""
    return names_folder(path) or Path(path).suffix.lower() in (".npz", ".safetensors")


def _arrays(params: Params, tree: Tree) -> dict[str, np.ndarray]:
    """The arrays of a model by the paths of our tree, float32; every fault is named in an error."""
    if tree.collections and "params" not in params:
        raise ValueError(
            "params must be the variables of a model that has more; got params alone, without "
            f"{', '.join(tree.collections)}. Give the variables that the model is applied to."
        )
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    wrong = faults({name: array.shape for name, array in arrays.items()}, tree.shapes)
    if wrong:
        raise ValueError(
            f"params must be those of the model and nothing else; got {wrong}. "
            "Save them with the model that they were trained with."
        )
    return arrays


def _check_class_names(
    class_names: Sequence[str], model: BlockModel, path: Path, *, torch: bool
) -> None:
    """Refuse names of classes that the kind of file cannot hold, or that are not one an output."""
    if class_names and torch:
        raise ValueError(
            f"class_names must be () for PyTorch's files; got {len(class_names)} for {path}. "
            "Write .safetensors or .npz, or leave them out."
        )
    outputs = getattr(model, "num_classes", 0)  # a model of text has tokens, and no classes
    if class_names and len(class_names) != outputs:
        raise ValueError(
            f"class_names must be one for each of the {outputs} outputs of the model; "
            f"got {len(class_names)}. Name all of them, or none."
        )


def _suffix(path: Path) -> str:
    """The known suffix that a name ends in."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(
        f"weights must be written as {', '.join(SUFFIXES)}; got {path}. Change its suffix."
    )
