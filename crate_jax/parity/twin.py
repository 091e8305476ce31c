"""The interface of a PyTorch model that is compared with ours, and the optimizer PyTorch lacks."""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTHING = 0.1  # of the labels, in every loss of images


class Twin(nn.Module, abc.ABC):
    """The base of the PyTorch models: one of ours, with the official state-dict names and shapes.

    Attributes:
        TAPS: what `trace` can return of a layer, in the order of computation, under the names of
            our model's taps; of a twin with more than one attention its own.
        THRESHOLDED: the tap that is zero below a threshold; None where nothing is.
        EXAMPLES: what the examples of a batch are called.
    """

    TAPS: tuple[str, ...]
    THRESHOLDED: ClassVar[str | None] = None
    EXAMPLES: ClassVar[str] = "images"

    def inputs(self, examples: np.ndarray) -> Tensor:
        """The twin's form of what our model takes: images (B, c, H, W) of (B, H, W, c)."""
        return torch.tensor(examples.transpose(0, 3, 1, 2))

    def targets(self, labels: np.ndarray) -> Tensor:
        """The twin's form of what our loss takes beside the logits: classes as int64."""
        return torch.tensor(labels).long()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of logits (B, Y) and classes (B,), smoothed."""
        return F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) to the tokens (B, N, d) that enter the first layer."""

    @abc.abstractmethod
    def trace(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, Y), and {name: tensor} in the shapes of our model, layers on axis 0.

        Raises:
            KeyError: an unknown tap.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W), normalised, to logits (B, Y)."""
        return self.trace(images, ())[0]

    def check_taps(self, taps: Sequence[str]) -> None:
        """Raise a KeyError for a tap that is not there."""
        for name in taps:
            if name not in self.TAPS:
                raise KeyError(f"taps must be among {', '.join(self.TAPS)}; got {name}.")


def through(
    blocks: Iterable[Any], Z: Tensor, taps: Sequence[str], *others: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens (B, N, d) after all blocks, and the taps, layers on axis 0.

    Args:
        blocks: each from tokens, and the others, to tokens and all of its taps.
        Z: tokens.
        taps: names of those that are kept.
        others: what every block sees too.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in taps}
    for block in blocks:
        Z, seen = block(Z, *others)
        for name in taps:
            kept[name].append(seen[name])
    return Z, {name: torch.stack(values) for name, values in kept.items()}


class Lion(torch.optim.Optimizer):
    """θ ← θ − lr (sign(β₁ m + (1 − β₁) g) + λ θ), m ← β₂ m + (1 − β₂) g; PyTorch has none.

    Source: arXiv 2302.06675, algorithm 2.

    Args:
        params: tensors, or groups of them.
        lr: learning rate.
        betas: β₁ and β₂.
        weight_decay: λ, decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                m = state.setdefault("m", torch.zeros_like(theta))
                direction = torch.lerp(theta.grad, m, b1).sign()
                theta.sub_(lr * (direction + group["weight_decay"] * theta))
                m.lerp_(theta.grad, 1 - b2)
