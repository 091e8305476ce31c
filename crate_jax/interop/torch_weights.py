"""The official PyTorch weights: names and layouts, both ways.

One table says which official entry holds which of our parameters, and in which layout: PyTorch
keeps a linear map as (out, in), here it is (in, out) with the axes K and p of the subspaces apart,
and the layers, separate there, are stacked on axis 0. PyTorch itself is needed only to open a file.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from crate_jax.models.cost import abstract_parameters
from crate_jax.models.crate import Crate

# Where training scripts put the state dict, and what wrappers put before its names.
WRAPPERS = ("state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")


class Same:
    """The same array on both sides."""

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Unchanged."""
        return ours

    def to_ours(self, official: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Unchanged but for axes of length one, which ``shape`` decides."""
        return official.reshape(shape)


class Leading(Same):
    """Axes of length one in front on the official side."""

    def __init__(self, axes: int):
        self.axes = axes

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """The axes put in front."""
        return ours[(None,) * self.axes]


class Linear:
    """(out, in) officially; here the input's axes first, then the output's."""

    def __init__(self, in_axes: int = 1):
        self.in_axes = in_axes

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Input and output flattened, then swapped."""
        fan_in = int(np.prod(ours.shape[: self.in_axes]))
        return ours.reshape(fan_in, -1).T

    def to_ours(self, official: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Swapped, then cut into the axes of ``shape``."""
        return official.T.reshape(shape)


# Our path, the official name ({i} is the layer), the layout.
TABLE: dict[str, tuple[str, Any]] = {
    "embedding/cls_token": ("cls_token", Leading(2)),
    "embedding/pos_embedding": ("pos_embedding", Leading(1)),
    "embedding/patch_norm/scale": ("to_patch_embedding.1.weight", Same()),
    "embedding/patch_norm/bias": ("to_patch_embedding.1.bias", Same()),
    "embedding/projection/kernel": ("to_patch_embedding.2.weight", Linear()),
    "embedding/projection/bias": ("to_patch_embedding.2.bias", Same()),
    "embedding/token_norm/scale": ("to_patch_embedding.3.weight", Same()),
    "embedding/token_norm/bias": ("to_patch_embedding.3.bias", Same()),
    "blocks/mssa_norm/scale": ("transformer.layers.{i}.0.norm.weight", Same()),
    "blocks/mssa_norm/bias": ("transformer.layers.{i}.0.norm.bias", Same()),
    "blocks/mssa/U": ("transformer.layers.{i}.0.fn.qkv.weight", Linear()),
    "blocks/mssa/W_out": ("transformer.layers.{i}.0.fn.to_out.0.weight", Linear(in_axes=2)),
    "blocks/mssa/b_out": ("transformer.layers.{i}.0.fn.to_out.0.bias", Same()),
    "blocks/ista_norm/scale": ("transformer.layers.{i}.1.norm.weight", Same()),
    "blocks/ista_norm/bias": ("transformer.layers.{i}.1.norm.bias", Same()),
    "blocks/ista/D": ("transformer.layers.{i}.1.fn.weight", Same()),
    "head_norm/scale": ("mlp_head.0.weight", Same()),
    "head_norm/bias": ("mlp_head.0.bias", Same()),
    "head/kernel": ("mlp_head.1.weight", Linear()),
    "head/bias": ("mlp_head.1.bias", Same()),
}


class Entry(NamedTuple):
    """One official entry, and where it goes."""

    path: str
    layer: int | None  # index on axis 0 of our array; None: the whole array
    layout: Any
    ours: tuple[int, ...]  # shape of our array, or of its one layer
    official: tuple[int, ...]


def from_state_dict(
    state: Mapping[str, np.ndarray], model: Crate, *, skip: Collection[str] = ()
) -> dict[str, Any]:
    """The parameters of a model from an official state dict.

    Args:
        state: arrays of any float dtype by official name, without wrappers and prefixes.
        model: the model they are for.
        skip: top-level groups of the parameter tree to leave out, such as ``head``.

    Returns:
        The parameter tree without what was skipped, new float32 NumPy arrays.

    Raises:
        ValueError: entries are missing, unknown or of another shape; every one is named.
    """

    def skipped(path: str) -> bool:
        return path.split("/")[0] in skip

    entries = _entries(model)
    left_out = {key for key, entry in entries.items() if skipped(entry.path)}
    entries = {key: entry for key, entry in entries.items() if key not in left_out}
    shapes = {key: tuple(np.shape(v)) for key, v in state.items() if key not in left_out}
    _check_fit("state", shapes, {key: entry.official for key, entry in entries.items()})
    params = {p: np.empty(s, np.float32) for p, s in _shapes(model).items() if not skipped(p)}
    for key, entry in entries.items():
        value = entry.layout.to_ours(np.asarray(state[key]), entry.ours)
        params[entry.path][... if entry.layer is None else entry.layer] = value
    return traverse_util.unflatten_dict(params, sep="/")


def to_state_dict(params: Mapping[str, Any], model: Crate) -> dict[str, np.ndarray]:
    """The official state dict of a model's parameters, or of anything shaped like them.

    Args:
        params: the parameter tree, a gradient, or an average; arrays of any kind.
        model: the model they belong to.

    Returns:
        New contiguous NumPy arrays by official name, of the dtypes of ``params``.

    Raises:
        ValueError: leaves are missing, unknown or of another shape; every one is named.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in _flatten(params).items()}
    _check_fit("params", {path: array.shape for path, array in arrays.items()}, _shapes(model))
    state = {}
    for key, entry in _entries(model).items():
        whole = arrays[entry.path]
        value = whole if entry.layer is None else whole[entry.layer]
        state[key] = np.array(entry.layout.to_official(value), order="C")
    return state


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a PyTorch file, whatever wraps it.

    Descends through ``state_dict``, ``model`` and ``net`` (what lies beside them is the state of a
    training run), and strips ``module.`` and ``_orig_mod.`` from the names. Only tensors are
    unpickled: a file cannot run code.

    Args:
        path: a file written by `torch.save`.

    Returns:
        Arrays by official name; floating ones are float32.

    Raises:
        ValueError: PyTorch is missing, or the file holds no state dict that can be read.
        FileNotFoundError: there is no such file.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} needs PyTorch. pip install 'crate-jax[torch]'") from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file; got none there. Check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A KeyError, EOFError, struct.error, RuntimeError or UnpicklingError, by where the damage is.
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} must be a PyTorch file of tensors; got "
            + (f"an object of {found[1]}" if found else f"a {type(error).__name__} on reading it")
            + ". If you trust it, open it with weights_only=False and save its state dict alone."
        ) from None
    return {key: _to_numpy(value) for key, value in _unwrap(state, str(path)).items()}


