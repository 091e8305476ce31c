"""Measures of one layer, image by image, in double precision on the host.

A determinant of tokens that a layer compresses has eigenvalues from 1 to 10⁸ and more: the Cholesky
factor of its float32 Gram matrix is NaN, and a QR decomposition in float32 costs more than the
forward pass. So the factor is computed in float64. The Gram matrix itself may come in float32, if
its rounding is too small to be seen in the result. Where float64 is not exact enough either, the
singular values of the tokens give the rate. Tokens are rows. Rates are in nats.
"""

import numpy as np

Tokens = np.ndarray  # (B, N, d), any float dtype
ROUNDING = 8  # units in the last place, of an entry of a Gram matrix to its diagonal
TOLERANCE = 1e-5  # of a rate


def rates(X_xNxd: Tokens, *, eps: float) -> np.ndarray:
    """R of each set of tokens: ½ logdet(I + d/(N ε²) X Xᵀ), by the Cholesky factor; (...).

    Where rounding could move a rate by more than a hundred-thousandth of it, or the matrix has no
    factor, all are computed by singular values. Tokens that are not finite have the rate NaN.
    Source: arXiv 2306.01129, equation 7. Of subspace tokens (B, K, N, p) it is each subspace's part
    of R^c, equation 8.

    >>> round(float(rates(np.array([[3.0, 0.0], [0.0, 1.0]]), eps=1.0)), 4)
    1.4979
    """
    found = _rates_of_gram(gram(X_xNxd), X_xNxd.shape, eps, np.float64)
    return _rates_of_values(X_xNxd, eps) if found is None else found


def rates_by_gram(G_xnxn: np.ndarray, X_xNxd: Tokens, *, eps: float) -> np.ndarray:
    """`rates`, given the Gram matrix of the tokens in float32, as a device computes it.

    Its factor is computed in float64. The rounding of the matrix is estimated in the result: as
    random errors of its entries, which the inverse of the matrix magnifies. Where they could move
    one rate by more than a hundred-thousandth of it, or the matrix has no factor, the Gram matrix
    of all tokens is computed anew in float64.

    Args:
        G_xnxn: X Xᵀ or XᵀX, whichever is smaller (..., n, n).
        X_xNxd: the tokens; only looked at where the matrix is not exact enough.
        eps: quantisation precision ε.

    Returns:
        The rates (...), float64.
    """
    found = _rates_of_gram(G_xnxn.astype(np.float64), X_xNxd.shape, eps, np.float32)
    return rates(X_xNxd, eps=eps) if found is None else found


def _rates_of_gram(
    G_xnxn: np.ndarray, shape: tuple[int, ...], eps: float, dtype: type[np.floating]
) -> np.ndarray | None:
    """Rates of tokens of this shape; None: entries rounded to the dtype may move them too far.

    The matrix is scaled in place.
    """
    N, d = shape[-2:]
    G_xnxn *= d / (N * eps**2)
    diagonal = np.einsum("...ii->...i", G_xnxn)
    diagonal += 1
    if not np.isfinite(diagonal).all():  # of the wrong tokens, or too large for the dtype
        return None
    try:
        pivots_xn = np.einsum("...ii->...i", np.linalg.cholesky(G_xnxn))
    except np.linalg.LinAlgError:
        return None
    # An entry of the inverse's diagonal is at least 1 / pivot²: the error of ½ logdet is the sum of
    # the entries' relative errors times these, and errors of many signs add up by their squares.
    magnified_xn = diagonal / np.square(pivots_xn)
    error = ROUNDING * np.finfo(dtype).eps * np.sqrt(np.square(magnified_xn).sum(axis=-1))
    found = np.log(pivots_xn).sum(axis=-1)
    return found if np.all(error <= TOLERANCE * np.abs(found)) else None


def _rates_of_values(X_xNxd: Tokens, eps: float) -> np.ndarray:
    """`rates` by singular values, which no size of the tokens makes inexact."""
    N, d = X_xNxd.shape[-2:]
    finite_x, X_xNxd = _finite(X_xNxd)
    values_xn = np.linalg.svd(X_xNxd, compute_uv=False)
    found = np.log1p(d / (N * eps**2) * np.square(values_xn)).sum(axis=-1) / 2
    return np.where(finite_x, found, np.nan)


