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
from crate_jax.training.layerwise import clip_each, scale_by_layer
from crate_jax.training.orthonormal import orthonormal


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
            f"{total_steps}. Lower it, or raise total_epochs (total_steps, if that is set)."
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
    """Choose the parameters that decay: those with a part of their path in `decay_only`; () is all.

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


def make_decay(optim: OptimConfig, total_steps: int) -> float | optax.Schedule:
    """Weight decay: a number, or with end_weight_decay half a cosine to it over the run.

    Step i of T has e + ½ (d − e)(1 + cos(π i/T)), as the official code of arXiv 2502.10385.

    Args:
        optim: reads weight_decay and end_weight_decay.
        total_steps: T; 0: of no run, and the decay stays where it starts.
    """
    start, end = optim.weight_decay, optim.end_weight_decay
    if end is None:
        return start

    def schedule(step: Any) -> jax.Array:
        done = jnp.minimum(step, total_steps) / max(1, total_steps)
        return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * done))

    return schedule


def make_optimizer(
    optim: OptimConfig, schedule: optax.Schedule, *, total_steps: int = 0
) -> optax.GradientTransformation:
    """Clipping (if any), AdamW or Lion with decoupled weight decay, and the projection (if any).

    By default every parameter decays, norms and biases included, as in the official code. The first
    moment is kept in optim.mu_dtype, everything else in float32. Rates that differ by layer scale
    the decay with the step, as a rate does.

    Args:
        optim: reads all fields that `make_schedule` does not.
        schedule: the learning rate.
        total_steps: of the run, for `make_decay`.
    """
    names = dict(no_decay=optim.no_decay, decay_only=optim.decay_only)
    mask = functools.partial(decay_mask, **names) if any(names.values()) else None
    common: Json = dict(
        b1=optim.b1,
        b2=optim.b2,
        weight_decay=make_decay(optim, total_steps),
        mask=mask,
        mu_dtype=jnp.dtype(optim.mu_dtype),
    )
    if optim.optimizer == "adamw":
        tx = optax.adamw(schedule, eps=optim.eps, **common)
    else:
        tx = optax.lion(schedule, **common)
    # A link that is not asked for is not in the chain: the state has a place for each link, and
    # older checkpoints have the places of their links.
    if optim.clip_each:
        tx = optax.chain(clip_each(optim.clip_each), tx)
    if optim.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    if (optim.layer_decay, optim.patch_lr_scale) != (1, 1):
        tx = optax.chain(tx, scale_by_layer(optim.layer_decay, optim.patch_lr_scale))
    return optax.chain(tx, orthonormal(optim.orthonormal)) if optim.orthonormal else tx
