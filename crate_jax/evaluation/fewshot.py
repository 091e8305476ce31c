"""Few-shot ridge regression on frozen features, in closed form, as big_vision does it."""

import math
from collections.abc import Sequence

import numpy as np

from crate_jax.evaluation.features import Features, num_classes, standardize

BIAS = 100.0  # a feature of all rows, so large that its weight is hardly regularised
SHOTS, L2 = (1, 5, 10, 25), (1024.0,)


def few(train: Features, shots: int, seed: int) -> Features:
    """Draw so many rows of each class by the seed.

    Raises:
        ValueError: a class has fewer.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1; got {shots}. Choose another number.")
    counts = np.bincount(train.labels)
    least = int(np.flatnonzero(counts)[np.argmin(counts[counts > 0])])
    if counts[least] < shots:
        raise ValueError(
            f"shots must be at most the rows of each class; got {shots}, of which class {least} "
            f"has {counts[least]}. Choose fewer, or a larger split."
        )
    order = np.random.default_rng(seed).permutation(len(train.labels))
    chosen = [order[train.labels[order] == c][:shots] for c in np.flatnonzero(counts)]
    rows = np.sort(np.concatenate(chosen))
    return Features(train.values[rows], train.labels[rows])


def ridge_scores(
    train: Features, tests_MxF: np.ndarray, *, l2: Sequence[float], classes: int
) -> dict[float, np.ndarray]:
    """Scores of each class by least squares with targets of ±1, for several strengths at once.

        W = (XᵀX + l2·I)⁻¹ Xᵀ Y = Xᵀ (X Xᵀ + l2·I)⁻¹ Y

    X are the features, standardised by the training rows' mean and deviation (of a population, plus
    1e-5), and a feature of 100. The smaller of the two squares is decomposed once for all `l2`.
    Source: big_vision's evaluators/fewshot_lsr.py.
    Differs from official: float64 on the host; the official float32 is 1e-3 off this.

    Args:
        train: of all classes, or of some.
        tests_MxF: features.
        l2: strengths, each above 0.
        classes: Y.

    Returns:
        (M, Y) float64 by strength.

    Raises:
        ValueError: a strength is not above 0.
    """
    if not l2 or not all(0 < strength < math.inf for strength in l2):
        raise ValueError(f"l2 must be above 0, and finite; got {list(l2)}. big_vision's is 1024.")
    X_NxF, tests_MxF = (
        np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS)
        for x in standardize(train.values, tests_MxF)
    )
    Y_NxY = 2.0 * np.eye(classes)[train.labels] - 1.0
    tall = X_NxF.shape[0] >= X_NxF.shape[1]
    values, vectors = np.linalg.eigh(X_NxF.T @ X_NxF if tall else X_NxF @ X_NxF.T)
    right = vectors.T @ (X_NxF.T @ Y_NxY if tall else Y_NxY)
    left = tests_MxF @ (vectors if tall else X_NxF.T @ vectors)
    return {strength: (left / (values + strength)) @ right for strength in l2}


def fewshot(
    train: Features,
    test: Features,
    *,
    seed: int,
    shots: Sequence[int] = SHOTS,
    l2: Sequence[float] = L2,
) -> dict[str, float]:
    """Top-1 over the test rows, after a few training rows of each class.

    Args:
        train: of which some are drawn.
        test: the rows that are classified.
        seed: the seed of the drawing.
        shots: rows of each class.
        l2: strengths of the ridge; all are told, none is chosen.

    Returns:
        ``shots_10/l2_1024/top1`` … in [0, 1].

    Raises:
        ValueError: a class has too few rows, or a number breaks a rule.
    """
    found, classes = {}, num_classes(train, test)
    for number in shots:
        scores = ridge_scores(few(train, number, seed), test.values, l2=l2, classes=classes)
        for strength, scores_MxY in scores.items():
            hits = scores_MxY.argmax(axis=1) == test.labels
            found[f"shots_{number}/l2_{strength:g}/top1"] = float(hits.mean())
    return found
