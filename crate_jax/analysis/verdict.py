"""A verdict on the layers in words: those that compress, those that sparsify, and the others."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from crate_jax.analysis.measured import Measured

ERRORS = 2.0  # standard errors from zero, within which a change is none


class Judged(NamedTuple):
    """The verdict on a half of a layer and its objective.

    Attributes:
        change: mean over the images.
        sign: −1: it descends; 1: it ascends; 0: neither, within two standard errors; None: the
            change is not finite.
    """

    change: float
    sign: int | None


def judge(measured: Measured) -> list[Judged]:
    """Judge for every layer if a change, measured image by image, goes down or up.

    A change of one image, which has no deviation, counts as it is.
    """
    within = np.nan_to_num(ERRORS * measured.error)
    signs = np.where(np.abs(measured.mean) > within, np.sign(measured.mean), 0)
    return [
        Judged(float(change), int(sign) if np.isfinite(change) else None)
        for change, sign in zip(measured.mean, signs, strict=True)
    ]


def verdict(measured: Mapping[str, Measured]) -> list[str]:
    """A sentence about each half of each layer, and at the end one about all layers together.

    The attention compresses where R^c(Z; U) of an image falls from before it to after it, and the
    second half descends where the LASSO value does: by more than two standard errors of the mean
    over the images.

    Args:
        measured: of `crate_jax.analysis.measure`; what is missing is not spoken of.

    Returns:
        Lines of text: a line a layer, and a line for the whole; none where nothing is known.
    """
    attention = judge(measured["compression"]) if "compression" in measured else []
    second = judge(measured["descent"]) if "descent" in measured else []
    lines = []
    for layer in range(max(len(attention), len(second))):
        said = []
        if attention:
            said.append(_compression(attention[layer]))
        if second:
            said.append(_descent(second[layer]))
        if second and "zeros" in measured:
            said.append(f"{measured['zeros'].mean[layer]:.0%} of the code is zero")
        lines.append(f"Layer {layer + 1}: " + "; ".join(said) + ".")
    return lines + _together(measured, attention, second)


def _compression(half: Judged) -> str:
    words = {-1: "the attention lowers R^c by", 1: "the attention raises R^c by"}
    if half.sign is None:
        return "the change of R^c is not finite"
    if not half.sign:
        return "the attention leaves R^c as it is"
    return f"{words[half.sign]} {abs(half.change):.1f} nats"


def _descent(half: Judged) -> str:
    words = {-1: "the second half lowers its LASSO by", 1: "the second half raises its LASSO by"}
    if half.sign is None:
        return "the change of the LASSO is not finite"
    if not half.sign:
        return "the second half leaves its LASSO as it is"
    return f"{words[half.sign]} {abs(half.change):.2f} per token"


def _together(
    measured: Mapping[str, Measured], attention: list[Judged], second: list[Judged]
) -> list[str]:
    """Count the halves that descend their objectives, and find the layers where R^c rises."""
    parts = []
    if attention:
        count = sum(half.sign == -1 for half in attention)
        parts.append(f"the attention compresses in {count} of {len(attention)} layers")
    if second:
        count = sum(half.sign == -1 for half in second)
        parts.append(f"the second half descends its LASSO in {count} of {len(second)} layers")
    if "subspace_rate" in measured:
        means = measured["subspace_rate"].mean
        rises = [f"{i} to {i + 1}" for i in range(1, len(means)) if means[i] > means[i - 1]]
        how = f"rises from layer {', '.join(rises)}" if rises else "never rises"
        parts.append(f"R^c after the attention {how} with depth")
    return ["Together: " + "; ".join(parts) + "."] if parts else []
