"""The state of a run: everything that a step reads and writes, and its first values."""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from crate_jax.files import Json
from crate_jax.parallel import Shardings, check_shares, place, state_shardings
from crate_jax.tasks.task import Extra, Params, Task


@flax.struct.dataclass
class TrainState:
    """The state that changes from step to step.

    Attributes:
        step: optimizer steps done, int32 scalar.
        params: the model's parameters, float32.
        opt_state: the state of the optax chain.
        ema_params: exponential moving average of params, or None when none is kept.
        extra: what the task carries along that no gradient reaches: running statistics, a teacher;
            () when there is none.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None = None
    extra: Extra = ()


def init_state(
    task: Task, tx: optax.GradientTransformation, key: Array, *, ema: bool = False
) -> TrainState:
    """A fresh state; pure, so it runs under `jit` and `jax.eval_shape`.

    Args:
        task: knows the parameters.
        tx: the optimizer.
        key: typed key; the parameters are a function of it alone.
        ema: whether averaged parameters are kept.
    """
    params, extra = task.init(key)
    ema_params = jax.tree.map(jnp.copy, params) if ema else None  # a donated buffer can't be shared
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params, extra)


def abstract_state(
    task: Task, tx: optax.GradientTransformation, key: Array, mesh: Mesh, *, ema: bool = False
) -> tuple[TrainState, Shardings]:
    """Shapes, dtypes and shardings of a state on a mesh, without computing it.

    Returns:
        The state as `jax.ShapeDtypeStruct` leaves with shardings, and the tree of the shardings.

    Raises:
        ValueError: the mesh has an ``fsdp`` that splits little of the state.
    """
    shapes = jax.eval_shape(functools.partial(init_state, task, tx, ema=ema), key)
    shardings = state_shardings(shapes, mesh)
    check_shares(shapes, shardings, mesh)
    return jax.tree.map(_with_sharding, shapes, shardings), shardings


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def init_sharded(
    task: Task, tx: optax.GradientTransformation, key: Array, mesh: Mesh, *, ema: bool = False
) -> tuple[TrainState, Shardings]:
    """`init_state` laid out on a mesh; no device ever holds more than its share.

    Returns:
        The state, equal on every mesh, and its tree of shardings.
    """
    _, shardings = abstract_state(task, tx, key, mesh, ema=ema)
    init = functools.partial(init_state, task, tx, ema=ema)
    return jax.jit(init, out_shardings=shardings)(key), shardings


def replace_params(
    state: TrainState,
    params: Params,
    begun: Callable[[Params, Extra, Params], Extra] | None = None,
    others: Params | None = None,
) -> TrainState:
    """The state with other parameters (and average) of the same shapes, on the same devices.

    Args:
        state: a fresh state; its optimizer state is kept.
        params: tree of arrays, on the host or not. A branch of the state's parameters that it has
            not is kept: the head of an objective, behind a model that has none.
        begun: the task's method, which makes the extra beside them; None: it stays.
        others: for that: the other collections that came with the parameters; None: none did.
    """
    ema_params, extra = None, state.extra
    params = {**state.params, **params}
    if state.ema_params is not None:
        ema_params = jax.tree.map(_in_place_of, params, state.ema_params)
    params = jax.tree.map(_in_place_of, params, state.params)
    if begun is not None:
        extra = jax.tree.map(_in_place_of, begun(params, extra, others or {}), extra)
    return dataclasses.replace(state, params=params, ema_params=ema_params, extra=extra)


def _in_place_of(new: ArrayLike, old: Array) -> Array:
    return place(new, old.sharding)


def to_stored(state: TrainState) -> Json:
    """The state, or its shapes, as a checkpoint holds it.

    An extra without arrays is left out, as in checkpoints of the days when states had none.
    """
    branches = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if not jax.tree.leaves(state.extra):
        del branches["extra"]
    return branches


def from_stored(branches: Json) -> TrainState:
    """The inverse of `to_stored`."""
    return TrainState(**branches)
