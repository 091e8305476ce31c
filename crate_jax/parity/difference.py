"""Compare two arrays; the results of a whole comparison, and its tolerances."""

import dataclasses
import math
from typing import NotRequired, TypedDict

import numpy as np

# The largest relative difference allowed in float32.
TOLERANCES = {"layers": 1e-5, "logits": 1e-4, "gradients": 1e-4, "losses": 1e-4, "statistics": 1e-4}
# This share of the weights must stay this close through the AdamW steps. Not all: a step on a
# gradient that is zero up to rounding goes either way, so a few weights part while losses agree.
WEIGHTS_WITHIN, WEIGHTS_SHARE = 1e-5, 0.999
# In lower precision a layer or the logits may be so many times as far from the yardstick as
# PyTorch's autocast, and a loss so far in all. Gradients, of which single entries jump with every
# threshold that falls otherwise, are reported and not judged.
LOW_PRECISION_FACTOR, LOW_PRECISION_LOSS = 10.0, 2e-2


class Training(TypedDict):
    """One optimizer's steps in both frameworks.

    Attributes:
        ours: the loss before each step.
        torch: PyTorch's.
        relative: their differences, as shares of PyTorch's.
        weights_within: the share of the weights within `WEIGHTS_WITHIN` at the end.
        statistics: the largest relative difference of an array of running statistics at the end, if
            the model has any.
        relative_to_float64: of ours from PyTorch in float64, if that was asked for.
        torch_relative_to_float64: of PyTorch in float32 from there.
    """

    ours: list[float]
    torch: list[float]
    relative: list[float]
    weights_within: float
    statistics: NotRequired[float]
    relative_to_float64: NotRequired[list[float]]
    torch_relative_to_float64: NotRequired[list[float]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two arrays compared.

    Attributes:
        name: what they are, such as ``layer 3 mssa``; layers count from 0.
        kind: "layers", "logits" or "gradients".
        max_abs: largest absolute difference.
        relative: that, over the largest absolute entry of the yardstick.
        cosine: the cosine of the two arrays as vectors.
        tolerance: what ``relative`` may be.
        torch_relative: of PyTorch in the same low precision, from the same yardstick; None in
            float32.
    """

    name: str
    kind: str
    max_abs: float
    relative: float
    cosine: float
    tolerance: float
    torch_relative: float | None = None

    @property
    def within(self) -> bool:
        """True if it is in tolerance; a NaN is not."""
        return self.relative <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of `compare`.

    Attributes:
        dtype: of our computation.
        examples: what the images are called where they are none, such as texts.
        images: how many were compared.
        rows: the rows of every tensor, in the order of computation, the gradients last.
        top1_agreement: share of the images, or of the tokens of texts, that both put into the same
            class.
        losses: of the batch whose gradients were compared: ``ours`` and ``torch``.
        gradient_images: how many that were. Where a value of ISTA lies within rounding of its
            threshold, it is a coin toss on which side it falls, and the gradient jumps; in float32
            only images count in which all of them fell alike.
        training: by optimizer.
        images_per_s: of a forward pass: ``ours`` and ``torch``.
    """

    dtype: str
    examples: str
    images: int
    rows: list[Difference]
    top1_agreement: float
    losses: dict[str, float]
    gradient_images: int
    training: dict[str, Training]
    images_per_s: dict[str, float]

    @property
    def loss_tolerance(self) -> float:
        """The tolerance of the relative difference of a loss."""
        return TOLERANCES["losses"] if self.dtype == "float32" else LOW_PRECISION_LOSS

    @property
    def first_difference(self) -> str | None:
        """The first of all comparisons that is out of tolerance, or None."""
        for row in self.rows:
            if not row.within:
                return row.name
        for name, found in self.training.items():
            for step, relative in enumerate(found["relative"], start=1):
                if not relative <= self.loss_tolerance:
                    return f"{name} loss of step {step}"
            if name != "adamw" or self.dtype != "float32":
                continue  # Lion takes signs, so weights part, and what they make of images
            if not found["weights_within"] >= WEIGHTS_SHARE:
                return f"{name} weights after the last step"
            if not found.get("statistics", 0.0) <= TOLERANCES["statistics"]:
                return f"{name} running statistics after the last step"
        return None


def difference(
    name: str, ours: np.ndarray, yardstick: np.ndarray, low: np.ndarray | None = None
) -> Difference:
    """Compare two arrays of one shape, in double precision.

    Args:
        name: decides whose tolerance counts: a gradient's, the logits' or a layer's.
        ours: from JAX.
        yardstick: from PyTorch in float32.
        low: from PyTorch in the precision of ours, where that is not float32.
    """
    kind = "gradients" if name.startswith("gradient ") else "layers"
    kind = "logits" if name == "logits" else kind
    a, b = (np.asarray(x, np.float64).ravel() for x in (ours, yardstick))
    scale = float(np.abs(b).max()) or 1.0
    max_abs, norms = float(np.abs(a - b).max()), float(np.linalg.norm(a) * np.linalg.norm(b))
    tolerance, torch_relative = TOLERANCES[kind], None
    if low is not None:
        torch_relative = float(np.abs(np.asarray(low, np.float64).ravel() - b).max()) / scale
        tolerance = math.inf if kind == "gradients" else LOW_PRECISION_FACTOR * torch_relative
    return Difference(
        name=name,
        kind=kind,
        max_abs=max_abs,
        relative=max_abs / scale,
        cosine=float(a @ b) / norms if norms else float(max_abs == 0),
        tolerance=tolerance,
        torch_relative=torch_relative,
    )
