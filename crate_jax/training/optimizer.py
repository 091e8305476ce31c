"""Schedules, decay masks and the optax chain."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crate_jax.config import OptimConfig, did_you_mean
from crate_jax.files import Json
from crate_jax.parallel import PyTree


def make_schedule(optim: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the optimizer step.

    ``cosine``: linear from warmup_lr to lr over warmup_epochs, then half a cosine to end_lr, which
    it stays at for the last cooldown_epochs of the run.
    ``official_readme``: constant within an epoch e, lr · min((e + 1)/w, ½(cos(π e/E) + 1)), with w
    the warmup_epochs and E the epochs of the run, as the official training script computes it.

    Args:
        optim: reads schedule, lr, warmup_epochs, warmup_lr, end_lr and cooldown_epochs.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps per pass over the training set.

    Raises:
        ValueError: the warm-up, or it and the cool-down, are as long as the run.
    """
    if optim.schedule == "official_readme":
        return _official_readme(optim, total_steps / steps_per_epoch, steps_per_epoch)
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    cooldown_steps = round(optim.cooldown_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"optim.warmup_epochs must be shorter than the run; got {warmup_steps} steps of "
            f"{total_steps}. Lower it, or raise total_epochs."
        )
    end = total_steps - cooldown_steps  # of the cosine
    if warmup_steps >= end:
        raise ValueError(
            "optim.cooldown_epochs must be shorter than what follows the warm-up; got "
            f"{cooldown_steps} steps of {total_steps - warmup_steps}. Lower it, or raise "
            "total_epochs."
        )
    start, peak, floor = optim.warmup_lr, optim.lr, optim.end_lr
    if warmup_steps == 0:
        return optax.cosine_decay_schedule(peak, end, floor / peak)
    return optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, end, floor)


def _official_readme(optim: OptimConfig, epochs: float, steps_per_epoch: int) -> optax.Schedule:
    # A table in double precision: PyTorch's numbers to the last bit of float32.
    epoch = np.arange(math.ceil(epochs))
    factor = 0.5 * (np.cos(np.pi * epoch / epochs) + 1)
    if optim.warmup_epochs:
        factor = np.minimum((epoch + 1) / optim.warmup_epochs, factor)
    rates = (optim.lr * factor).astype(np.float32)

    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(rates)[jnp.minimum(step // steps_per_epoch, len(rates) - 1)]

    return schedule


def decay_mask(
    params: PyTree, no_decay: tuple[str, ...] = (), decay_only: tuple[str, ...] = ()
) -> PyTree:
    """Which parameters decay: those with a part of their path in `decay_only`, or all if it is ().

    Those with a part of their path in `no_decay` do not. Names, not ranks, decide: layers are
    stacked, so a norm's scale has two axes.

    Raises:
        KeyError: a name that is part of no parameter's path.
    """
    leaves, treedef = jax.tree.flatten_with_path(params)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/").split("/") for p, _ in leaves]
    known = {part for path in paths for part in path}
    for field, names in (("no_decay", no_decay), ("decay_only", decay_only)):
        for name in names:
            if name not in known:
                raise KeyError(
                    f"optim.{field} must name parts of parameter paths; got {name}. "
                    + did_you_mean(name, known)
                )
    listed = set(decay_only or known)
    decays = [bool(set(path) & listed) and not set(path) & set(no_decay) for path in paths]
    return jax.tree.unflatten(treedef, decays)


def make_optimizer(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping (if any), then AdamW or Lion with decoupled weight decay.

    By default every parameter decays, norms and biases included, as in the official code. The first
    moment is kept in optim.mu_dtype, everything else in float32.
    """
    names = dict(no_decay=optim.no_decay, decay_only=optim.decay_only)
    mask = functools.partial(decay_mask, **names) if any(names.values()) else None
    common: Json = dict(
        b1=optim.b1,
        b2=optim.b2,
        weight_decay=optim.weight_decay,
        mask=mask,
        mu_dtype=jnp.dtype(optim.mu_dtype),
    )
    if optim.optimizer == "adamw":
        tx = optax.adamw(schedule, eps=optim.eps, **common)
    else:
        tx = optax.lion(schedule, **common)
    if optim.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    return tx
