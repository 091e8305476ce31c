"""PyTorch files: opening, unwrapping and writing them. Needs PyTorch; nothing else here does."""

import contextlib
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np

from crate_jax.interop.kinds import not_whole, unreadable
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.names import Known, is_array, unwrap
from crate_jax.interop.pickled import Array, Aside, stand_ins

if TYPE_CHECKING:
    from torch import Tensor

_LOCK = threading.RLock()

# How a file is written, by the end of its name: the key that holds the state dict, and what stands
# before every name in it. The official scripts read the last: ``torch.load(f)["state_dict"]`` into
# a model under DataParallel.
FORMS = {
    **dict.fromkeys((".pth", ".pt", ".bin"), ("", "")),
    ".ckpt": ("state_dict", ""),
    ".pth.tar": ("state_dict", "module."),
}


def read(path: str | Path, known: Known) -> tuple[Arrays, list[str]]:
    """The state dict in a PyTorch file, whatever wraps it; see `unwrap`.

    Weights are data: only tensors, plain values and the harmless classes of
    `crate_jax.interop.pickled` are unpickled, and a file that asks for anything else is refused.

    Args:
        path: a file written by `torch.save`.
        known: the names that are known.

    Returns:
        Arrays by the names in the file, floating ones float32; and one line for each choice that
        was made.

    Raises:
        ValueError: PyTorch is missing, or the file holds no state dict that can be read.
        FileNotFoundError: there is no such file.
    """
    content = _open(path)
    if isinstance(content, Aside):
        raise ValueError(_unsafe(path, f"{type(content).__module__}.{type(content).__name__}"))
    found = unwrap(content, path, known)
    arrays = {k: _to_numpy(v, k, path) for k, v in found.state.items() if is_array(v)}
    others = [key for key in found.state if key not in arrays]
    if others and not arrays:
        raise ValueError(
            f"{path} must hold only tensors; got {type(found.state[others[0]]).__name__} at "
            f"{others[0]}. Save model.state_dict()."
        )
    return arrays, found.said


def _open(path: str | Path) -> object:
    """Open the content that `torch.save` wrote."""
    torch = require_torch(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file; got none there. Check the path.")
    try:
        with _allowed(torch), open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another protocol of pickles, which is tried
            # Mapped, not read, where the format allows: every array is copied once, into its place.
            # PyTorch goes by the suffix of a name, so that this one must not be seen.
            mapped = zipfile.is_zipfile(path) and Path(path).suffix != ".safetensors"
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    # A KeyError, EOFError, struct.error, RuntimeError or UnpicklingError, by where the damage is.
    except Exception as error:
        raise unreadable(path, error) or ValueError(_refusal(path, error)) from None


@contextlib.contextmanager
def _allowed(torch: ModuleType) -> Iterator[None]:
    """PyTorch takes the stand-ins alone, and nothing that this process allows: it could be run.

    The list is that of the whole process: what another thread allows or loads meanwhile is not
    served.
    """
    with _LOCK:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(stand_ins())
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _refusal(path: str | Path, error: Exception) -> str:
    """The reason why a file was not read: it would run code, is damaged, or no PyTorch file."""
    text = str(error)
    if "DTensor" in text:
        return _sharded(path, "an entry")
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return _unsafe(path, wanted[1])
    if "TorchScript" in text:
        return (
            f"{path} must hold tensors alone; it is a TorchScript archive, which is a program. "
            "Save the state_dict() of what torch.jit.load gives."
        )
    if re.search(r"Can only|unrecognized function", text):
        return _unsafe(path, "an object of its own")
    remedy = ""
    if "Unsupported operand" in text or "Invalid magic number" in text:
        remedy = (
            "It is a pickle of another kind, which could run code, or truncated: save the state "
            "dict with torch.save, or arrays with numpy.savez."
        )
    return not_whole(path, "a whole PyTorch file", f"a {type(error).__name__}", remedy)


def _unsafe(path: str | Path, wanted: str) -> str:
    """A file asks for something that is not data."""
    module = any(name.startswith("torch.nn.modules.") for name in _globals(path))
    return (
        f"{path} must hold tensors alone; it asks to run or build {wanted}, which is refused. "
        + (
            "It holds a whole model: where it was made, save model.state_dict() instead."
            if module
            else "Ask its author for the state dict alone."
        )
    )


def _globals(path: str | Path) -> set[str]:
    """The module.name entries of the pickle in an archive; none for an older or a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            opcodes = pickletools.genops(archive.read(name))
            return {str(arg).replace(" ", ".") for op, arg, _ in opcodes if op.name == "GLOBAL"}
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError):
        return set()


def _sharded(path: object, name: str) -> str:
    return (
        f"{path} must hold whole tensors; {name} is a DTensor, a part on each device. Save full "
        "ones: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))."
    )


def write_checkpoint(
    path: str | Path, state: Mapping[str, np.ndarray], form: str = ".pth", under: str = ""
) -> None:
    """Write a state dict.

    Args:
        path: the path of the file.
        state: arrays by official name.
        form: one of `FORMS`; the state dict of ".pth" is what the official model's
            ``load_state_dict(strict=True)`` takes.
        under: the key that holds the state dict, in the place of the form's; "": the form's.

    Raises:
        ValueError: PyTorch is missing.
    """
    torch = require_torch(path)
    wrapper, prefix = FORMS[form]
    wrapper = under or wrapper
    tensors = {prefix + name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({wrapper: tensors} if wrapper else tensors, path)


def write_networks(path: str | Path, states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write several state dicts, each under its key.

    Raises:
        ValueError: PyTorch is missing.
    """
    torch = require_torch(path)
    found = {k: {n: torch.from_numpy(a) for n, a in state.items()} for k, state in states.items()}
    torch.save(found, path)


def require_torch(path: object) -> ModuleType:
    """PyTorch, for a file.

    Raises:
        ValueError: it is missing.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} must have PyTorch to be read or written; it is missing. Install it: "
            "pip install 'crate-jax[torch]'"
        ) from None
    return torch


def _to_numpy(value: object, name: str, path: object) -> np.ndarray:
    """A tensor as an array; half precision, which NumPy lacks in part, as float32."""
    if isinstance(value, Array):
        return value.value
    tensor = cast("Tensor", value).detach()
    if hasattr(tensor, "to_local"):
        raise ValueError(_sharded(path, name))
    wrong = {
        "quantised, with a scale beside its numbers": tensor.is_quantized,
        "on the meta device, without numbers": tensor.is_meta,
        f"of the layout {tensor.layout}": str(tensor.layout) != "torch.strided",
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(
                f"{name} must be a plain tensor; the one in {path} is {what}. "
                "Save the state dict of the model in float32."
            )
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
