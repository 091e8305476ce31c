"""Frozen features of a split, and the file that stores them for the next time."""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from crate_jax.checkpoint.digest import digest
from crate_jax.evaluation.rows import OfRows, by_row
from crate_jax.files import Json, written_aside
from crate_jax.parallel import PyTree
from crate_jax.tasks.task import Task

TINY = 1e-5  # added to a deviation, as big_vision does: a feature may be the same everywhere


class Features(NamedTuple):
    """The features of the rows of a split.

    Attributes:
        values: (n, F) float32.
        labels: (n,) int32.
    """

    values: np.ndarray
    labels: np.ndarray


def features_of(
    function: OfRows, params: PyTree, extra: PyTree, batches: Iterable[dict[str, Array]], mesh: Mesh
) -> Features:
    """Features and labels of a whole split.

    Args:
        function: `of_task`, `of_pixels` or the like: it gives ``values`` and ``label``.
        params: the parameters of the task.
        extra: the extra of the task.
        batches: the batches of `crate_jax.data.loader.eval_batches`, on the mesh.
        mesh: the mesh of the batches.

    Raises:
        ValueError: there is no row, or a feature is not finite.
    """
    found = by_row(function, params, extra, batches, mesh).arrays
    bad = np.flatnonzero(~np.isfinite(found["values"]).all(axis=1))
    if len(bad):
        raise ValueError(
            f"features must be finite; those of {len(bad)} of {len(found['values'])} images are "
            f"not, the first is number {bad[0]}. Choose other weights."
        )
    return Features(found["values"].astype(np.float32), found["label"].astype(np.int32))


def of_task(task: Task) -> OfRows:
    """The features of a task's model: `Task.features`."""

    def function(params: PyTree, extra: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
        return {"values": task.features(params, extra, batch), "label": batch["label"]}

    return function


def of_pixels(params: PyTree, extra: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
    """The stored pixels in [0, 1], row by row: the features of no model."""
    del params, extra
    images = batch["image"]
    values = images.reshape(len(images), -1).astype(jnp.float32)
    stored = jnp.issubdtype(images.dtype, jnp.integer)
    return {"values": values / 255 if stored else values, "label": batch["label"]}


def standardize(train_NxF: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each feature minus the mean over the training rows, over its deviation there plus 1e-5.

    The deviation is that of a population. All are computed in float64, and stay so.
    """
    train_NxF = train_NxF.astype(np.float64)
    mean, std = train_NxF.mean(axis=0), train_NxF.std(axis=0) + TINY
    return tuple((x - mean) / std for x in (train_NxF, *others))


def num_classes(*splits: Features) -> int:
    """One more than the largest label of all."""
    return 1 + max(int(split.labels.max()) for split in splits)


def renumbered(train: Features, test: Features) -> tuple[Features, Features]:
    """The same features, whose labels are numbered 0 … without a gap, in their order."""
    known = np.unique(np.concatenate([train.labels, test.labels]))
    numbers = (np.searchsorted(known, x.labels).astype(np.int32) for x in (train, test))
    return Features(train.values, next(numbers)), Features(test.values, next(numbers))


def weights_fingerprint(task: Task, params: PyTree, extra: PyTree) -> str:
    """A fingerprint of the task, the model, its weights and the preparation of pixels."""
    plain = (bool, int, float, str, tuple, type(None))
    fields = [
        {
            field.name: getattr(owner, field.name)
            for field in dataclasses.fields(owner)
            if isinstance(getattr(owner, field.name), plain)
        }
        for owner in (task, task.model)
        if dataclasses.is_dataclass(owner)
    ]
    names = [type(task).__name__, type(task.model).__name__]
    return fingerprint({"names": names, "fields": fields, "weights": digest((params, extra))})


def fingerprint(facts: Json) -> str:
    """The SHA-256 of facts, in hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def save_features(
    path: str | Path, splits: Mapping[str, Features], *, weights: str, data: str
) -> None:
    """Write features to an npz file, whole or not at all.

    Args:
        path: the path of the file; its folder exists.
        splits: by name.
        weights: `weights_fingerprint` of what gave them.
        data: `fingerprint` of which examples they are of.
    """
    arrays = {
        f"{name}/{k}": v for name, split in splits.items() for k, v in split._asdict().items()
    }
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, weights=np.array(weights), data=np.array(data), **arrays)


def load_features(path: str | Path, *, weights: str, data: str) -> dict[str, Features]:
    """The splits that `save_features` wrote.

    Raises:
        ValueError: it is no such file, or it holds features of another model, or of other data.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        stated = str(arrays.pop("weights")), str(arrays.pop("data"))
        names = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        splits = {
            name: Features(*(arrays[f"{name}/{field}"] for field in Features._fields))
            for name in names
        }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--features must be a file that this command wrote; {path} is none, or is damaged. "
            "Remove it, or name another file."
        ) from error
    for what, found, expected in zip(("a model", "data"), stated, (weights, data), strict=True):
        if found != expected:
            other = {"a model": "another model", "data": "other data"}[what]
            raise ValueError(
                f"--features must hold features of this model and data; {path} holds features of "
                f"{other}. Name another file."
            )
    return splits
