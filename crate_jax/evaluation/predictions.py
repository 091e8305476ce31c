"""A classifier's predictions for each image of a split, and the labels that ReaL found for them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from crate_jax.evaluation.rows import by_row
from crate_jax.parallel import PyTree
from crate_jax.tasks.classify import Classify


class Predictions(NamedTuple):
    """The predictions for the images of a split that can be read, in its order.

    Attributes:
        classes: told, (n,) int32; of equal logits the lower class.
        confidence: their probability, (n,) float32.
        labels: (n,) int32.
        places: of the images in the split, (n,) int64.
    """

    classes: np.ndarray
    confidence: np.ndarray
    labels: np.ndarray
    places: np.ndarray


def predictions(
    task: Classify, params: PyTree, extra: PyTree, batches: Iterable[dict[str, Array]], mesh: Mesh
) -> Predictions:
    """Predict a whole split; the logits stay on their device.

    Args:
        task: the task of the model.
        params: the parameters of the task.
        extra: the extra of the task.
        batches: the batches of `crate_jax.data.loader.eval_batches`, on the mesh.
        mesh: the mesh of the batches.

    Raises:
        ValueError: there is no image.
    """

    def told(params: PyTree, extra: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
        logits_BxY = task.logits(params, extra, batch)
        return {
            "classes": logits_BxY.argmax(axis=1).astype(jnp.int32),
            "confidence": jax.nn.softmax(logits_BxY, axis=1).max(axis=1),
            "labels": batch["label"],
        }

    found = by_row(told, params, extra, batches, mesh)
    return Predictions(**found.arrays, places=found.places)


def read_real(path: str | Path, *, images: int, classes: int) -> list[list[int]]:
    """The labels of each image of a split, as ReaL states them: a JSON list of lists.

    Source: Beyer et al., arXiv 2006.07159, real.json of ImageNet's 50,000 validation images.

    Args:
        path: the path of the file.
        images: the number of images of the split.
        classes: the number of classes of the model.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no such list, or it does not fit the split.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--real must name a JSON file; there is no {path}.")
    try:
        real = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--real must name a JSON file; {path} is none: {error}.") from error
    lists = isinstance(real, list) and all(isinstance(labels, list) for labels in real)
    if not lists or not all(type(label) is int for labels in real for label in labels):
        raise ValueError(
            f"--real must hold a list of lists of class numbers; {path} holds something else."
        )
    if len(real) != images:
        raise ValueError(
            f"--real must hold the labels of each of the {images} images of the split, in their "
            f"order; {path} holds {len(real)}. Choose the split that it was made for."
        )
    largest = max((label for labels in real for label in labels), default=0)
    smallest = min((label for labels in real for label in labels), default=0)
    if smallest < 0 or largest >= classes:
        raise ValueError(
            f"--real must hold classes in 0 … {classes - 1}, those of the model; {path} holds "
            f"{smallest if smallest < 0 else largest}. Choose another file or model."
        )
    return real


def real_accuracy(found: Predictions, real: list[list[int]]) -> dict[str, float]:
    """``real``, the share of images whose prediction is one of their labels, and ``real_examples``.

    An image without labels does not count.

    Args:
        found: the predictions of the split.
        real: the labels of `read_real`.

    Raises:
        ValueError: no image has a label.
    """
    told = zip(found.classes.tolist(), found.places.tolist(), strict=True)
    hits = [told_class in real[place] for told_class, place in told if real[place]]
    if not hits:
        raise ValueError("--real must hold a label of some image; it holds none. See --help.")
    return {"real": sum(hits) / len(hits), "real_examples": len(hits)}
