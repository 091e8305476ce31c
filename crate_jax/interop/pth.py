"""PyTorch files: opening, unwrapping and writing them. Needs PyTorch; nothing else here does."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_Value = TypeVar("_Value")

# Where training scripts put the state dict, and what PyTorch's wrappers and Flax put before names.
WRAPPERS = ("state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "params/")


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a PyTorch file, whatever wraps it.

    Descends through ``state_dict``, ``model`` and ``net`` (what lies beside them is the state of a
    training run), and strips ``module.`` and ``_orig_mod.`` from the names. Weights are data: only
    tensors and plain values are unpickled, and a file that asks for anything else is refused.

    Args:
        path: a file written by `torch.save`.

    Returns:
        Arrays by official name; floating ones are float32.

    Raises:
        ValueError: PyTorch is missing, or the file holds no state dict that can be read.
        FileNotFoundError: there is no such file.
    """
    torch = _torch(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file; got none there. Check the path.")
    try:
        # Training scripts save their flags beside the weights; a Namespace holds values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            # Mapped, not read, where the format allows: every array is copied once, into its place.
            # PyTorch goes by the suffix of a name, so that this one must not be seen.
            mapped = zipfile.is_zipfile(path) and Path(path).suffix != ".safetensors"
            source = path if mapped else file
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    # A KeyError, EOFError, struct.error, RuntimeError or UnpicklingError, by where the damage is.
    except Exception as error:
        raise ValueError(_refusal(path, error)) from None
    return {name: _to_numpy(value) for name, value in _unwrap(state, str(path)).items()}


def _refusal(path: str | Path, error: Exception) -> str:
    """Why a file was not read: it wants to run something, or it is damaged or no PyTorch file."""
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return (
            f"{path} must hold tensors alone; it asks to run or build {wanted[1]}, which is "
            "refused. Ask its author for the state dict alone."
        )
    return (
        f"{path} must be a whole PyTorch file; reading it ended in a {type(error).__name__}. "
        "It may be truncated: copy it again."
    )


def write_checkpoint(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a bare state dict that the official model's ``load_state_dict(strict=True)`` takes.

    Raises:
        ValueError: PyTorch is missing.
    """
    torch = _torch(path)
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)


def _torch(path: str | Path) -> ModuleType:
    """PyTorch, or what to do without it."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} needs PyTorch. pip install 'crate-jax[torch]'") from None
    return torch


def _unwrap(state: object, path: str) -> dict[str, "Tensor"]:
    """The innermost mapping from names to tensors, with bare names."""
    while isinstance(state, Mapping):
        inner = next((state[k] for k in WRAPPERS if isinstance(state.get(k), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} must hold a state dict, bare or under {', '.join(WRAPPERS)}; got "
            f"{type(state).__name__}. Save model.state_dict()."
        )
    for key, value in state.items():
        if not hasattr(value, "detach"):
            raise ValueError(
                f"{path} must hold only tensors; got {type(value).__name__} at {key}. "
                "Save model.state_dict()."
            )
    return bare_names(state, path)


def bare_names(state: Mapping[str, _Value], path: str | Path) -> dict[str, _Value]:
    """The same entries without what wrappers put before their names.

    Raises:
        ValueError: two names become the same.
    """
    prefixes, bare = re.compile(rf"^({'|'.join(map(re.escape, PREFIXES))})+"), {}
    for key, value in state.items():
        name = prefixes.sub("", str(key))
        if name in bare:
            raise ValueError(f"{path} must name each parameter once; got {name} twice. Remove one.")
        bare[name] = value
    return bare


def _to_numpy(tensor: "Tensor") -> np.ndarray:
    """A tensor as an array; half precision, which NumPy lacks in part, as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
