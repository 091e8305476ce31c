"""The training step, as a pure function of (state, batch, key); no I/O, no config look-ups."""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType

from crate_jax import placement
from crate_jax.parallel import PyTree
from crate_jax.tasks.task import Batch, Extra, Params, Scalars, Task
from crate_jax.training.state import TrainState

StepFunction = Callable[[TrainState, Batch, Array], tuple[TrainState, Scalars]]
# (parameters, batch, key) to the gradient, and to the extra and the scalars beside it.
GradFunction = Callable[[Params, Batch, Array], tuple[Params, tuple[Extra, Scalars]]]


def stream(key: Array, name: str, step: Array | int) -> Array:
    """The key of one named use of randomness at one step; streams never share keys."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> StepFunction:
    """Build ``train_step(state, batch, key) -> (state, metrics)``.

    The batch is the task's; the key is the same at every step. Wrap the step in `jax.jit` (with
    shardings, for a mesh), or in `jax.shard_map` or `jax.pmap` with `axis_name`; gradients and
    metrics are then means over the whole batch in each of them. In a `jax.shard_map` it makes no
    difference whether ``check_vma`` is on, nor whether the task's loss is the mean over the devices
    already.

    Args:
        task: says what is done to the batch and what the loss is.
        tx: the optimizer; it sees the gradient of the mean loss over the batch.
        schedule: reported as ``lr`` when given.
        accumulate_steps: micro-batches, run one after the other, whose gradients are averaged. With
            more than one, what dropout drops depends on the size of the mesh's ``data``; and
            statistics of a batch are those of a micro-batch on one row of the mesh.
        ema_decay: of the averaged parameters in the state, when it keeps any.
        axis_name: the axis, or axes, of `jax.shard_map` or `jax.pmap` to average over.

    Returns:
        The step. Metrics are float32 scalars: ``loss`` and the task's own, ``grad_norm`` (before
        clipping), ``param_norm`` (after the update), ``lr``.

    Raises:
        ValueError: micro-batches of a task whose loss is no mean over rows; and, from the step, a
            loss that varies along an axis of a `jax.shard_map` that ``axis_name`` leaves out.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    if accumulate_steps > 1 and not task.by_row:
        raise ValueError(
            f"optim.accumulate_steps must be 1 for {type(task).__name__}, whose loss is no mean "
            f"over rows; got {accumulate_steps}. Set --config.optim.accumulate_steps=1."
        )

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Scalars]:
        batch_key, key = _keys(key, state.step, axes)
        # Before the batch is cut: who is mixed with whom depends neither on micro-batches nor on
        # the number of processes.
        batch = task.on_device(batch, batch_key)
        grads, (extra, metrics) = _mean_gradient(
            _gradient_of(task, state.extra, axes),
            _apart(state.params, axes),
            batch,
            key,
            accumulate_steps,
        )
        _check_axes(metrics["loss"], state.params, axes)
        if axes:
            grads, metrics = jax.lax.pmean((grads, metrics), axes)
            extra = jax.tree.map(functools.partial(_all_mean, axes=axes), extra)
        new = _updated(state, grads, tx, ema_decay)
        new = dataclasses.replace(new, extra=task.after(new.params, extra, new.step))
        metrics |= {"grad_norm": _norm(grads), "param_norm": _norm(new.params)}
        if schedule is not None:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
                metrics["lr"] = jnp.asarray(schedule(state.step), jnp.float32)
        return new, metrics

    return train_step


def _keys(key: Array, step: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """The keys of a step: of the whole batch, and of the loss."""
    batch_key, key = stream(key, "mix", step), stream(key, "dropout", step)
    if not axes:
        return batch_key, key
    i = jax.lax.axis_index(axes)
    return jax.random.fold_in(batch_key, i), jax.random.fold_in(key, i)


def _gradient_of(task: Task, extra: Extra, axes: tuple[str, ...]) -> GradFunction:
    """The gradient of a task's loss on a device, with the extra that a step starts from."""

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, tuple[Extra, Scalars]]:
        loss, (new_extra, scalars) = task.loss(params, extra, batch, key)
        return _apart(loss, axes), (new_extra, {"loss": loss} | scalars)

    return jax.grad(loss_fn, has_aux=True)


