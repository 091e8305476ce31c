"""Weights in and out of files, ours and other programs'."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crate_jax.config import from_dict
from crate_jax.files import written_aside
from crate_jax.interop import fit as fitting
from crate_jax.interop import npz, pth, safetensors
from crate_jax.models.crate import Crate
from crate_jax.models.zoo import architecture, build_model, from_architecture

TORCH_SUFFIXES = (".pth", ".pth.tar", ".pt", ".t7")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")


class Weights(NamedTuple):
    """What a file or run holds, by its own names.

    Attributes:
        arrays: by official name, or by path in our tree (``blocks/ista/D``).
        official: which of the two.
        fields: of the model, as far as the file states them; see `architecture`.
    """

    arrays: dict[str, np.ndarray]
    official: bool
    fields: dict[str, Any]

    def without(self, groups: Collection[str]) -> "Weights":
        """The same but for the arrays of some top-level groups of the tree."""
        if self.official:
            return self._replace(arrays=pth.drop(self.arrays, groups))
        kept = {k: v for k, v in self.arrays.items() if k.split("/")[0] not in groups}
        return self._replace(arrays=kept)


def load_weights(
    path: str | Path, model: Crate, *, fit: Collection[str] = (), key: jax.Array | None = None
) -> dict[str, Any]:
    """Read a model's parameters from a file or from a training run.

    Nothing in a file can run code. Every entry of it is used or named in an error, and so is every
    parameter that none fills.

    Args:
        path: a PyTorch file (``.pth``, ``.pth.tar``, ``.pt``, ``.t7``), ``.safetensors`` or
            ``.npz``, with the official names under any of the usual wrappers and prefixes, or with
            the paths of our tree; or the folder of a run (its newest checkpoint), or of one of its
            steps, ``RUN/checkpoints/STEP``.
        model: the model that the weights are for.
        fit: what may differ between the two and is made to fit: ``head`` (always a new one),
            ``image_size`` (positions resized bicubically), ``patch_size`` and ``in_channels`` (the
            projection of the patches resized, summed or repeated), and ``pool``, ``eta``, ``lmbda``
            where the file states others (the model's are used). Each change is logged at INFO; see
            `crate_jax.interop.fit.fit_params`.
        key: of a new head; None: ``jax.random.key(0)``.

    Returns:
        The parameter tree, float32 arrays on the host: ``model.apply({"params": params}, …)``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the kind of file is not known, the file is damaged or would run code, PyTorch is
            missing, the weights are not those of the model (each missing, unknown or ill-shaped
            entry is named, and whose weights they are), or one is not finite.
    """
    loaded = load_fitted(path, model, fit=fit, key=key)
    for line in loaded.report:
        logging.getLogger("crate_jax").info("%s: %s", path, line)
    return loaded.params


class Loaded(NamedTuple):
    """What `load_fitted` returns.

    Attributes:
        params: the parameter tree.
        model: the model they are for.
        report: what had to be fitted, one line for each change.
    """

    params: dict[str, Any]
    model: Crate
    report: list[str]


def load_fitted(
    path: str | Path,
    model: Crate | None,
    *,
    fit: Collection[str] = (),
    key: jax.Array | None = None,
) -> Loaded:
    """`load_weights` for a program that reports; without a model, the one that the file states.

    Raises:
        ValueError: also where there is no model, and the file states none.
    """
    path = Path(path)
    weights = _read(path)
    if model is None:
        if not weights.fields:
            raise ValueError(f"{path} must state its model; it does not. Name the model.")
        model = from_architecture(weights.fields)
    shapes = _shapes(weights.arrays)
    found = fitting.sizes(pth.tree_shapes(shapes) if weights.official else shapes)
    source = fitting.source_model(found, weights.fields, model, fit)
    skip = ("head",) if "head" in fit else ()
    weights = weights.without(skip)
    _check_fit(path, weights, found, source, skip)
    arrays = {name: _as_float32(array, name, path) for name, array in weights.arrays.items()}
    if weights.official:
        params = pth.from_state_dict(arrays, source, skip=skip)
    else:
        params = traverse_util.unflatten_dict(arrays, sep="/")
    _check_finite(params, path)
    if not fit:
        return Loaded(params, model, [])
    params, report = fitting.fit_params(params, source, model, key=key)
    return Loaded(params, model, report)


def save_weights(path: str | Path, params: Mapping[str, Any], model: Crate) -> None:
    """Write a model's parameters to a file, whole or not at all; float32, bit for bit.

    Args:
        path: ``.safetensors`` (paths of our tree; the model's configuration as metadata), ``.npz``
            (paths of our tree), or ``.pth`` or ``.pt`` (a bare state dict with the official names
            and shapes, which the official model's ``load_state_dict`` takes). What is there is
            replaced at the end.
        params: the parameter tree, arrays of any kind that this process holds whole.
        model: the model they belong to.

    Raises:
        ValueError: the kind of file is not known, PyTorch is missing, or the tree is not that of
            the model; every fault is named.
        FileNotFoundError: there is no such folder.
    """
    path = Path(path)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
    params = traverse_util.unflatten_dict(arrays, sep="/")
    wrong = fitting.faults(_shapes(arrays), fitting.shapes_of(model))
    if wrong:
        raise ValueError(
            f"params must be those of the model and nothing else; got "
            f"{fitting.in_words(wrong)}. "
            "Save them with the model that they were trained with."
        )
    suffix = path.suffix.lower()
    writers: dict[str, Callable[[Path], None]] = {
        ".npz": lambda aside: npz.write(aside, arrays),
        ".safetensors": lambda aside: safetensors.write(aside, arrays, architecture(model)),
        **dict.fromkeys(
            (".pth", ".pt"),
            lambda aside: pth.write_checkpoint(aside, pth.to_state_dict(params, model)),
        ),
    }
    if suffix not in writers:
        raise ValueError(
            f"weights must be written as {', '.join(writers)}; got {path}. Change its suffix."
        )
    with written_aside(path) as aside:
        writers[suffix](aside)


def _read(path: Path) -> Weights:
    """All that is in a file or in a run's checkpoint."""
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file or a run's folder; got {path}, not there.")
    name, fields = path.name.lower(), {}
    if path.is_dir():
        arrays, fields = _read_run(path)
    elif name.endswith(TORCH_SUFFIXES):
        arrays = pth.read_checkpoint(path)
    elif name.endswith(".safetensors"):
        arrays, fields = safetensors.read(path)
        fields = fields and architecture(from_architecture(fields))
    elif name.endswith(".npz"):
        arrays = npz.read(path)
    else:
        raise ValueError(
            f"weights must be a file of {', '.join(SUFFIXES)}, or the folder of a run; got {path}. "
            "Convert it to one of these."
        )
    official = not any("/" in name for name in arrays)
    if official:
        arrays = pth.bare_names(arrays, path)
    else:
        arrays = {name.removeprefix("params/"): array for name, array in arrays.items()}
    return Weights(arrays, official, fields)


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


def _read_run(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters in a run's newest checkpoint, or in the one named, and the model's fields."""
    # Here, not above: Orbax is needed by those alone who read a run.
    from crate_jax.checkpoint.reading import read_params

    workdir, step = find_run(path)
    params, record = read_params(workdir, step)
    fields = {}
    if "config" in record:
        model = build_model(from_dict(record["config"]).model)
        fields = architecture(model.clone(num_classes=params["head"]["bias"].shape[0]))
    flat: Any = traverse_util.flatten_dict(params, sep="/")
    return flat, fields


def _check_fit(
    path: Path,
    weights: Weights,
    found: Mapping[str, int],
    source: Crate,
    skip: Collection[str],
) -> None:
    """Every entry of the file has its place in the model, and every place is filled."""
    if weights.official:
        expected = pth.official_shapes(source, skip=skip)
    else:
        expected = fitting.shapes_of(source)
        expected = {k: v for k, v in expected.items() if k.split("/")[0] not in skip}
    faults = fitting.faults(_shapes(weights.arrays), expected)
    ours = architecture(source)
    other = [
        f"{name} {value} where the model has {ours[name]}"
        for name, value in weights.fields.items()
        if ours.get(name) != value and not (name == "num_classes" and "head" in skip)
    ]
    if not faults and other:
        raise ValueError(
            f"{path} must be weights of the model; they have {', '.join(other)}. "
            "Build the model with these, or ask to fit what is a constant: pool, eta, lmbda."
        )
    if faults:
        whose = fitting.describe_difference(found, source)
        if whose:  # the shapes follow from it
            faults.pop("of another shape", None)
        told = "; ".join(filter(None, (whose, fitting.in_words(faults))))
        raise ValueError(
            f"{path} must hold the parameters of the model and nothing else; {told}. "
            + fitting.remedy(found, source)
        )


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _as_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Any float as float32; NumPy's archives hand back bfloat16 as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype != jnp.bfloat16:
        array = array.view(jnp.bfloat16)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be of floats; got {array.dtype} in {path}. Save the weights alone."
        )
    return np.asarray(array, np.float32)


def _check_finite(params: Mapping[str, Any], path: Path) -> None:
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(leaf_path, simple=True, separator="/")
            count = int(np.sum(~np.isfinite(leaf)))
            raise ValueError(
                f"{name} must be finite; got {count} values of NaN or infinity in {path}. "
                "Take an earlier checkpoint."
            )
