"""Confusion of classes: true against predicted."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crate_jax.files import written_aside


def confusion_matrix(labels: np.ndarray, told: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class (row) that are given each class (column), (Y, Y) int64."""
    pairs = labels.astype(np.int64) * classes + told
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class_accuracy(matrix_YxY: np.ndarray) -> list[float | None]:
    """The share of each class's images that is classified right; None without images."""
    hits, images = matrix_YxY.diagonal(), matrix_YxY.sum(axis=1)
    return [h / n if n else None for h, n in zip(hits.tolist(), images.tolist(), strict=True)]


def write_confusion(path: str | Path, matrix_YxY: np.ndarray, names: Sequence[str]) -> None:
    """Write a CSV file: a row a label, a column a prediction, with the names of both.

    Args:
        path: the path of the file; its folder exists.
        matrix_YxY: the matrix of `confusion_matrix`.
        names: the names of the classes; numbers where there are none.
    """
    named = list(names) or [str(number) for number in range(len(matrix_YxY))]
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *named])
        writer.writerows([name, *row] for name, row in zip(named, matrix_YxY.tolist(), strict=True))
