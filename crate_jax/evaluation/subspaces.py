"""Classify features by the nearest subspace of training rows, or by planes between classes."""

import math
from typing import Any

import numpy as np

from crate_jax.evaluation.features import Features, standardize


def subspace_probe(
    train: Features, test: Features, *, components: int | None = None
) -> dict[str, float]:
    """Top-1 over the test rows of `nearest_subspace`, on features as they are.

    Args:
        train: spans the subspaces.
        test: the rows that are classified.
        components: of each class; None: the values of a feature shared out among the classes.

    Returns:
        ``top1`` in [0, 1], and the ``components``.

    Raises:
        ValueError: see `nearest_subspace`.
    """
    if components is None:
        F, classes = train.values.shape[1], len(np.unique(train.labels))
        components = min(max(1, F // classes), F - 1)
    told = nearest_subspace(train.values, train.labels, test.values, components=components)
    return {"top1": float(np.mean(told == test.labels)), "components": components}


def svm_probe(train: Features, test: Features, *, C: float = 1.0) -> dict[str, float]:
    """Top-1 over the test rows of `linear_svm`, on features standardised by the training rows.

    Args:
        train: of two classes or more.
        test: the rows that are classified.
        C: of `linear_svm`.

    Returns:
        ``top1`` in [0, 1].

    Raises:
        ValueError: C is not positive, or there is one class.
    """
    train_NxF, tests_MxF = standardize(train.values, test.values)
    told = linear_svm(train_NxF, train.labels, tests_MxF, C=C)
    return {"top1": float(np.mean(told == test.labels))}


def nearest_subspace(
    train_NxF: np.ndarray, labels_N: np.ndarray, tests_MxF: np.ndarray, *, components: int
) -> np.ndarray:
    """The class whose training rows span the subspace nearest to each test row.

        ŷ = argmin_c ‖(I − U_c U_cᵀ)(x − μ_c)‖

    μ_c is the mean of the rows of class c. U_c are its first principal components, or all that its
    rows span, if these are fewer. Source: arXiv 2006.08558, which evaluates MCR² so.

    Args:
        train_NxF: features.
        labels_N: of them, integers.
        tests_MxF: features.
        components: of each class; 0: the distance to the mean.

    Returns:
        (M,) of the dtype of the labels; of equal distances the lower class.

    Raises:
        ValueError: there are fewer components than none, or as many as a feature has values.
    """
    F = train_NxF.shape[1]
    if not 0 <= components < F:
        raise ValueError(
            f"components must be >= 0 and below the {F} values of a feature; got {components}. "
            "Choose fewer."
        )
    classes_C, residuals_CxM = np.unique(labels_N), []
    for c in classes_C:
        rows = train_NxF[labels_N == c].astype(np.float64)
        mean_F = rows.mean(axis=0)
        _, values, V_rxF = np.linalg.svd(rows - mean_F, full_matrices=False)
        spanned = int(np.sum(values > values[0] * 1e-6))
        U_rxF = V_rxF[: min(components, spanned)]
        apart_MxF = tests_MxF.astype(np.float64) - mean_F
        apart_MxF -= (apart_MxF @ U_rxF.T) @ U_rxF
        residuals_CxM.append(np.linalg.norm(apart_MxF, axis=1))
    return classes_C[np.argmin(residuals_CxM, axis=0)]


def linear_svm(
    train_NxF: np.ndarray, labels_N: np.ndarray, tests_MxF: np.ndarray, *, C: float = 1.0
) -> np.ndarray:
    """The class of each test row by linear support vector machines, of which two classes have one.

    It is scikit-learn's SVC. Its LinearSVC took a hundred times as long on the pixels of digits.

    Args:
        train_NxF: features.
        labels_N: of them, integers of two classes or more.
        tests_MxF: features.
        C: weight of the losses beside ½‖w‖², > 0.

    Returns:
        (M,) of the dtype of the labels.

    Raises:
        ValueError: C is not positive and finite, or there is one class.
    """
    from sklearn.svm import SVC  # slow to import

    if not 0 < C < math.inf:
        raise ValueError(f"C must be > 0 and finite; got {C}. scikit-learn's is 1.")
    if len(np.unique(labels_N)) < 2:
        raise ValueError("labels must be of two classes or more; got one. Choose another split.")
    machine: Any = SVC(C=C, kernel="linear")
    return machine.fit(train_NxF, labels_N).predict(tests_MxF)
