"""The details of `evaluate` for a classifier: by class, by confidence, by ReaL."""

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from crate_jax.cli.arguments import path
from crate_jax.files import Json

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.tasks.task import Extra, Params
    from crate_jax.training.run import Run

CLASSIFY = "classify"  # the task that has classes to tell


def add_detail(parser: argparse.ArgumentParser) -> None:
    """The flags that ask for a second pass over the split."""
    parser.add_argument(
        "--detail", action="store_true", help="also accuracy by class, and calibration"
    )
    parser.add_argument("--confusion", type=path, help="a CSV file to write: label by prediction")
    parser.add_argument(
        "--real", type=path, help="ReaL labels, a JSON file in the order of the split"
    )


def asks_detail(args: argparse.Namespace) -> bool:
    """True if one of these flags is given."""
    return bool(args.detail or args.confusion or args.real)


def detail(args: argparse.Namespace, run: "Run", params: "Params", extra: "Extra") -> Json:
    """Compute the results that the flags ask for, exact over the evaluation split.

    Raises:
        ValueError, FileNotFoundError: the ReaL file does not fit the split, or the CSV file's
            folder does not exist.
    """
    if not asks_detail(args):
        return {}
    from crate_jax.evaluation.calibration import calibration
    from crate_jax.evaluation.confusion import (
        confusion_matrix,
        per_class_accuracy,
        write_confusion,
    )
    from crate_jax.evaluation.predictions import predictions, read_real, real_accuracy
    from crate_jax.evaluation.sums import watched
    from crate_jax.tasks.task import CLASSES
    from crate_jax.training.run import evaluation_batches

    task: Any = run.task
    rows, classes = run.rows["eval"], task.model.num_classes
    real = read_real(args.real, images=len(rows), classes=classes) if args.real else None
    with contextlib.closing(evaluation_batches(run)) as batches:
        told = predictions(task, params, extra, watched(batches, len(rows), "detail"), run.mesh)
    matrix = confusion_matrix(told.labels, told.classes, classes)
    names = task.facts(rows).get(CLASSES, ())
    found: Json = {}
    if args.detail:
        measured = calibration(told.confidence, told.classes == told.labels)
        found["ece"] = measured.ece
        found["calibration"] = {
            "examples": measured.count.tolist(),
            "accuracy": measured.accuracy.tolist(),
            "confidence": measured.confidence.tolist(),
        }
        found["by_class"] = {
            "classes": list(names) or list(range(classes)),
            "accuracy": per_class_accuracy(matrix),
            "examples": matrix.sum(axis=1).tolist(),
        }
    if args.confusion:
        write_confusion(args.confusion, matrix, names)
        found["confusion"] = args.confusion
    return found | (real_accuracy(told, real) if real else {})
