"""MaskCut: objects in an image as the normalised cuts of a graph of its patches.

Written from the equations of the papers: the normalised cut of Shi & Malik (2000), TokenCut (arXiv
2202.11539) and MaskCut (arXiv 2301.11320, section 3.2), on a CRATE's subspace tokens as in arXiv
2308.16271. Everything here is NumPy and SciPy on the host.
"""

from typing import NamedTuple

import numpy as np

WEAK = 1e-5  # the weight of two patches that are not alike; papers above
SIMILARITIES = ("cosine", "product")
SOLVERS = ("lanczos", "dense")
# Patches from which on Lanczos is the faster: benchmarks/maskcut.py.
FEW = 64
# Lanczos: steps at most, how often it looks, the residual that will do, and a new direction so
# short that it is rounding.
STEPS, EVERY, TOLERANCE, EXHAUSTED = 300, 5, 1e-5, 1e-6
# A cut as dear as this separates nothing. A graph whose weights are all the same has 1.
NO_CUT = 1 - 1e-3


class Cut(NamedTuple):
    """One object.

    Attributes:
        mask_P: bool, the patches of the object.
        cost: λ, the relaxed cost of the normalised cut, from 0 (two graphs without an edge between
            them) to 1 (nothing to separate).
        x_P: the eigenvector, 0 at patches that had left the graph.
    """

    mask_P: np.ndarray
    cost: float
    x_P: np.ndarray


def maskcut(
    F_Pxf: np.ndarray,
    grid: tuple[int, int],
    *,
    objects: int = 3,
    tau: float = 0.15,
    similarity: str = "cosine",
    connected: bool = True,
    solver: str = "lanczos",
) -> list[Cut]:
    """Up to so many objects, each of them one side of the cheapest normalised cut of what is left.

    With W of `affinity` and D its row sums, the cut is read off the second smallest solution of
    (D − W) x = λ D x, split at the mean of x. The object is the side of the entry with the largest
    |x|, but the other side where that one holds two or more of the grid's corners and the other one
    holds fewer. Of this side it is the connected piece that holds the largest |x|. Its patches
    leave the graph, and the next object is looked for.
    Source: arXiv 2301.11320, section 3.2; τ = 0.15 and three objects are its values, and those of
    arXiv 2308.16271. The connected piece is arXiv 2202.11539's: features that tell all objects
    apart from what is behind them put them on one side, from which they come one by one then.
    Differs from the paper: there the features of patches that were found become zero, which leaves
    them in the graph with an edge of 1e-5 to all. Here they leave it, so that they neither move the
    mean nor come out a second time.

    Fewer objects come out where nothing is left to separate: fewer than two patches, or a graph
    whose cheapest cut costs `NO_CUT` or more, such as that of one flat colour.

    Args:
        F_Pxf: a feature for each patch, row by row, without the class token. Of subspace tokens
            (N, K, p) the heads one after the other: cosine and product are then those of the whole
            token, and the product is Σ_k ⟨w_i, w_j⟩.
        grid: patches (down, across).
        objects: at most, at least 1.
        tau: τ of `affinity`.
        similarity: the similarity of `affinity`.
        connected: whether an object is a connected piece of its side (patches that share an edge),
            or all of it.
        solver: the solver of `second_eigenvector`.

    Returns:
        The objects in the order in which they were found; none, if the first cut separates nothing.

    Raises:
        ValueError: the arguments do not go together, or a feature is not finite.
    """
    if F_Pxf.ndim != 2 or len(F_Pxf) != grid[0] * grid[1]:
        raise ValueError(
            f"features must be ({grid[0] * grid[1]}, f) for a grid of {grid[0]}x{grid[1]}; got "
            f"{F_Pxf.shape}. Leave out the class token."
        )
    check_choices(objects, tau, similarity)
    W_PxP = affinity(F_Pxf, tau=tau, similarity=similarity)
    found: list[Cut] = []
    left_P = np.ones(len(F_Pxf), bool)
    while len(found) < objects and left_P.sum() > 1:
        places_n = np.flatnonzero(left_P)
        W_nxn = W_PxP if left_P.all() else W_PxP[np.ix_(places_n, places_n)]
        cost, x_n = second_eigenvector(W_nxn, solver=solver)
        if not cost < NO_CUT:
            break
        x_P, mask_P = np.zeros(len(left_P)), np.zeros(len(left_P), bool)
        x_P[places_n] = x_n
        mask_P[places_n] = _object_side(x_n, np.isin(places_n, _corners(grid)))
        if connected:
            mask_P = _piece(mask_P, int(np.where(mask_P, np.abs(x_P), -1).argmax()), grid)
        found.append(Cut(mask_P, cost, x_P))
        left_P &= ~mask_P
    return found


