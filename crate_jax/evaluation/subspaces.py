"""Classes of features by the subspace, or on the side of the planes, that training rows span."""

from typing import Any

import numpy as np


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
    """The class of each test row by a linear support vector machine, one class against the rest.

    It is scikit-learn's LinearSVC, with squared hinge losses.

    Args:
        train_NxF: features.
        labels_N: of them, integers of two classes or more.
        tests_MxF: features.
        C: weight of the losses beside ½‖w‖², > 0.

    Returns:
        (M,) of the dtype of the labels.

    Raises:
        ValueError: C is not positive.
    """
    from sklearn.svm import LinearSVC  # slow to import

    if not C > 0:
        raise ValueError(f"C must be > 0; got {C}. scikit-learn's is 1.")
    machine: Any = LinearSVC(C=C, dual="auto", random_state=0, max_iter=10_000)
    return machine.fit(train_NxF, labels_N).predict(tests_MxF)
