"""How arrays lie on the mesh around a function: weights gathered, shared axes left as they are.

Of Explicit axes, `jax.make_mesh`'s default, the type of an array says which devices share which
axis. JAX refuses to merge or split a shared axis, and a product in whose result the same devices
would share two. Where no axis is shared, everything here leaves the program as it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Result = TypeVar("_Result")
_TAKEN: ContextVar[frozenset[str]] = ContextVar("_TAKEN", default=frozenset())


def is_shared(X: Array) -> bool:
    """Whether devices share an axis of X, by its type."""
    return any(axis is not None for axis in jax.typeof(X).sharding.spec)


def whole(X: Array) -> Array:
    """X gathered over the axes of its type; its gradient is shared out again, as X was."""
    if not is_shared(X):
        return X
    return jax.sharding.reshard(X, NamedSharding(jax.typeof(X).sharding.mesh, PartitionSpec()))


def whole_of_fsdp(X: Array) -> Array:
    """X gathered over an Auto axis ``fsdp``; as it is where no such axis is around it.

    `crate_jax.parallel.on_mesh` puts the axis around a function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get("fsdp") is not AxisType.Auto or mesh.shape["fsdp"] == 1:
        return X
    return jax.lax.with_sharding_constraint(X, PartitionSpec())


@contextlib.contextmanager
def rows_within(axis: str) -> Iterator[None]:
    """Around what is mapped over an axis of the mesh already: examples lie on the others alone."""
    token = _TAKEN.set(_TAKEN.get() | {axis})
    try:
        yield
    finally:
        _TAKEN.reset(token)


def axes_of_rows() -> tuple[str, ...]:
    """The Auto axes, of more than one device, over which the mesh around spreads examples."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = (axis for axis, kind in types.items() if kind is AxisType.Auto)
    return tuple(axis for axis in auto if mesh.shape[axis] > 1 and axis not in _TAKEN.get())


def by_rows(
    function: Callable[..., _Result], *arrays: Array, whole: tuple[Array, ...] = ()
) -> _Result:
    """What a function of arrays gives, of which each device computes its own rows, on axis 0.

    The compiler cannot split a kernel, and would gather what it takes.

    Args:
        function: to arrays, whose rows are put one device's after another's.
        *arrays: spread by the mesh around, or by their types, over axis 0 alone.
        whole: arrays that it takes besides, which every device has whole.
    """
    axes = axes_of_rows()
    if is_shared(arrays[0]):
        spread = jax.typeof(arrays[0]).sharding.spec[0]
        axes = spread if isinstance(spread, tuple) else (spread,)
    if not axes:
        return function(*arrays, *whole)
    rows = PartitionSpec(axes)
    specs = (*(rows for _ in arrays), *(PartitionSpec() for _ in whole))
    # No gradient is taken of what is called here, so nothing is checked for one.
    on_each = jax.shard_map(
        function, in_specs=specs, out_specs=rows, axis_names={*axes, *_TAKEN.get()}, check_vma=False
    )
    return on_each(*arrays, *whole)


def reshape(X: Array, shape: tuple[int, ...]) -> Array:
    """X in another shape of the same axis 0, which devices go on to share; they share no other."""
    if not is_shared(X):
        return X.reshape(shape)
    mesh, spec = jax.typeof(X).sharding.mesh, jax.typeof(X).sharding.spec
    return jnp.reshape(X, shape, out_sharding=NamedSharding(mesh, PartitionSpec(spec[0])))


def beside(X: Array, other: Array) -> Array:
    """X, which every device has whole, shared as another array is along the axes as long as its."""
    if not is_shared(other):
        return X
    mesh, spec = jax.typeof(other).sharding.mesh, jax.typeof(other).sharding.spec
    lengths = zip(spec, X.shape, other.shape, strict=True)
    spec = PartitionSpec(*(axis if length == theirs else None for axis, length, theirs in lengths))
    return jax.sharding.reshard(X, NamedSharding(mesh, spec))
