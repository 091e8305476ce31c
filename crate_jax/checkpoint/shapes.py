"""Compare a tree with the tree of a checkpoint. If they differ, nothing is damaged."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from crate_jax.checkpoint.digest import path_of
from crate_jax.checkpoint.faults import OtherTreeError
from crate_jax.checkpoint.record import DIGEST, is_whole, read_from_disk
from crate_jax.parallel import PyTree


def saved_shapes(directory: Path, step: int) -> PyTree:
    """The tree of a step's state as `jax.ShapeDtypeStruct` leaves; no array is read.

    Raises:
        Exception: whatever Orbax raises where the step is damaged.
    """
    folder: Any = directory / str(step) / "state"
    tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def check_fits(directory: Path, step: int, wanted: PyTree, *, part: bool) -> None:
    """Check that the tree to restore has the names, shapes and dtypes that a step holds.

    Args:
        directory: the directory of the steps.
        step: the step.
        wanted: tree of `jax.ShapeDtypeStruct`.
        part: whether it is some branches of the tree.

    Raises:
        OtherTreeError: it is not; the first leaf that differs is named.
        Exception: the step is damaged.
    """
    ours, theirs = _by_path(wanted), _by_path(saved_shapes(directory, step))
    record = read_from_disk(directory, step)
    if is_whole(record) and record.get(DIGEST, theirs).keys() != theirs.keys():
        raise ValueError("its tree is not what was saved")
    if part:
        branches = {path.partition("/")[0] for path in ours}
        theirs = {k: v for k, v in theirs.items() if k.partition("/")[0] in branches}
    odd = next((path for path in sorted(ours | theirs) if ours.get(path) != theirs.get(path)), None)
    if odd is not None:
        raise OtherTreeError(
            f"checkpoint must have the arrays of this config; step {step} in {directory} has {odd} "
            f"{theirs.get(odd, 'not at all')}, expected {ours.get(odd, 'none')}. Use the config "
            "and the data that the run was trained with."
        )


def _by_path(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every leaf, in words, by its path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {path_of(path): f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves}