def check_choices(objects: int, tau: float, similarity: str) -> None:
    """Refuse what `maskcut` would refuse, before there are features.

    Args:
        objects: see `maskcut`.
        tau: see `maskcut`.
        similarity: see `maskcut`.

    Raises:
        ValueError: one cannot be.
    """
    if objects < 1:
        raise ValueError(f"objects must be at least 1; got {objects}.")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity}.")
    if not abs(tau) < np.inf:
        raise ValueError(f"tau must be a finite number; got {tau}.")
    if similarity == "cosine" and abs(tau) > 1:
        raise ValueError(
            f"tau must be from -1 to 1, as a cosine is; got {tau}. Take similarity=product for "
            "others."
        )


def affinity(F_Pxf: np.ndarray, *, tau: float = 0.15, similarity: str = "cosine") -> np.ndarray:
    """The graph of the patches: 1 between two that are alike by τ or more, else `WEAK`.

    Args:
        F_Pxf: a feature for each patch.
        tau: τ, the threshold; of a cosine from −1 to 1.
        similarity: "cosine", of which a zero feature has 0 with all; or "product", the inner
            product as it is, of which the scale counts.

    Returns:
        W (P, P), float32, symmetric. Every patch has an edge to itself.

    Raises:
        ValueError: an unknown similarity, a τ that none has, or a feature that is not finite.
    """
    check_choices(1, tau, similarity)
    F_Pxf = np.asarray(F_Pxf, np.float32)
    if not np.isfinite(F_Pxf).all():
        raise ValueError("features must be finite; got NaN or infinity. Look at the weights.")
    if similarity == "cosine":
        length_Px1 = np.linalg.norm(F_Pxf.astype(np.float64), axis=1, keepdims=True)
        F_Pxf = (F_Pxf / np.where(length_Px1 > 0, length_Px1, 1)).astype(np.float32)
    alike_PxP = F_Pxf @ F_Pxf.T >= tau
    return np.where(alike_PxP | alike_PxP.T, np.float32(1), np.float32(WEAK))


def second_eigenvector(
    W_PxP: np.ndarray, *, solver: str = "lanczos", seed: int = 0
) -> tuple[float, np.ndarray]:
    """The second smallest λ of (D − W) x = λ D x, with its x; D the row sums of W.

    With y = D^½ x the problem is that of the symmetric D^-½ W D^-½, of which 1 − λ is an
    eigenvalue. Its largest is 1, of y₀ ∝ D^½ 1. "lanczos" takes y₀ out and looks for the largest
    that is left by Lanczos's method, with products of the matrix and a vector alone, in float32,
    from a fixed start, so that the same graph gives the same x. Where it does not converge, and for
    graphs of fewer than `FEW` patches, "dense" does the work: LAPACK, in float64.

    λ may belong to several x, or to all but: k groups of patches without an edge between them but
    the weak ones have k − 1 such λ, some 1e-5 from 0 and from each other. Any mixture of these x is
    then a solution to the accuracy of float32, the two solvers give different ones, and both are
    right: each is nearly constant on a group, so that its split cuts between groups and through
    none. Which groups are on which side is chance.

    Args:
        W_PxP: weights >= 0, symmetric, float32 or float64, P > 1.
        solver: "lanczos" or "dense".
        seed: of Lanczos's start.

    Returns:
        λ, and x (P,), float64, of unit length in D; the entry with the largest |x| is positive.

    Raises:
        ValueError: an unknown solver, or a patch without any weight.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver}.")
    degree_P = W_PxP.sum(axis=1, dtype=np.float64)
    if not degree_P.min() > 0:
        raise ValueError("weights must connect every patch to something; one has none at all.")
    found = None
    if solver == "lanczos" and len(W_PxP) >= FEW:
        found = _lanczos(W_PxP, degree_P, seed)
    mu, y_P = found or _dense(W_PxP, degree_P)
    x_P = y_P / np.sqrt(degree_P)
    x_P = x_P * np.sign(x_P[np.abs(x_P).argmax()])
    return float(np.clip(1 - mu, 0, 2)), x_P


def enlarge(mask_P: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Enlarge values of patches to an image (H, W): each pixel has the value of its patch.

    Args:
        mask_P: a value for each patch, of any type.
        grid: patches (down, across).
        size: H and W in pixels, which need be no multiples of the grid.
    """
    rows_H, columns_W = (
        np.minimum((np.arange(n) + 0.5) * cells / n, cells - 1).astype(int)
        for n, cells in zip(size, grid, strict=True)
    )
    return mask_P.reshape(grid)[np.ix_(rows_H, columns_W)]


