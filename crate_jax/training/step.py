"""The training step, as a pure function of (state, batch, key); no I/O, no config look-ups."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType

from crate_jax.models.crate import Crate
from crate_jax.tasks.mixing import Mix
from crate_jax.training.state import TrainState

Batch = dict[str, Array]
StepFunction = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


def cross_entropy(logits_BxY: Array, labels_B: Array, *, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy against (1 − α) p + α/Y, per example, without making that array.

    logsumexp(z) − (1 − α) Σ_y p_y z_y − α mean(z); PyTorch's
    ``CrossEntropyLoss(label_smoothing=α)``.

    Args:
        logits_BxY: any float dtype; the loss is computed in float32.
        labels_B: integer classes in [0, Y), for p one-hot; or p itself (B, Y), rows of sum 1.
        label_smoothing: α in [0, 1).

    Returns:
        Loss in nats (B,), float32.
    """
    z_BxY = logits_BxY.astype(jnp.float32)
    if labels_B.ndim == 2:
        target_B = jnp.sum(labels_B * z_BxY, axis=1)
    else:
        target_B = jnp.take_along_axis(z_BxY, labels_B[:, None], axis=1)[:, 0]
    loss_B = jax.nn.logsumexp(z_BxY, axis=1) - (1 - label_smoothing) * target_B
    return loss_B - label_smoothing * z_BxY.mean(axis=1)


def stream(key: Array, name: str, step: Array | int) -> Array:
    """The key of one named use of randomness at one step; streams never share keys."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def make_train_step(
    model: Crate,
    tx: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    preprocess: Callable[[Array], Array] | None = None,
    mix: Mix | None = None,
    label_smoothing: float = 0.0,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> StepFunction:
    """Build ``train_step(state, batch, key) -> (state, metrics)``.

    The batch is {"image": (B, H, W, C), "label": (B,) integers}; the key is the same at every step.
    Wrap the step in `jax.jit` (with shardings, for a mesh), or in `jax.pmap` with `axis_name`;
    gradients and metrics are then means over the whole batch either way.

    Args:
        model: of `crate_jax.create_model`.
        tx: the optimizer; it sees the gradient of the mean loss over the batch.
        schedule: reported as ``lr`` when given.
        preprocess: applied to the images on the device; None: they are normalised already.
        mix: of `crate_jax.tasks.mixing.make_mix`; applied to the whole batch, so that who is mixed
            with whom depends neither on micro-batches nor on the number of processes.
        label_smoothing: in [0, 1).
        accumulate_steps: micro-batches, run one after the other, whose gradients are averaged. With
            more than one, what dropout drops depends on the size of the mesh's ``data``.
        ema_decay: of the averaged parameters in the state, when it keeps any.
        axis_name: the `jax.pmap` axis to average over.

    Returns:
        The step. Metrics are float32 scalars: ``loss``, ``top1`` (of mixed images, against
        the heavier class), ``grad_norm`` (before clipping),
        ``param_norm`` (after the update), ``lr``.
    """

    def normalized(images: Array) -> Array:
        return images if preprocess is None else preprocess(images)

    def loss_fn(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        # Mixed images are normalised already; others are only now, a micro-batch at a time.
        images = normalized(batch["image"]) if mix is None else batch["image"]
        labels_B = targets = batch["label"]
        if targets.ndim == 2:
            labels_B = targets.argmax(axis=1)
        logits_BxY: Any = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        loss = cross_entropy(logits_BxY, targets, label_smoothing=label_smoothing).mean()
        top1 = (logits_BxY.argmax(axis=1) == labels_B).mean(dtype=jnp.float32)
        return loss, {"loss": loss, "top1": top1}

    def train_step(state: TrainState, batch: Batch, key: Array):
        mix_key, key = stream(key, "mix", state.step), stream(key, "dropout", state.step)
        if axis_name is not None:
            i = jax.lax.axis_index(axis_name)
            mix_key, key = jax.random.fold_in(mix_key, i), jax.random.fold_in(key, i)
        if mix is not None:
            images, targets = mix(mix_key, normalized(batch["image"]), batch["label"])
            batch = {"image": images, "label": targets}
        grads, metrics = _mean_gradient(loss_fn, state.params, batch, key, accumulate_steps)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            lr = None if schedule is None else schedule(state.step)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        if lr is not None:
            metrics["lr"] = jnp.asarray(lr, jnp.float32)
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return train_step


def _mean_gradient(loss_fn: Callable, params: Any, batch: Batch, key: Array, micro_batches: int):
    """Gradient and metrics of the mean loss, over micro-batches if there is more than one."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return grad_fn(params, batch, key)
    groups, rows = _groups(), (-1, micro_batches)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(micro_batches))
    if groups > 1:
        # Each keeps a gradient of its own until the end of the step: they are added up over
        # `data` once, and not after every micro-batch.
        grad_fn = jax.vmap(grad_fn, in_axes=(None, 0, 0), spmd_axis_name="data")
        keys = jax.vmap(lambda key: jax.random.split(key, groups))(keys)
        rows = (groups, *rows)

    def split(x: Array) -> Array:
        # Micro-batch i takes every i-th row, so that each device keeps the rows it has.
        return jnp.moveaxis(x.reshape(*rows, *x.shape[1:]), len(rows) - 1, 0)

    def add(total: Any, item: tuple[Batch, Array]):
        return jax.tree.map(jnp.add, total, grad_fn(params, *item)), None

    micro = (jax.tree.map(split, batch), keys)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, *first)
    )
    total, _ = jax.lax.scan(add, zeros, micro)
    if groups > 1:
        total = jax.tree.map(lambda x: x.mean(axis=0), total)
    return jax.tree.map(lambda x: x / micro_batches, total)


def _groups() -> int:
    """The size of ``data`` in the mesh around a step; 1 without one, or where it is mapped over."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape["data"] if types.get("data") is AxisType.Auto else 1
