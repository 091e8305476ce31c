"""Parameter trees by shape: what a model's are, and what shapes alone tell of a model."""

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
from flax import traverse_util

from crate_jax.interop.layouts.layout import Shapes, Tree
from crate_jax.models.classifier import pair
from crate_jax.models.cost import abstract_variables
from crate_jax.models.parameters import Params, Variables, variables_of
from crate_jax.models.stacked import BlockModel

# The embedding of patches, and of a convolutional stem.
PROJECTION, FIRST_STAGE = "embedding/projection/kernel", "embedding/stem/stage_0/kernel"

# What the shapes of a parameter tree tell: the leaf, and the axes whose product it is. A model has
# one of the leaves.
_SIZES: dict[str, dict[str, slice]] = {
    "width": {"head_norm/scale": slice(0, 1), "embedding/tokens": slice(1, 2)},
    "depth": {
        f"blocks/{name}_norm/scale": slice(0, 1) for name in ("mssa", "mhsa", "tssa", "cbsa")
    },
    "num_heads x head_dim": {
        f"blocks/{name}/W_out": slice(1, -1) for name in ("mssa", "mhsa", "tssa", "cbsa")
    }
    | {"blocks/mssa/U": slice(2, None), "block/bisoftmax/U": slice(1, None)},
    "atoms": {"blocks/odl/D": slice(2, None)},
    "hidden": {"blocks/mlp/b_in": slice(1, None), "block/tied_mlp/V": slice(1, None)},
    "pixels of a patch": {PROJECTION: slice(0, -1)},
    "positions": {"embedding/pos_embedding": slice(0, 1)},
    "registers": {"register_tokens": slice(0, 1)},
    "num_classes": {"head/kernel": slice(-1, None)},
    "vocab_size": {"embedding/tokens": slice(0, 1)},
    "positions in a text": {"embedding/positions": slice(0, 1)},
}
# Fields that no fit can change.
LAYER_SIZES = ("width", "depth", "num_heads x head_dim", "atoms", "hidden")


def tree_of(model: BlockModel) -> Tree:
    """The shapes of a model's variables by path, and its patch.

    Any Flax module will do that has an `input_shape` and is called as an image classifier is.

    Raises:
        ValueError: it has none, and is no `BlockModel`.
    """
    if not (isinstance(model, BlockModel) or hasattr(model, "input_shape")):
        raise ValueError(
            "model must have an input_shape, by which its parameters are known; "
            f"{type(model).__name__} has none. Add the property, (H, W, c)."
        )
    try:
        return _tree_of(cast("Hashable", model))
    except TypeError:  # a field that cannot be hashed, such as a list
        return _tree_of.__wrapped__(model)


@functools.lru_cache(maxsize=16)
def _tree_of(model: Any) -> Tree:
    """Tracing a model takes a good part of the time that a small file takes."""
    variables = abstract_variables(model)
    shapes = {path: tuple(leaf.shape) for path, leaf in _by_path(variables).items()}
    patched = PROJECTION in shapes and hasattr(model, "patch_size")
    patch = (*pair(model.patch_size), model.in_channels) if patched else None
    others = tuple(name for name in variables if name != "params")
    grid = getattr(model, "position_grid", getattr(model, "grid", None))
    return Tree(shapes, patch, others, grid)


def _by_path(variables: Variables) -> dict[str, Any]:
    """Leaves of parameters by path, and of other collections behind the collection's name."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    flat = traverse_util.flatten_dict({**variables["params"], **others}, sep="/")
    return {path: getattr(leaf, "value", leaf) for path, leaf in flat.items()}


def nest(flat: Mapping[str, Any], tree: Tree) -> tuple[Params, Params]:
    """Parameters of a model, and its other collections by name, from leaves by path."""
    nested: dict[str, Any] = traverse_util.unflatten_dict(flat, sep="/")  # type: ignore[arg-type]
    extra = {name: nested.pop(name) for name in tree.collections if name in nested}
    return nested, extra


def flatten(params: object) -> dict[str, jax.Array]:
    """Leaves by path, a/b/c, out of the boxes in which Flax's partitioning puts them.

    Args:
        params: parameters; or variables, whose other collections come behind their names.

    Raises:
        ValueError: it is no tree of arrays.
    """
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params must be a mapping of arrays by name; got {type(params).__name__}. "
            "Give variables['params'], or the variables."
        )
    leaves = _by_path(variables_of(params))
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path} must be an array; got {type(leaf).__name__}. "
                "Give the parameters themselves."
            )
    return leaves


def sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of the model that a flat tree of these shapes belongs to, as far as its leaves tell."""
    return {
        name: math.prod(shapes[path][axes])
        for name, leaves in _SIZES.items()
        for path, axes in leaves.items()
        if path in shapes
    }
