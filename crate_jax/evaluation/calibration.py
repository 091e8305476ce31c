"""Calibration: compare a classifier's confidence with its accuracy."""

from typing import NamedTuple

import numpy as np

BINS = 15


class Calibration(NamedTuple):
    """The calibration of a classifier on a split.

    Attributes:
        ece: the expected calibration error, in [0, 1].
        count: images by bin, (bins,) int64.
        accuracy: of each bin, float64; 0 of an empty one.
        confidence: its mean in each bin, likewise.
    """

    ece: float
    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray


def calibration(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> Calibration:
    """The expected calibration error, and its parts.

        ECE = Σ_b n_b / n · |accuracy_b − confidence_b|

    Bin b of B holds the images whose confidence is in (b/B, (b + 1)/B]; the first holds 0 too. The
    probabilities are those of the softmax as it is, at temperature 1.
    Source: Guo et al., arXiv 1706.04599, section 2.

    Args:
        confidence: probability of the class that is told, (n,) in [0, 1].
        hits: whether it is right, (n,).
        bins: B.
    """
    p = confidence.astype(np.float64)
    place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    accuracy = np.bincount(place, weights=hits, minlength=bins) / some
    mean = np.bincount(place, weights=p, minlength=bins) / some
    ece = float(np.sum(count * np.abs(accuracy - mean)) / len(p))
    return Calibration(ece, count, accuracy, mean)
