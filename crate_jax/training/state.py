"""The state of a run: everything that a step reads and writes, and how it starts."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from crate_jax.models.cost import sample_images
from crate_jax.models.crate import Crate
from crate_jax.parallel import check_shares, place, state_shardings


@flax.struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
        step: optimizer steps done, int32 scalar.
        params: the model's parameters, float32.
        opt_state: of the optax chain.
        ema_params: exponential moving average of params, or None when none is kept.
    """

    step: Array
    params: Any
    opt_state: Any
    ema_params: Any = None


def init_state(
    model: Crate, tx: optax.GradientTransformation, key: Array, *, ema: bool = False
) -> TrainState:
    """A fresh state; pure, so it runs under `jit` and `jax.eval_shape`.

    Args:
        model: of `crate_jax.create_model`.
        tx: the optimizer.
        key: typed key; the parameters are a function of it alone.
        ema: whether averaged parameters are kept.
    """
    params = model.init(key, sample_images(model), train=False)["params"]
    ema_params = jax.tree.map(jnp.copy, params) if ema else None  # a donated buffer can't be shared
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params)


def abstract_state(
    model: Crate, tx: optax.GradientTransformation, key: Array, mesh: Mesh, *, ema: bool = False
) -> tuple[TrainState, Any]:
    """Shapes, dtypes and shardings of a state on a mesh, without computing it.

    Returns:
        The state as `jax.ShapeDtypeStruct` leaves with shardings, and the tree of the shardings.

    Raises:
        ValueError: the mesh has an ``fsdp`` that splits little of the state.
    """
    shapes = jax.eval_shape(lambda key: init_state(model, tx, key, ema=ema), key)
    shardings = state_shardings(shapes, mesh)
    check_shares(shapes, shardings, mesh)
    leaf = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(leaf, shapes, shardings), shardings


def init_sharded(
    model: Crate, tx: optax.GradientTransformation, key: Array, mesh: Mesh, *, ema: bool = False
) -> tuple[TrainState, Any]:
    """`init_state` laid out on a mesh; no device ever holds more than its share.

    Returns:
        The state, equal on every mesh, and its tree of shardings.
    """
    _, shardings = abstract_state(model, tx, key, mesh, ema=ema)
    init = lambda key: init_state(model, tx, key, ema=ema)  # noqa: E731
    return jax.jit(init, out_shardings=shardings)(key), shardings


def replace_params(state: TrainState, params: Any) -> TrainState:
    """The state with other parameters (and average) of the same shapes, on the same devices.

    Args:
        state: a fresh state; its optimizer state is kept.
        params: tree of arrays, on the host or not.
    """
    put = lambda new, old: place(new, old.sharding)  # noqa: E731
    ema_params = None
    if state.ema_params is not None:
        ema_params = jax.tree.map(put, params, state.ema_params)
    params = jax.tree.map(put, params, state.params)
    return dataclasses.replace(state, params=params, ema_params=ema_params)
