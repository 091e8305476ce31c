"""Coarse segmentation: masks from where the class token looks, and how well they fit classes."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

DEFINITIONS = ("paper", "official_code")
SHARE = 0.6  # P of arXiv 2308.16271, appendix B.3
VOID = 255  # in VOC's masks: the seams of objects, which count as nothing


def class_attention(W_BxNxKxp: Array, *, definition: str = "paper") -> Array:
    """Compute the attention of the class token to each patch, a map for each head.

    ``paper``: the softmax over the patches of ⟨w_i, w_cls⟩, without a scale. ``official_code``:
    that over all N tokens of p^-½ ⟨w_i, w_cls⟩, whose entry of the class token is then left out, so
    that the rest sums to less than one. Both put the patches of a head in the same order, so that
    masks by a share of the entries are the same. Masks by a share of the mass differ.
    Source: arXiv 2308.16271, section 2.3, and its code.

    Args:
        W_BxNxKxp: subspace tokens of one layer, the class token first.
        definition: "paper" or "official_code".

    Returns:
        Maps (B, K, P), P = N − 1, float32, entries >= 0.

    Raises:
        ValueError: an unknown definition.
    """
    _check_choice("definition", definition, DEFINITIONS)
    W_BxNxKxp = W_BxNxKxp.astype(jnp.float32)
    S_BxKxN = jnp.einsum("bnkp,bkp->bkn", W_BxNxKxp, W_BxNxKxp[:, 0], precision="highest")
    if definition == "paper":
        return jax.nn.softmax(S_BxKxN[..., 1:], axis=-1)
    scale = W_BxNxKxp.shape[-1] ** -0.5
    return jax.nn.softmax(scale * S_BxKxN, axis=-1)[..., 1:]


def share_of_entries(A: Array, share: float = SHARE) -> Array:
    """The patches with the highest entries: the fewest that are this share of all.

    Of equal entries the ones that come first. Source: arXiv 2308.16271, appendix B.3.

    Args:
        A: maps (…, P).
        share: above 0, and at most 1.

    Returns:
        Masks (…, P), bool.

    Raises:
        ValueError: the share is none.

    >>> share_of_entries(jnp.array([0.1, 0.7, 0.0, 0.15, 0.05])).tolist()
    [True, True, False, True, False]
    """
    check_share(share)
    P = A.shape[-1]
    kept = int(np.ceil(round(share * P, 6)))  # 0.7 · 10 is a little more than 7
    return jnp.argsort(jnp.argsort(-A, axis=-1, stable=True), axis=-1) < kept


def share_of_mass(A: Array, share: float = SHARE) -> Array:
    """The patches with the highest entries: the fewest that hold this share of a map's sum.

    Of equal entries the ones that come first.
    Source: the visualisation of arXiv 2104.14294, whence the protocol comes.

    Args:
        A: maps (…, P), entries >= 0.
        share: above 0, and at most 1.

    Returns:
        Masks (…, P), bool; empty for a map of zeros.

    Raises:
        ValueError: the share is none.

    >>> share_of_mass(jnp.array([0.1, 0.7, 0.0, 0.15, 0.05])).tolist()
    [False, True, False, False, False]
    """
    check_share(share)
    order = jnp.argsort(-A, axis=-1, stable=True)
    sorted_A = jnp.take_along_axis(A, order, axis=-1)
    before = jnp.cumsum(sorted_A, axis=-1) - sorted_A
    kept = (before < share * A.sum(axis=-1, keepdims=True)) & (sorted_A > 0)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


SHARES = {"entries": share_of_entries, "mass": share_of_mass}


def class_scores(
    masks_KxHxW: np.ndarray, labels_HxW: np.ndarray, *, void: int = VOID
) -> dict[int, float]:
    """For each class of an image how well the best head's mask fits it.

    With S the pixels of a class and A the mask of a head: the largest |S∧A| / (|S| + |A| − |S∧A|).
    Pixels that are ``void`` are in neither S nor A, so they count nowhere. 0 is the background, and
    no class. Source: arXiv 2308.16271, appendix B.3; what is done with void is ours, because the
    paper does not say.

    Args:
        masks_KxHxW: bool, at the size of the labels.
        labels_HxW: a class for each pixel.
        void: the label of pixels that do not count.

    Returns:
        {class: score in [0, 1]}; {} for an image without a class.

    Raises:
        ValueError: masks and labels differ in size.
    """
    if masks_KxHxW.shape[1:] != labels_HxW.shape:
        raise ValueError(
            f"masks must be of the labels' size, {labels_HxW.shape}; got {masks_KxHxW.shape[1:]}. "
            "Enlarge them."
        )
    masks_KxHxW = masks_KxHxW & (labels_HxW != void)[None]
    scores = {}
    for number in sorted({int(each) for each in np.unique(labels_HxW)} - {0, void}):
        S_1xHxW = (labels_HxW == number)[None]
        both_K = (S_1xHxW & masks_KxHxW).sum(axis=(1, 2))
        scores[number] = float(np.max(both_K / (S_1xHxW | masks_KxHxW).sum(axis=(1, 2))))
    return scores


def mean_iou(images: Iterable[Mapping[int, float]]) -> float:
    """mIoU: the mean over the classes of an image, then over the images.

    Images without a class are left out.

    Args:
        images: of each image the scores of `class_scores`.

    Raises:
        ValueError: no image has a class.

    >>> mean_iou([{1: 0.5, 3: 0.1}, {}, {2: 0.7}])
    0.5
    """
    means = [sum(scores.values()) / len(scores) for scores in images if scores]
    if not means:
        raise ValueError("images must hold a class to fit; got none. Give other annotations.")
    return sum(means) / len(means)


def check_share(share: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got {share}.")


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse an unknown word."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value}.")
