"""The details of `evaluate` for a classifier: by class, by confidence, by ReaL."""

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from crate_jax.cli.arguments import path
from crate_jax.cli.parser import indented
from crate_jax.columns import in_columns
from crate_jax.files import Json

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.tasks.task import Extra, Params
    from crate_jax.training.run import Run

CLASSIFY = "classify"  # the task that has classes to tell
SHOWN_CLASSES = 20  # in the terminal; a data set may have thousands


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


def table(found: Json) -> str:
    """The result of `evaluate --detail` as text: the metrics, the classes, and the confidence.

    Of many classes those are given whose images are told worst.
    """
    metrics = ("top1", "top5", "loss", "ece")
    told = [f"{name} {found[name]:.4f}" for name in metrics if name in found]
    told += [f"{found['examples']:g} images"]
    parts = [[indented(f"{found['dataset']}, {found['split']}: {', '.join(told)}", first="")]]
    of = found["by_class"]
    heading = "class"
    rows = [*zip(of["classes"], of["accuracy"], of["examples"], strict=True)]
    if len(rows) > SHOWN_CLASSES:
        heading = f"class, the {SHOWN_CLASSES} worst of {len(rows)}"
        with_images = [row for row in rows if row[1] is not None]
        rows = sorted(with_images, key=lambda row: row[1])[:SHOWN_CLASSES]
    cells = [(str(name), _share(accuracy), str(count)) for name, accuracy, count in rows]
    parts.append(in_columns([(heading, "accuracy", "images"), *cells]))
    bins = found["calibration"]
    rows = zip(bins["confidence"], bins["accuracy"], bins["examples"], strict=True)
    cells = [(*map(_share, both), str(count)) for *both, count in rows if count]
    parts.append(in_columns([("confidence", "accuracy", "images"), *cells]))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