def _corners(grid: tuple[int, int]) -> list[int]:
    """The patches in the corners of a grid."""
    rows, columns = grid
    return sorted({0, columns - 1, (rows - 1) * columns, rows * columns - 1})


def _object_side(x_n: np.ndarray, corner_n: np.ndarray) -> np.ndarray:
    """The side of a cut (n,) that is the object."""
    above_n = x_n > x_n.mean()
    side_n = above_n if above_n[np.abs(x_n).argmax()] else ~above_n
    held, others = (side_n & corner_n).sum(), (~side_n & corner_n).sum()
    return ~side_n if held >= 2 > others else side_n


def _piece(mask_P: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """The connected piece of a mask that holds a patch."""
    from scipy.ndimage import label

    pieces_RxC: np.ndarray = label(mask_P.reshape(grid))[0]  # type: ignore[index]
    return pieces_RxC.ravel() == pieces_RxC.ravel()[patch]


def _lanczos(
    W_PxP: np.ndarray, degree_P: np.ndarray, seed: int = 0
) -> tuple[float, np.ndarray] | None:
    """1 − λ and y by Lanczos, in float32; None: it has not converged after `STEPS`.

    Every vector is made orthogonal to y₀ and to all before it, twice, so that rounding neither
    brings y₀ back nor finds a vector again. Nothing is restarted, and nothing is drawn but the
    start.
    """
    P, root_P = len(W_PxP), np.sqrt(degree_P)
    inverse_P, W_PxP = (1 / root_P).astype(np.float32), W_PxP.astype(np.float32, copy=False)
    basis = np.zeros((min(STEPS, P - 1) + 1, P), np.float32)  # y₀ and Lanczos's vectors, as rows
    basis[0] = root_P / np.linalg.norm(root_P)
    y_P = np.random.default_rng(seed).standard_normal(P).astype(np.float32)
    y_P -= basis[0] * (basis[0] @ y_P)
    diagonal: list[float] = []
    beside = [float(np.linalg.norm(y_P))]
    for step in range(1, len(basis)):
        basis[step] = y_P / beside[-1]
        y_P = inverse_P * (W_PxP @ (inverse_P * basis[step]))
        diagonal.append(float(basis[step] @ y_P))
        for _ in range(2):
            y_P -= (basis[: step + 1] @ y_P) @ basis[: step + 1]
        beside.append(float(np.linalg.norm(y_P)))
        ended = beside[-1] < EXHAUSTED or step == P - 1  # all that the start leads to is there
        if ended or step % EVERY == 0:
            tridiagonal = np.diag(diagonal) + np.diag(beside[1:-1], 1) + np.diag(beside[1:-1], -1)
            mu_s, Q_sxs = np.linalg.eigh(tridiagonal)
            if ended or beside[-1] * abs(Q_sxs[-1, -1]) < TOLERANCE:
                y_P = Q_sxs[:, -1].astype(np.float32) @ basis[1 : step + 1]
                return float(mu_s[-1]), y_P.astype(np.float64)
    return None


def _dense(W_PxP: np.ndarray, degree_P: np.ndarray) -> tuple[float, np.ndarray]:
    """1 − λ and y of the whole matrix, in float64."""
    from scipy.linalg import eigh

    inverse_P = 1 / np.sqrt(degree_P)
    M_PxP = W_PxP.astype(np.float64) * inverse_P[:, None] * inverse_P[None]
    P = len(M_PxP)
    mu_1, Y_Px1 = eigh(M_PxP, subset_by_index=[P - 2, P - 2])
    return float(mu_1[0]), Y_Px1[:, 0]
