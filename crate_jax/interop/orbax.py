"""Trees that a user's program wrote with Orbax: a checkpointer's, or a manager's newest step."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from crate_jax.interop.kinds import not_whole
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.names import Known, flat, is_array, left_aside, unwrap

_SIGNS = ("_METADATA", "manifest.ocdbt")  # a folder with one of these in it holds a tree


def find_trees(folder: Path) -> dict[str, Path]:
    """The trees in a folder, by the name of their item; "" is the folder itself.

    The folder is a tree, a manager's step with one or more items, or holds such steps, of which the
    one of the highest number counts. Nothing is opened.
    """
    if any((folder / sign).exists() for sign in _SIGNS):
        return {"": folder}
    inner = [each for each in folder.iterdir() if each.is_dir()]
    found = {each.name: each for each in inner if any((each / s).exists() for s in _SIGNS)}
    steps = {int(n[1]): each for each in inner if (n := re.search(r"(?:^|_)(\d+)$", each.name))}
    if steps and set(found.values()) <= set(steps.values()):
        return find_trees(steps[max(steps)])
    return found


def read(trees: dict[str, Path], path: Path, known: Known) -> tuple[Arrays, list[str]]:
    """The parameters in what `find_trees` found: a bare tree, or that within a train state.

    Nothing but the variables of the model is read.

    Args:
        trees: by the name of their item.
        path: for errors.
        known: the names that are known.

    Returns:
        Arrays by path; and one line for each choice that was made, see `unwrap`.

    Raises:
        ValueError: a tree is damaged, or holds no parameters.
    """
    content = {name: _read(path, _shapes, folder) for name, folder in trees.items()}
    found = unwrap(content.get("", content), path, known)
    leaves = {name: leaf for name, leaf in found.state.items() if is_array(leaf)}
    item, *keys = ("", *found.where) if "" in trees else (*found.where, *[""] * (not found.where))
    if not leaves or item not in trees:
        raise ValueError(
            f"{path} must hold parameters; got {left_aside(found.state)} instead. "
            "Name the folder of the tree that has them."
        )
    arrays = _read(path, _restore, trees[item], keys, traverse_util.unflatten_dict(leaves, sep="/"))
    for name, tree in traverse_util.unflatten_dict(found.beside, sep="/").items():
        folder, inside = (trees[item], [*keys[:-1], name]) if keys else (trees[name], [])
        arrays |= {name: _read(path, _restore, folder, inside, tree)}
    return {name: np.asarray(leaf) for name, leaf in flat(arrays)}, found.said


def _read(path: Path, how: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that calls Orbax, whose errors end in one line."""
    try:
        return how(*args)
    except Exception as error:  # Orbax raises bare Exceptions, KeyErrors and errors of JSON
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ValueError(not_whole(path, "a whole Orbax tree", reason)) from None


def _shapes(folder: Path) -> Any:
    """The tree in a folder, its leaves with shape and dtype."""
    # Here, not above: Orbax is needed by those alone who read such a tree.
    import orbax.checkpoint as ocp

    from crate_jax.checkpoint.s3 import teach_orbax

    teach_orbax(folder)
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree  # type: ignore[arg-type]


def _restore(folder: Path, keys: Sequence[str], tree: Any) -> Any:
    """The branch of a tree that lies under some keys, as NumPy arrays."""
    import jax
    import orbax.checkpoint as ocp

    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    for key in reversed(keys):
        wanted = {key: wanted}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    part = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(folder, args=part)
    for key in keys:
        found = found[key]
    return found
