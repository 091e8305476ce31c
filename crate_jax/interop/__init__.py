"""Weights in and out of other programs' files."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crate_jax.interop import torch_weights
from crate_jax.models.cost import abstract_parameters
from crate_jax.models.crate import Crate

__all__ = ["load_weights"]

TORCH_SUFFIXES = (".pth", ".pth.tar", ".pt", ".t7")


def load_weights(path: str | Path, model: Crate, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Read a model's parameters from a file or from a training run.

    Args:
        path: a PyTorch file (``.pth``, ``.pth.tar``, ``.pt``, ``.t7``) with official names, under
            any of the usual wrappers and prefixes; or a run's folder: its newest checkpoint.
        model: the model that the weights are for.
        skip: top-level groups of the parameter tree to leave out, such as ``head`` for another
            number of classes; neither read nor checked.

    Returns:
        The parameter tree, without what was skipped, as float32 arrays on the host:
            ``model.apply({"params": params}, …)``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the kind of file is not known, PyTorch is missing, the weights are not those of
            the model (each missing, unknown or ill-shaped entry is named), or one is not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file or a run's folder; got {path}, not there.")
    if path.is_dir():
        # Here, not above: Orbax is needed by those alone who read a run.
        from crate_jax.checkpoint import restore_params

        wanted = {k: v for k, v in abstract_parameters(model).items() if k not in skip}
        params, _ = restore_params(path, wanted, step="latest")
    elif path.name.lower().endswith(TORCH_SUFFIXES):
        params = torch_weights.from_state_dict(
            torch_weights.read_checkpoint(path), model, skip=skip
        )
    else:
        raise ValueError(
            f"weights must be a PyTorch file ({', '.join(TORCH_SUFFIXES)}) or the folder of a run; "
            f"got {path}. Convert the file to one of these."
        )
    params = jax.tree.map(np.asarray, params)
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(leaf_path, simple=True, separator="/")
            count = int(np.sum(~np.isfinite(leaf)))
            raise ValueError(
                f"{name} must be finite; got {count} values of NaN or infinity in {path}. "
                "Take an earlier checkpoint."
            )
    return params
