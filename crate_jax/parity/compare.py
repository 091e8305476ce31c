"""Compare our model with PyTorch's on the same weights and inputs, tensor by tensor.

Differences are relative to the largest entry of PyTorch's float32 array, the yardstick. Loss and
training step are handed in, because they stand above this file.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from crate_jax.config import OptimConfig
from crate_jax.interop import to_state_dict
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel
from crate_jax.parity import runs
from crate_jax.parity.difference import (
    TOLERANCES,
    WEIGHTS_WITHIN,
    Comparison,
    Difference,
    Training,
    difference,
)
from crate_jax.parity.runs import Arrays, Loss
from crate_jax.parity.torch_reference import Twin, from_flax_model
from crate_jax.parity.twin import SMOOTHING

__all__ = ["OPTIMIZERS", "SMOOTHING", "TOLERANCES", "Train", "compare"]

# The optimizers of the official code at their peak rates: argparse's AdamW and the README's Lion.
OPTIMIZERS = {
    "adamw": OptimConfig(optimizer="adamw", lr=4e-4, weight_decay=0.1, label_smoothing=SMOOTHING),
    "lion": OptimConfig(
        optimizer="lion", lr=2e-4, weight_decay=0.05, b2=0.99, label_smoothing=SMOOTHING
    ),
}

# (variables, images, labels, optimizer, steps) to the losses and the variables after them.
Train = Callable[[Params, Array, Array, OptimConfig, int], tuple[list[float], Params]]
# The same once variables, images and labels are given.
TrainOn = Callable[[OptimConfig, int], tuple[list[float], Params]]


def compare(
    model: BlockModel,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    loss: Loss,
    train: Train,
    train_steps: int = 0,
    rate_scale: float = 1.0,
    float64: bool = False,
    reference_params: Params | None = None,
    rounds: int = 5,
) -> Comparison:
    """Run both frameworks on the same inputs and compare all tensors, gradients and losses.

    Forward pass layer by layer, logits, gradients of the twin's loss, a few full-batch steps of
    AdamW and of Lion, and the time of a forward pass. Gradients and steps are of training mode: a
    BatchNorm takes the statistics of the batch, and its running ones are compared after the steps.
    All else is of evaluation mode. float32 products run at full precision, also where an
    accelerator would round them by default. In another dtype the yardstick stays PyTorch in
    float32, and PyTorch's own autocast is measured against it beside ours. PyTorch runs on the CPU.

    Args:
        model: ours, without dropout and stochastic depth (`crate_jax.parity.runs.without_chance`);
            its dtype is the one compared.
        params: its parameters; of a model with running statistics its variables.
        images: (B, H, W, c) float32, normalised; for a model of text, token ids (B, N).
        labels: (B,) integer classes; for a model of text, a token for each place (B, N); for an
            autoencoder, `crate_jax.parity.crate_mae.Hiding`, the images.
        loss: (logits, labels) to the loss of each example, whose mean is `Twin.loss`.
        train: our training steps.
        train_steps: of each optimizer; 0: none.
        rate_scale: their learning rates, as a share of the peak rates in `OPTIMIZERS`.
        float64: also train PyTorch in double precision, and measure both from its losses: how far
            rounding alone carries a training.
        reference_params: PyTorch's parameters; None: the same.
        rounds: timings of each framework, in turns.
    """
    theirs = params if reference_params is None else reference_params
    reference = _Reference.of(model, theirs, images, labels)
    dtype = jnp.dtype(model.dtype).name
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        params = jax.tree.map(jnp.asarray, variables_of(params))
        x, y = jnp.asarray(images), jnp.asarray(labels)
        tensors, top1_agreement = _compare_tensors(model, params, x, reference)
        gradients, losses, compared = _compare_gradients(model, params, x, y, loss, reference)
        training = _train_with_each(
            functools.partial(train, params, x, y), reference, rate_scale, train_steps, float64
        )
        rates = runs.images_per_s_of_both(
            model, params, x, reference.module(), reference.images, rounds
        )
    return Comparison(
        dtype=dtype,
        examples=reference.examples,
        images=len(images),
        rows=tensors + gradients,
        top1_agreement=top1_agreement,
        losses=losses,
        gradient_images=compared,
        training=training,
        images_per_s=rates,
    )


@dataclasses.dataclass(frozen=True)
class _Reference:
    """PyTorch's side: the name of the examples, the weights by official name, and a batch."""

    model: BlockModel
    examples: str
    state: Arrays
    images: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(
        cls, model: BlockModel, params: Params, images: np.ndarray, labels: np.ndarray
    ) -> "_Reference":
        """Build PyTorch's side of our parameters and batch."""
        twin = from_flax_model(model)  # it refuses a model without a twin before one without names
        x, y = twin.inputs(images), twin.targets(labels)
        return cls(model, twin.EXAMPLES, to_state_dict(params, model), x, y)

    def module(self) -> Twin:
        """A fresh model with the weights."""
        module = from_flax_model(self.model)
        module.load_state_dict({name: torch.tensor(array) for name, array in self.state.items()})
        return module

    def tensors(self, dtype: torch.dtype) -> Arrays:
        """The forward pass, by name."""
        return runs.torch_tensors(self.module(), self.images, dtype)

    def gradients(self, kept: np.ndarray, dtype: torch.dtype) -> tuple[Arrays, np.ndarray]:
        """Loss and gradients on some of the images, and where none was below its threshold."""
        return runs.torch_gradients(self.module(), self.images[kept], self.targets[kept], dtype)


