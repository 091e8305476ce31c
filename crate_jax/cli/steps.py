"""Training steps of ours on one batch, for `compare`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from crate_jax.config import OptimConfig
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.crate_mae import CrateMae
from crate_jax.models.embedding import patchify
from crate_jax.models.language import LanguageModel
from crate_jax.models.parameters import Params, Variables, variables_of
from crate_jax.parity.crate_mae import hidden_places
from crate_jax.tasks import Classify, NextToken
from crate_jax.tasks.masking import hidden_errors
from crate_jax.tasks.task import Batch, Extra, Scalars, Task
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.state import TrainState
from crate_jax.training.step import make_train_step


def classifier_steps(
    model: ImageClassifier,
    params: Params,
    images: Array,
    labels: Array,
    optim: OptimConfig,
    steps: int,
) -> tuple[list[float], Variables]:
    """`full_batch_steps` of a classifier of images (B, H, W, c) with labels (B,)."""
    task = Classify(model, label_smoothing=optim.label_smoothing)
    return full_batch_steps(task, params, {"image": images, "label": labels}, optim, steps)


def text_steps(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    targets: Array,
    optim: OptimConfig,
    steps: int,
) -> tuple[list[float], Variables]:
    """`full_batch_steps` of a model of text, tokens and targets (B, N); no label is smoothed."""
    batch = {"tokens": tokens, "targets": targets}
    return full_batch_steps(NextToken(model), params, batch, optim, steps)


def autoencoder_steps(
    model: CrateMae,
    params: Params,
    images: Array,
    targets: Array,
    optim: OptimConfig,
    steps: int,
) -> tuple[list[float], Variables]:
    """`full_batch_steps` of an autoencoder that hides the same patches of each image."""
    task = _Outputs(model, functools.partial(hidden_loss, model))  # type: ignore[abstract]
    return full_batch_steps(task, params, {"input": images, "target": targets}, optim, steps)


def hidden_loss(model: CrateMae, told_BxPxk: Array, images_BxHxWxc: Array) -> Array:
    """The error (B,) over the patches that a comparison hides, as pre-training has it."""
    X_BxPxk = patchify(images_BxHxWxc, pair(model.patch_size))
    masked_BxP = jnp.broadcast_to(hidden_places(X_BxPxk.shape[1])[None], X_BxPxk.shape[:2])
    return hidden_errors(told_BxPxk, X_BxPxk, masked_BxP, normalize=True)[0]


def full_batch_steps(
    task: Task, params: Params, batch: Batch, optim: OptimConfig, steps: int
) -> tuple[list[float], Variables]:
    """Our training step on one batch at a constant rate, again and again.

    Args:
        task: the task of the model, without anything random.
        params: to start from; of a model with running statistics its variables.
        batch: the batch of every step.
        optim: whose rate stays as it is.
        steps: how many.

    Returns:
        The losses before each step, and the variables after the last.
    """
    tx = make_optimizer(optim, optax.constant_schedule(optim.lr))
    step = jax.jit(make_train_step(task, tx))
    extra = dict(variables_of(params))
    params = extra.pop("params")
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra=extra or ())
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses, {"params": state.params, **dict(state.extra)}


@dataclasses.dataclass(frozen=True)
class _Outputs(Task):
    """A loss of the model's outputs: as much of a task as a training step asks for."""

    model: Any
    loss_of: Callable[[Array, Array], Array]
    by_row: ClassVar[bool] = True

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The mean over all examples."""
        outputs = self.model.apply(
            {"params": params}, batch["input"], train=True, rngs={"dropout": key}
        )
        return self.loss_of(outputs, batch["target"]).mean(), (extra, {})