def _apart(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Arrays as if every device had its own, for their types in a `jax.shard_map`.

    Of parameters that are the same everywhere JAX takes the sum over the devices for the gradient,
    in every layer. Of these it takes that of a device's own loss, as in a `jax.pmap`, and the mean
    over the devices is taken once. A loss that is their mean already has the same gradient then.
    """

    def cast(x: Array) -> Array:
        same = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, same, to="varying")

    return jax.tree.map(cast, tree)


def _check_axes(loss: Array, params: Params, axes: tuple[str, ...]) -> None:
    """Refuse to sum up the gradients of devices that have the same parameters, and no mean."""
    own = [jax.typeof(x).mat.varying for x in jax.tree.leaves(params)]
    shared = frozenset.intersection(*own) if own else frozenset()
    missing = sorted(jax.typeof(loss).mat.varying.difference(axes, shared))
    if missing:
        raise ValueError(
            "axis_name must name the axes of jax.shard_map along which the loss varies; got "
            f"{', '.join(axes) or 'none'}. Add {', '.join(missing)}."
        )


def _updated(
    state: TrainState, grads: Params, tx: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """The state after an optimizer step; its extra is still the one before."""
    with jax.numpy_dtype_promotion("standard"):  # as above
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1 - float(ema_decay))
    return TrainState(state.step + 1, params, opt_state, ema_params, state.extra)


def _mean_gradient(
    grad_fn: GradFunction, params: Params, batch: Batch, key: Array, micro_batches: int
) -> tuple[Params, tuple[Extra, Scalars]]:
    """Gradient, extra and metrics of the mean loss; over micro-batches if there is more than one.

    All three are means over the micro-batches, each of which starts from the same extra: which
    comes first then makes no difference, and no device waits for another between two of them.
    """
    if micro_batches == 1:
        return grad_fn(params, batch, key)
    groups, rows = _groups(), (-1, micro_batches)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(micro_batches, dtype=jnp.int32))
    run = grad_fn
    if groups > 1:
        # A sum over `data` after every micro-batch would send the gradient that many times. So
        # each row of the mesh keeps a gradient of its own, on an axis that vmap adds and that
        # stays spread over `data`, and they are added up once, at the end of the step. Each needs
        # a key of its own: vmap would hand the same to all.
        def of_group(params: Params, batch: Batch, key: Array) -> PyTree:
            with placement.rows_within("data"):
                return grad_fn(params, batch, key)

        run = jax.vmap(of_group, in_axes=(None, 0, 0), spmd_axis_name="data")
        keys = jax.vmap(lambda key: jax.random.split(key, groups))(keys)
        rows = (groups, *rows)

    def split(x: Array) -> Array:
        # Micro-batch i takes every i-th row of a device. Were it to take rows that follow one
        # another, they would lie on a few devices, and have to be dealt out anew.
        return jnp.moveaxis(x.reshape(*rows, *x.shape[1:]), len(rows) - 1, 0)

    def add(total: PyTree, item: tuple[Batch, Array]):
        return jax.tree.map(jnp.add, total, run(params, *item)), None

    # A scan, and not a Python loop: one micro-batch's activations are held at a time, and the
    # program does not grow with their number. It starts from zeros, so that the body is compiled
    # once.
    micro = (jax.tree.map(split, batch), keys)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(run, params, *first))
    total, _ = jax.lax.scan(add, zeros, micro)
    if groups > 1:
        total = jax.tree.map(_mean_of_groups, total)
    return jax.tree.map(lambda x: _share(x, micro_batches), total)


def _share(total: Array, count: int) -> Array:
    """A mean from a sum; of whole numbers, which are equal in all micro-batches, exact."""
    return total / count if jnp.issubdtype(total.dtype, jnp.floating) else total // count


def _mean_of_groups(x: Array) -> Array:
    """The mean over axis 0; of whole numbers as in `_share`."""
    return x.mean(axis=0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]


def _all_mean(x: Array, axes: tuple[str, ...]) -> Array:
    """The mean over the devices; whole numbers are equal on all of them."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.pmean(x, axes)
    return jax.lax.pmax(x, axes) if jax.typeof(x).mat.varying else x


def _norm(tree: PyTree) -> Array:
    """The norm of all values together, added up in float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _groups() -> int:
    """The size of ``data`` in the mesh around a step; 1 without one, or where it is mapped over."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape["data"] if types.get("data") is AxisType.Auto else 1