def _finite(X_xNxd: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The sets of tokens that are finite (...); and the tokens, float64, with zeros in the others.

    LAPACK refuses a whole batch for one number that is not finite.
    """
    finite_x = np.asarray(np.all(np.isfinite(X_xNxd), axis=(-2, -1)))
    return finite_x, np.where(finite_x[..., None, None], X_xNxd, 0).astype(np.float64)


def gram(X_xNxd: Tokens) -> np.ndarray:
    """X Xᵀ or XᵀX, whichever is smaller, in float64."""
    X_xNxd = X_xNxd.astype(np.float64)
    if X_xNxd.shape[-2] < X_xNxd.shape[-1]:
        X_xNxd = X_xNxd.swapaxes(-2, -1)
    return X_xNxd.swapaxes(-2, -1) @ X_xNxd


def unit_length(X_xNxd: Tokens) -> np.ndarray:
    """Each token scaled to length one, float64; a zero token stays zero."""
    X_xNxd = X_xNxd.astype(np.float64)
    length = np.linalg.norm(X_xNxd, axis=-1, keepdims=True)
    return np.divide(X_xNxd, length, out=np.zeros_like(X_xNxd), where=length > 0)


def effective_rank(X_xNxd: Tokens) -> np.ndarray:
    """exp(H) of the singular values, scaled to sum 1, with H their entropy; of zeros 0; (...).

    Between 1, where all tokens lie on a line, and min(N, d), where they fill all directions alike.
    That of tokens that are not finite is NaN.
    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007); used by arXiv 2502.11646's code.

    >>> round(float(effective_rank(np.eye(3))), 6)
    3.0
    """
    finite, X_xNxd = _finite(X_xNxd)
    squares = np.linalg.eigvalsh(gram(X_xNxd))
    values = np.sqrt(np.maximum(squares, 0))
    total = values.sum(axis=-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    return np.where(finite, np.where(total[..., 0] > 0, np.exp(entropy), 0), np.nan)


def mean_angle(X_xNxd: Tokens) -> np.ndarray:
    """Mean angle between two different tokens, in degrees; of one token NaN; (...).

    A zero token has no direction; it counts as at a right angle to all.

    >>> float(mean_angle(np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])))
    120.0
    """
    X_xNxd = unit_length(X_xNxd)
    N = X_xNxd.shape[-2]
    cosines_xNxN = np.clip(X_xNxd @ X_xNxd.swapaxes(-2, -1), -1, 1)
    angles_xNxN = np.degrees(np.arccos(cosines_xNxN))
    pairs = np.triu_indices(N, 1)
    if N < 2:
        return np.full(X_xNxd.shape[:-2], np.nan)
    return angles_xNxN[..., pairs[0], pairs[1]].mean(axis=-1)


def coherence(X_dxm: np.ndarray) -> tuple[float, float]:
    """|cosine| between two different columns: the mean and the largest; of one column 0, 0.

    Source: the mutual coherence of a dictionary, arXiv 2306.01129, section 2.4.
    """
    cosines = np.abs(unit_length(X_dxm.T) @ unit_length(X_dxm.T).T)
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    return (float(pairs.mean()), float(pairs.max())) if pairs.size else (0.0, 0.0)


def coherence_within(U_dxKxp: np.ndarray) -> tuple[float, float]:
    """|cosine| between columns of one basis: the mean over all bases, and the largest."""
    means, largest = zip(*(coherence(U_dxKxp[:, k]) for k in range(U_dxKxp.shape[1])), strict=True)
    return float(np.mean(means)), max(largest)


def coherence_between(U_dxKxp: np.ndarray) -> tuple[float, float]:
    """|cosine| between bases of two different subspaces: the mean and the largest; K = 1: 0, 0."""
    d, K, p = U_dxKxp.shape
    flat = unit_length(U_dxKxp.reshape(d, K * p).T)
    cosines = np.abs(flat @ flat.T)
    subspace = np.repeat(np.arange(K), p)
    other = cosines[subspace[:, None] != subspace[None, :]]
    return (float(other.mean()), float(other.max())) if other.size else (0.0, 0.0)
