"""Files of self-supervised training: a student and a teacher, each with a head behind its backbone.

A network is the tree that `crate_jax.tasks.simdino.SimDino` trains: the parameters of the backbone,
and under ``head`` those of three linear maps, ``linear0`` to ``linear2``, and perhaps
``mask_token``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crate_jax.files import located, written_aside
from crate_jax.interop import pth
from crate_jax.interop.addresses import fetched
from crate_jax.interop.contents import read_contents
from crate_jax.interop.convert import check_implied, find_layout, recognise
from crate_jax.interop.faults import faults
from crate_jax.interop.floats import as_float32, check_finite
from crate_jax.interop.layouts.layout import Tree
from crate_jax.interop.tree import flatten, nest, tree_of
from crate_jax.models.parameters import Params
from crate_jax.models.stacked import BlockModel

PREFIXES = {"student": "module.", "teacher": ""}  # that the official files have, before all names


def load_network(path: str | Path, model: BlockModel, which: str = "teacher") -> Params:
    """A network out of a file of self-supervised training, with its head.

    `crate_jax.load_weights` reads the backbone alone.

    Args:
        path: a file in one of the layouts of the model's family, with a head or without.
        model: the backbone, with ``num_classes=0``.
        which: the key of the network in the file.

    Returns:
        The tree, float32 arrays on the host.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: see `crate_jax.load_weights`.
    """
    path, backbone = fetched(path), tree_of(model)
    arrays = read_contents(path, backbone, which).arrays
    layout = recognise(arrays, model)
    check_implied(layout, model, "Set model.{field}.")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    heads = {k: v for k, v in layout.tree_shapes(shapes).items() if k.startswith("head/")}
    tree = Tree({**backbone.shapes, **heads}, backbone.patch)
    expected = {name: entry.official for name, entry in layout.entries(tree).items()}
    if wrong := faults(shapes, expected):
        raise ValueError(
            f"{path} must hold a network of the model under {which}; got {wrong}. "
            "Build the model with the sizes of these weights, and num_classes=0."
        )
    flat = layout.to_ours({k: as_float32(v, k, path) for k, v in arrays.items()}, tree)
    check_finite(flat, path)
    return nest(flat, tree)[0]


def save_networks(
    path: str | Path, networks: Mapping[str, Params], model: BlockModel, layout: str
) -> None:
    """Write networks as the official programs do, each under its key of a PyTorch file; float32.

    Args:
        path: the path of the file, a PyTorch file whatever its end.
        networks: trees by key, "student" and "teacher".
        model: the backbone, with ``num_classes=0``.
        layout: whose names: "simdino" or "simdinov2".

    Raises:
        ValueError: PyTorch is missing, a tree is not that of the model and of a head, or the layout
            has no place for one.
        FileNotFoundError: there is no such folder.
    """
    path, backbone, names = located(path, "weights"), tree_of(model), find_layout(model, layout)
    written = {}
    for key, params in networks.items():
        flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
        heads = {name: array.shape for name, array in flat.items() if name.startswith("head/")}
        tree = Tree({**backbone.shapes, **heads}, backbone.patch)
        if wrong := faults({name: array.shape for name, array in flat.items()}, tree.shapes):
            raise ValueError(
                f"{key} must hold the parameters of the model, and a head; got {wrong}. "
                "Give the model of the backbone, with num_classes=0."
            )
        official = names.to_official(flat, tree).items()
        prefix = PREFIXES.get(key, "")
        written[key] = {prefix + names.in_file(k, tree.depth): v for k, v in official}
    with written_aside(path) as aside:
        pth.write_networks(aside, written)
