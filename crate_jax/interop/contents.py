"""What lies in a file or in a run's folder: arrays by its own names, whatever program wrote it.

A file is recognised by its content; its suffix counts for nothing.
"""

import contextlib
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crate_jax.config import from_dict
from crate_jax.files import Json
from crate_jax.interop import npz, pth, safetensors
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.tree import flatten
from crate_jax.models.zoo import architecture, build_model, from_architecture
from crate_jax.tasks.task import CLASSES

# What big_vision's training files hold beside ``params/…``: the optimizer's state and the clock.
TRAINING_STATE = r"(opt|chrono)/.*"


class Contents(NamedTuple):
    """What a file or run holds.

    Attributes:
        arrays: by official name, or by path in our tree (``blocks/ista/D``), without wrappers.
        fields: of the model, as far as the file states them; see `architecture`.
        left: one line for each kind of entries that are no weights and were left aside.
        class_names: in the order of the model's outputs; () where the file does not name them.
    """

    arrays: Arrays
    fields: Json
    left: list[str]
    class_names: tuple[str, ...] = ()


def read_contents(path: Path) -> Contents:
    """All weights in a file or in a run's checkpoint.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is no file of weights and no run, or it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file or a run's folder; got {path}, not there.")
    fields, left = {}, []
    if path.is_dir():
        arrays, fields = _read_run(path)
    elif (kind := kind_of(path)) == "torch":
        arrays = pth.read_checkpoint(path)
    elif kind == "safetensors":
        arrays, fields = safetensors.read(path)
        fields = fields and architecture(from_architecture(fields))
    else:
        arrays, left = npz.read(path, leave=TRAINING_STATE)
    names = read_class_names(path)
    if names and not path.is_dir():
        arrays.pop(npz.NAMES, None)
    lines = [f"{left_aside(left)}: the state of a training run"] if left else []
    return Contents(pth.bare_names(arrays, path), fields, lines, names)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """The names of the classes, in the order of the outputs, that a file or run states.

    Little is read but these. PyTorch's files name none.

    Raises:
        ValueError: the file is damaged, or its names are no text.
    """
    readers = {"safetensors": safetensors.read_names, "npz": npz.read_names}
    path, names = Path(path), []
    if path.is_dir():
        # Here, not above: Orbax is needed by those alone who read a run.
        from crate_jax.checkpoint.reading import read_facts

        with contextlib.suppress(ValueError):  # it is no run
            names = read_facts(find_run(path)[0]).get(CLASSES, [])
    elif path.exists() and (reader := readers.get(kind_of(path))):
        names = reader(path)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} must name its classes as text; got {names}. Convert it again.")
    return tuple(names)


def left_aside(names: Iterable[str]) -> str:
    """Entries in words, counted by the first part of their names."""
    groups = Counter(re.split(r"[/.]", name)[0] for name in names)
    told = ", ".join(f"{name} ({count})" for name, count in groups.items())
    return f"left aside {told}"


def kind_of(path: Path) -> str:
    """Which program wrote a file, by its content: "torch", "npz" or "safetensors".

    Raises:
        ValueError: it is of no kind that is known.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    # Behind the length of a JSON header, which may begin like any other kind of file.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if head.startswith(b"PK"):
        names = _zip_names(path, head)
        if not names or any(name.endswith(".npy") for name in names):
            return "npz"
        if any(name.endswith("data.pkl") for name in names):
            return "torch"
    if head[:1] == b"\x80":  # a pickle, as PyTorch wrote its files before they were zip archives
        return "torch"
    raise ValueError(
        f"{path} must be a whole PyTorch, safetensors or .npz file, or the folder of a run; its "
        "content is none of these. It may be truncated: copy it again."
    )


def _zip_names(path: Path, head: bytes) -> list[str]:
    """The names in a zip archive; of a truncated one the first."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        length = int.from_bytes(head[26:28], "little")
        return [head[30 : 30 + length].decode("utf-8", "replace")]


def find_run(path: str | Path) -> tuple[Path, str]:
    """The workdir and the step (or "latest") that a folder stands for: a run, or one of its steps.

    Raises:
        ValueError: it is neither.
    """
    from crate_jax.checkpoint.manager import FOLDER

    path = Path(path)
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent, path.name
    workdir = path.parent if path.name == FOLDER else path
    if not (workdir / FOLDER).is_dir():
        raise ValueError(
            f"weights must be a file, or a run's folder or one of its steps; {path} is a folder "
            f"without {FOLDER}/ in it. Give the run's --workdir."
        )
    return workdir, "latest"


def _read_run(path: Path) -> tuple[dict[str, np.ndarray], Json]:
    """The parameters in a run's newest checkpoint, or in the one named, and the model's fields."""
    # Here, not above: Orbax is needed by those alone who read a run.
    from crate_jax.checkpoint.reading import read_params

    workdir, step = find_run(path)
    params, record = read_params(workdir, step)
    fields = {}
    if "config" in record:
        fields = architecture(build_model(from_dict(record["config"]).model))
        head = params.get("head", {})
        if "num_classes" in fields and "bias" in head:  # a config may leave it to the data set
            fields["num_classes"] = head["bias"].shape[0]
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}, fields
