"""The official PyTorch weights: names and layouts, both ways.

One table says which official entry holds which of our parameters, and in which layout: PyTorch
keeps a linear map as (out, in), here it is (in, out) with the axes K and p of the subspaces apart,
and the layers, separate there, are stacked on axis 0. PyTorch itself is needed only to open a file.
"""

import argparse
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from crate_jax.interop.fit import faults, in_words, shapes_of
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

    def tree_shape(self, official: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of an official array."""
        return official


class Leading(Same):
    """Axes of length one in front on the official side."""

    def __init__(self, axes: int):
        self.axes = axes

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """The axes put in front."""
        return ours[(None,) * self.axes]

    def tree_shape(self, official: tuple[int, ...]) -> tuple[int, ...]:
        """Without those axes."""
        return official[self.axes :]


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

    def tree_shape(self, official: tuple[int, ...]) -> tuple[int, ...]:
        """Swapped; the axes that were flattened stay one."""
        return official[::-1]


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


def official_shapes(model: Crate, *, skip: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """The official state dict of a model: {name: shape}, without what is skipped."""
    entries = _entries(model, skip)
    return {name: entry.official for name, entry in entries.items()}


def tree_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Our {path: shape} of official ones, for no model in particular: K and p are one axis."""
    found = {}
    for path, (pattern, layout) in TABLE.items():
        names = re.compile(re.escape(pattern).replace(re.escape("{i}"), r"\d+"))
        matching = [shape for name, shape in shapes.items() if names.fullmatch(name)]
        if matching:
            layers = (len(matching),) if "{i}" in pattern else ()
            found[path] = (*layers, *layout.tree_shape(matching[0]))
    return found


def drop(state: Mapping[str, Any], skip: Collection[str]) -> dict[str, Any]:
    """A state dict without the entries of skipped groups; of ``head``, whatever layers it has."""
    patterns = [TABLE[path][0] for path in TABLE if path.split("/")[0] in skip]
    names = {re.escape(p).replace(re.escape("{i}"), r"\d+") for p in patterns}
    if "head" in skip:
        names.add(r"mlp_head\.[1-9]\d*\..*")  # behind mlp_head.0, the norm
    return {k: v for k, v in state.items() if not any(re.fullmatch(n, k) for n in names)}


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
    state = drop(state, skip)
    entries = _entries(model, skip)
    shapes = {name: tuple(np.shape(v)) for name, v in state.items()}
    _check_fit("state", shapes, {name: entry.official for name, entry in entries.items()})
    used = {entry.path for entry in entries.values()}
    params = {p: np.empty(s, np.float32) for p, s in shapes_of(model).items() if p in used}
    for name, entry in entries.items():
        value = entry.layout.to_ours(np.asarray(state[name]), entry.ours)
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
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
    _check_fit("params", {path: array.shape for path, array in arrays.items()}, shapes_of(model))
    state = {}
    for key, entry in _entries(model).items():
        whole = arrays[entry.path]
        value = whole if entry.layer is None else whole[entry.layer]
        state[key] = np.array(entry.layout.to_official(value), order="C")
    return state


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
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read, where the format allows: every array is copied once, into its place.
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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


def _torch(path: str | Path) -> Any:
    """PyTorch, or what to do without it."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} needs PyTorch. pip install 'crate-jax[torch]'") from None
    return torch


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
    for key, value in state.items():
        if not hasattr(value, "detach"):
            raise ValueError(
                f"{path} must hold only tensors; got {type(value).__name__} at {key}. "
                "Save model.state_dict()."
            )
    return bare_names(state, path)


def bare_names(state: Mapping[Any, Any], path: str | Path) -> dict[str, Any]:
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


def _to_numpy(tensor: Any) -> np.ndarray:
    """A tensor as an array; half precision, which NumPy lacks in part, as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _entries(model: Crate, skip: Collection[str] = ()) -> dict[str, Entry]:
    """Every official entry of this model that is not skipped, by name."""
    entries = {}
    for path, shape in shapes_of(model).items():
        if path.split("/")[0] in skip:
            continue
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
    wrong = faults(got, expected)
    if wrong:
        raise ValueError(
            f"{name} must hold the model's parameters and nothing else; got {in_words(wrong)}. "
            "Build the model with the sizes of these weights."
        )