def _unwrap(state: Any, path: str) -> dict[str, Any]:
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
    bare = {}
    for key, value in state.items():
        name = re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})+", "", str(key))
        if not hasattr(value, "detach"):
            raise ValueError(
                f"{path} must hold only tensors; got {type(value).__name__} at {key}. "
                "Save model.state_dict()."
            )
        if name in bare:
            raise ValueError(f"{path} must name each parameter once; got {name} twice. Remove one.")
        bare[name] = value
    return bare


def _to_numpy(tensor: Any) -> np.ndarray:
    """A tensor as an array; half precision, which NumPy lacks in part, as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _shapes(model: Crate) -> dict[str, tuple[int, ...]]:
    """Our paths and shapes."""
    return {path: leaf.shape for path, leaf in _flatten(abstract_parameters(model)).items()}


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path."""
    return traverse_util.flatten_dict(dict(tree), sep="/")  # type: ignore


def _entries(model: Crate) -> dict[str, Entry]:
    """Every official entry of this model, by name."""
    entries = {}
    for path, shape in _shapes(model).items():
        pattern, layout = TABLE[path]
        stacked = "{i}" in pattern
        ours = shape[1:] if stacked else shape
        # An array of stride zero has a shape and no memory.
        official = layout.to_official(np.broadcast_to(np.float32(0), ours)).shape
        for layer in range(shape[0]) if stacked else (None,):
            entries[pattern.format(i=layer)] = Entry(path, layer, layout, ours, official)
    return entries


def _check_fit(
    name: str, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Every entry there, none besides, each of its shape; or an error that names the others."""
    wrong = [k for k in expected if k in got and got[k] != expected[k]]
    faults = {
        "missing": _join(k for k in expected if k not in got),
        "unknown": _join(k for k in got if k not in expected),
        "of another shape": ", ".join(f"{k} {got[k]} instead of {expected[k]}" for k in wrong),
    }
    if any(faults.values()):
        raise ValueError(
            f"{name} must hold the model's parameters and nothing else; got "
            + "; ".join(f"{fault}: {keys}" for fault, keys in faults.items() if keys)
            + ". Build the model with the sizes of these weights."
        )


def _join(keys: Iterable[str]) -> str:
    """Names in a row, those that differ by layer alone as one: layers.{3,4}.0.norm.bias."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        parts = re.fullmatch(r"(transformer\.layers\.)(\d+)(\..*)", key)
        pattern = f"{parts[1]}{{}}{parts[3]}" if parts else key
        layers.setdefault(pattern, []).append(parts[2] if parts else "")
    return ", ".join(
        pattern.replace("{}", found[0] if len(found) == 1 else "{" + ",".join(found) + "}")
        for pattern, found in layers.items()
    )
