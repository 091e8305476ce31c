"""The content of a file or of a run's folder: arrays by its own names, from any program.

A file is recognised by its content; its suffix counts for nothing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crate_jax.buckets import check_reachable
from crate_jax.config import from_dict
from crate_jax.files import Json, located
from crate_jax.interop import msgpack, npz, orbax, pth, safetensors
from crate_jax.interop.addresses import fetched
from crate_jax.interop.folders import pieces, weights_file
from crate_jax.interop.kinds import kind_of, not_there
from crate_jax.interop.layouts.layout import Arrays, Tree
from crate_jax.interop.names import TRAINING_STATE, Known, bare_names, left_aside, no_choice
from crate_jax.interop.nearby import nearby
from crate_jax.interop.tree import flatten, tree_of
from crate_jax.models.zoo import architecture, build_model, from_architecture
from crate_jax.tasks.task import CLASSES

_STATE = "the state of a training run"


NO_TREE = Tree({}, None)


class Contents(NamedTuple):
    """The content of a file or run.

    Attributes:
        arrays: by official name, or by path in our tree (``blocks/ista/D``), without wrappers.
        fields: of the model, as far as the file states them; see `architecture`.
        left: one line for each kind of entries that are no weights and were left aside, and for
            each choice among several sets of weights.
        class_names: in the order of the model's outputs; () where the file does not name them.
    """

    arrays: Arrays
    fields: Json
    left: list[str]
    class_names: tuple[str, ...] = ()


def read_contents(path: Path, tree: Tree = NO_TREE, which: str = "") -> Contents:
    """All weights in a file, in a folder of such, or in a run's checkpoint.

    Args:
        path: the path of the file or folder.
        tree: of the model that the weights are for, if it is known.
        which: the key of one of several sets of weights in the file; "": see `unwrap`.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is no file of weights and no run, or it is damaged, or has no such key.
    """
    check_reachable(path, "weights")
    if not path.exists():
        raise FileNotFoundError(not_there(path))
    return _read(path, tree, which)._replace(class_names=read_class_names(path))


def _read(path: Path, tree: Tree, which: str) -> Contents:
    """All but the names of classes."""
    if path.is_dir():
        if is_run(path):
            return _read_run(path, which)
        if trees := orbax.find_trees(_checkpoints(path)):
            known = _known(tree, which)
            arrays, said = orbax.read(trees, path, known)
            return Contents(bare_names(arrays, path, known), {}, said)
    with nearby(path) as here:
        return _read_here(weights_file(here) if here.is_dir() else here, tree, which)


def _read_here(path: Path, tree: Tree, which: str) -> Contents:
    """Read the content of a file of this machine."""
    if (part := re.search(r"-\d+-of-(\d+)\.\w+$", path.name)) and int(part[1]) > 1:
        raise ValueError(
            f"{path} must hold all weights; it is one of {int(part[1])} pieces. Name their folder, "
            "or the file that ends in .index.json."
        )
    return _read_file(path, kind_of(path), tree, which)


def _read_file(path: Path, kind: str, tree: Tree, which: str) -> Contents:
    """Read the content of a file of a kind; of an index, the content of its pieces."""
    arrays: Arrays = {}
    if kind == "index":
        parts = [_read_file(each, kind_of(each), tree, which) for each in pieces(path)]
        for part in parts:
            if twice := arrays.keys() & part.arrays.keys():
                raise ValueError(
                    f"{path} must name each parameter once; got {min(twice)} twice, in two pieces. "
                    "Remove one."
                )
            arrays |= part.arrays
        lines = dict.fromkeys(line for part in parts for line in part.left)
        return Contents(arrays, parts[0].fields, list(lines))
    known, fields, said = _known(tree, which), {}, []
    if kind in ("torch", "msgpack"):
        arrays, said = (pth if kind == "torch" else msgpack).read(path, known)
    elif which:
        raise ValueError(no_choice(path, which))
    elif kind == "safetensors":
        arrays, fields = safetensors.read(path)
        if fields:
            model = from_architecture(fields)
            fields = architecture(model)
            known = _known(tree if tree.shapes else tree_of(model))
    else:
        arrays, left = npz.read(path, leave=f"{TRAINING_STATE}|{npz.NAMES}")
        left = [name for name in left if name != npz.NAMES]
        said = [f"{left_aside(left)}: {_STATE}"] if left else []
    left = [name for name in arrays if re.fullmatch(TRAINING_STATE, name) and not known(name)]
    said += [f"{left_aside(left)}: {_STATE}"] if left else []
    arrays = {name: array for name, array in arrays.items() if name not in left}
    return Contents(bare_names(arrays, path, known), fields, said)


def _known(tree: Tree, which: str = "") -> Known:
    return Known(tree.shapes, tree.collections, which)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """The names of the classes, in the order of the outputs, that a file or run states.

    Little is read but these. PyTorch's files name none.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is damaged, or its names are no text.
    """
    path, names = fetched(path), []
    check_reachable(path, "weights")
    if not path.exists():
        raise FileNotFoundError(not_there(path))
    if path.is_dir() and is_run(path):
        # Here, not above: Orbax is needed by those alone who read a run.
        from crate_jax.checkpoint.reading import read_facts

        names = read_facts(find_run(path)[0]).get(CLASSES, [])
    else:
        readers = {"safetensors": safetensors.read_names, "npz": npz.read_names}
        names = _first_in_files(path, readers) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} must name its classes as text; got {names}. Convert it again.")
    return tuple(names)


def read_fields(path: str | Path) -> object:
    """The fields of the model that a safetensors file states, alone or in a folder; {}: none.

    Little is read but these. A run states its model elsewhere.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is damaged, or a folder has no weights.
    """
    path = fetched(path)
    check_reachable(path, "weights")
    if not path.exists():
        raise FileNotFoundError(not_there(path))
    if path.is_dir() and is_run(path):
        return {}
    return _first_in_files(path, {"safetensors": safetensors.read_fields}) or {}


def _first_in_files(path: Path, readers: Mapping[str, Callable[[Path], object]]) -> object:
    """The first thing that readers find in a file, in that of a folder, or in an index's pieces.

    The readers stand by kind of file. None: they find nothing.
    """
    if path.is_dir() and orbax.find_trees(_checkpoints(path)):
        return None
    with nearby(path) as here:
        file = weights_file(here) if here.is_dir() else here
        files = pieces(file) if kind_of(file) == "index" else [file]
        found = (reader(each) for each in files if (reader := readers.get(kind_of(each))))
        return next(filter(None, found), None)


def find_run(path: str | Path) -> tuple[Path, str]:
    """The workdir and the step (or "latest") that a folder stands for: a run, or one of its steps.

    Raises:
        ValueError: it is neither.
    """
    from crate_jax.checkpoint.folder import FOLDER

    path = located(path, "weights")
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent, path.name
    workdir = path.parent if path.name == FOLDER else path
    if not (workdir / FOLDER).is_dir():
        raise ValueError(
            f"weights must be a file, or a run's folder or one of its steps; {path} is a folder "
            f"without {FOLDER}/ in it. Give the run's --workdir."
        )
    return workdir, "latest"


def is_run(path: Path) -> bool:
    """True if a folder is a run of ours, or one of its steps: ours have a record beside the state.

    A folder for checkpoints that holds nothing else that is known counts as one.
    """
    from crate_jax.checkpoint.folder import FOLDER

    inner = _checkpoints(path)
    if FOLDER not in (inner.name, inner.parent.name):
        return False
    steps = inner if inner.name == FOLDER else inner.parent
    return any(steps.glob("*/record")) or not orbax.find_trees(inner)


def _checkpoints(path: Path) -> Path:
    """The folder of checkpoints in a folder that has one; any other as it is."""
    from crate_jax.checkpoint.folder import FOLDER

    return path / FOLDER if (path / FOLDER).is_dir() else path


def _read_run(path: Path, which: str) -> Contents:
    """The variables in a run's newest checkpoint, or in the one named, and the model's fields.

    Of a run whose state holds a teacher beside its parameters, the student, the teacher is taken
    unless another is wanted.
    """
    # Here, not above: Orbax is needed by those alone who read a run.
    from crate_jax.checkpoint.reading import read_trained

    workdir, step = find_run(path)
    params, extra, record = read_trained(workdir, step)
    said = []
    if "teacher" in extra and which in ("", "teacher"):
        said = ["took teacher, averaged weights, and left aside student"]
        params, extra = extra["teacher"]["params"], extra["teacher"]
    elif "teacher" in extra and which == "student":
        said, extra = ["took student, and left aside teacher"], extra.get("statistics", {})
    elif which:
        raise ValueError(no_choice(path, which))
    arrays, fields = flatten(params), {}
    if "config" in record:
        model = build_model(from_dict(record["config"]).model)
        fields, collections = architecture(model), tree_of(model).collections
        arrays |= flatten(
            {"params": {}} | {name: extra[name] for name in collections if name in extra}
        )
        head = params.get("head", {})
        if "num_classes" in fields and "bias" in head:  # a config may leave it to the data set
            fields["num_classes"] = head["bias"].shape[0]
        elif "num_classes" in fields and head:  # of an objective, behind the model
            fields["num_classes"] = 0
    return Contents({name: np.asarray(leaf) for name, leaf in arrays.items()}, fields, said)
