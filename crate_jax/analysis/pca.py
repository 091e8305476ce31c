"""Principal components of patches that several images share: foreground, and three colours."""

from typing import NamedTuple

import numpy as np

DEFINITIONS = ("official_code", "paper")
LEVEL = 0.5  # λ of arXiv 2308.16271, appendix B.2
ROUNDING = float(np.finfo(np.float32).eps) ** 2  # of squares: the features come from float32


class Shown(NamedTuple):
    """The result of `foreground`, for J images.

    Attributes:
        scores_JxP: of the first component, from 0 to 1.
        masks_JxP: bool, the foreground.
        colours_JxPx3: from 0 to 1, and 0 outside the foreground.
        variance_4: of the first component and of the three that make the colours: the share of the
            variance that each has; in the paper's definition the last three of the foreground's.
    """

    scores_JxP: np.ndarray
    masks_JxP: np.ndarray
    colours_JxPx3: np.ndarray
    variance_4: np.ndarray


def principal_components(F_nxf: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The directions of largest variance, and where the features lie along them.

    Features are centred. A direction has two signs: here its largest entry is positive.

    Args:
        F_nxf: features, any float dtype; computed in float64.
        count: the number of the directions.

    Returns:
        Scores (n, count), and the share (count,) of the variance that each direction has; both are
        0 for directions that the features do not have, or only by the rounding of float32.

    Raises:
        ValueError: a feature has fewer values than there are directions, or is not finite.
    """
    if F_nxf.shape[1] < count:
        raise ValueError(
            f"features must have at least {count} values each; got {F_nxf.shape}. Take all heads."
        )
    if not np.isfinite(F_nxf).all():
        raise ValueError("features must be finite; got NaN or infinity. Look at the weights.")
    C_nxf = F_nxf.astype(np.float64) - F_nxf.mean(axis=0, dtype=np.float64)
    squares_f, V_fxf = np.linalg.eigh(C_nxf.T @ C_nxf)  # f is small, n may be large
    squares_count = np.maximum(squares_f[::-1][:count], 0)
    V_fxcount = V_fxf[:, ::-1][:, :count]
    largest_count = np.abs(V_fxcount).argmax(axis=0)
    V_fxcount = V_fxcount * np.sign(V_fxcount[largest_count, np.arange(count)])
    there_count = squares_count > ROUNDING * np.square(F_nxf, dtype=np.float64).sum()
    squares_count = np.where(there_count, squares_count, 0)
    total = np.square(C_nxf).sum() if there_count.any() else 1
    return C_nxf @ V_fxcount * there_count, squares_count / total


def foreground(
    F_JxPxf: np.ndarray, grid: tuple[int, int], *, definition: str = "official_code"
) -> Shown:
    """Foreground and colours of J images, by the components that their patches share.

    ``official_code``: four components of all patches; the first, brought to [0, 1], is above ½ in
    the foreground, whose holes are filled; the other three, brought to [0, 1], are red, green and
    blue. ``paper``: the first component alone of all patches, above ½ in the foreground; then three
    components of the patches of the foreground. Nothing is filled there.
    Source: arXiv 2308.16271, appendix B.2, and its code; F are its [U_1ᵀz; …; U_Kᵀz].

    Neither says which end of the first component is the foreground, nor how the paper's scores come
    to lie in [0, 1]. Here they are brought there as the code does, and the foreground is the end
    that holds fewer of the patches along the edges of the images; if both hold as many, the end
    above ½.

    Args:
        F_JxPxf: features of patches, without the class token; P the cells of the grid.
        grid: patches (down, across).
        definition: "official_code" or "paper".

    Returns:
        See `Shown`. Without any variance there is no foreground.

    Raises:
        ValueError: an unknown definition; or features that do not fit the grid, are too short, or
            are not finite.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}; got {definition}.")
    if F_JxPxf.ndim != 3 or F_JxPxf.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"features must be (J, {grid[0] * grid[1]}, f) for a grid of {grid[0]}x{grid[1]}; got "
            f"{F_JxPxf.shape}. Leave out the class token."
        )
    J, P, f = F_JxPxf.shape
    code = definition == "official_code"
    F_nxf = F_JxPxf.reshape(J * P, f)
    S_nxc, share_c = principal_components(F_nxf, 4 if code else 1)
    scores_JxP = _stretched(S_nxc[:, :1]).reshape(J, P)
    if _at_edges(scores_JxP > LEVEL, grid) > _at_edges(scores_JxP < LEVEL, grid):
        scores_JxP = 1 - scores_JxP
    masks_JxP = scores_JxP > LEVEL
    if share_c[0] == 0:
        masks_JxP = np.zeros_like(masks_JxP)
    colours_JxPx3 = np.zeros((J, P, 3))
    if code:
        masks_JxP = _filled(masks_JxP, grid)
        colours_JxPx3 = _stretched(S_nxc[:, 1:]).reshape(J, P, 3) * masks_JxP[..., None]
    elif masks_JxP.any():
        inside_nx3, inside_3 = principal_components(F_JxPxf[masks_JxP], 3)
        colours_JxPx3[masks_JxP] = _stretched(inside_nx3)
        share_c = np.concatenate([share_c, inside_3])
    variance_4 = np.zeros(4)
    variance_4[: len(share_c)] = share_c
    return Shown(scores_JxP, masks_JxP, colours_JxPx3, variance_4)


def _stretched(S_nxc: np.ndarray) -> np.ndarray:
    """Each column from 0 to 1; one of equal values is 0."""
    low_c, high_c = S_nxc.min(axis=0), S_nxc.max(axis=0)
    return (S_nxc - low_c) / np.where(high_c > low_c, high_c - low_c, 1)


def _at_edges(masks_JxP: np.ndarray, grid: tuple[int, int]) -> int:
    """Count the patches of masks along the edges of the images."""
    edges_RxC = np.ones(grid, bool)
    edges_RxC[1:-1, 1:-1] = False
    return int((masks_JxP & edges_RxC.reshape(1, -1)).sum())


def _filled(masks_JxP: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Masks without holes: what no path of background joins to an edge is inside."""
    from scipy.ndimage import binary_fill_holes

    filled = [binary_fill_holes(mask_P.reshape(grid)) for mask_P in masks_JxP]
    return np.stack(filled).reshape(masks_JxP.shape)  # type: ignore[arg-type]