def _compare_tensors(
    model: BlockModel, params: Params, x: Array, reference: _Reference
) -> tuple[list[Difference], float]:
    """Every tensor of the forward pass, and the share of logits with the same largest entry."""
    dtype = getattr(torch, jnp.dtype(model.dtype).name)
    yardstick = reference.tensors(torch.float32)
    ours = runs.our_tensors(model, params, x, reference.module().TAPS)
    low = {} if dtype == torch.float32 else reference.tensors(dtype)
    same = ours["logits"].argmax(axis=-1) == yardstick["logits"].argmax(axis=-1)
    rows = [difference(k, ours[k], yardstick[k], low.get(k)) for k in yardstick]
    return rows, float(same.mean())


def _compare_gradients(
    model: BlockModel, params: Params, x: Array, y: Array, loss: Loss, reference: _Reference
) -> tuple[list[Difference], dict[str, float], int]:
    """Every gradient, the losses, and the number of images whose gradients were compared."""
    dtype = getattr(torch, jnp.dtype(model.dtype).name)
    thresholded = reference.module().THRESHOLDED

    def ours_of(kept: np.ndarray) -> tuple[Arrays, np.ndarray]:
        return runs.our_gradients(model, params, x[kept], y[kept], loss, thresholded)

    ours, yardstick, images = _gradients(
        ours_of,
        functools.partial(reference.gradients, dtype=torch.float32),
        images=len(x),
        exact=dtype == torch.float32,
    )
    low = {} if dtype == torch.float32 else reference.gradients(np.arange(len(x)), dtype)[0]
    losses = {"ours": float(ours.pop("loss")), "torch": float(yardstick.pop("loss"))}
    rows = [difference(k, ours[k], yardstick[k], low.get(k)) for k in yardstick]
    return rows, losses, images


def _gradients(
    ours: Callable[[np.ndarray], tuple[Arrays, np.ndarray]],
    theirs: Callable[[np.ndarray], tuple[Arrays, np.ndarray]],
    *,
    images: int,
    exact: bool,
) -> tuple[Arrays, Arrays, int]:
    """Loss and gradients of both on the images whose thresholds fall alike, and their number.

    Args:
        ours: from indices of images to loss and gradients, and where the thresholded tap is
            positive, (L, B, N, d).
        theirs: likewise.
        images: their number.
        exact: False leaves none out.
    """
    kept = np.arange(images)
    while True:
        (our_grads, our_support), (their_grads, their_support) = ours(kept), theirs(kept)
        alike = (our_support == their_support).all(axis=(0, 2, 3))
        # With none left there is nothing to compare on: then on all of them.
        if not exact or alike.all() or not alike.any():
            return our_grads, their_grads, len(kept)
        kept = kept[alike]


def _train_with_each(
    train_ours: TrainOn, reference: _Reference, rate_scale: float, steps: int, float64: bool
) -> dict[str, Training]:
    """The training of both by each of `OPTIMIZERS`; {} for no steps."""
    optims = {
        name: dataclasses.replace(optim, lr=rate_scale * optim.lr)
        for name, optim in OPTIMIZERS.items()
        if steps
    }
    return {
        name: _train_both(optim, train_ours, reference, steps=steps, float64=float64)
        for name, optim in optims.items()
    }


def _train_both(
    optim: OptimConfig,
    train_ours: TrainOn,
    reference: _Reference,
    *,
    steps: int,
    float64: bool,
) -> Training:
    """The losses of one optimizer side by side, and how many weights stayed together."""
    losses, after = train_ours(optim, steps)
    module, images, targets = reference.module(), reference.images, reference.targets
    their_losses = runs.train_torch(module, images, targets, optim, steps)
    ours = to_state_dict(after, reference.model)
    apart = [
        np.abs(ours[name] - parameter.detach().numpy()).ravel()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    found = Training(
        ours=losses,
        torch=their_losses,
        relative=_relative(losses, their_losses),
        weights_within=float((np.concatenate(apart) <= WEIGHTS_WITHIN).mean()),
    )
    running = {k: v.numpy() for k, v in module.named_buffers() if k in ours}
    if running:
        found["statistics"] = max(difference(k, ours[k], v).relative for k, v in running.items())
    if float64:
        double = reference.module().double()
        exact_images = images.double() if images.is_floating_point() else images
        exact = runs.train_torch(double, exact_images, targets, optim, steps)
        found["relative_to_float64"] = _relative(losses, exact)
        found["torch_relative_to_float64"] = _relative(their_losses, exact)
    return found


def _relative(losses: list[float], yardstick: list[float]) -> list[float]:
    """Differences step for step, as shares of the yardstick."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, yardstick, strict=True)]
