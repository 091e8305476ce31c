"""The layout of arrays on the mesh around a function: weights gathered, shared axes left alone.

Of Explicit axes, `jax.make_mesh`'s default, the type of an array says which devices share which
axis. JAX refuses to merge or split a shared axis, and a product in whose result the same devices
would share two. Where no axis is shared, everything here leaves the program as it is.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Result = TypeVar("_Result")
_TAKEN: ContextVar[frozenset[str]] = ContextVar("_TAKEN", default=frozenset())


def platform() -> str:
    """For what a function is traced, "cpu", "gpu" or "tpu": the devices of the mesh around it.

    JAX's default where there is none. It is for speed alone: a program may be lowered for another
    platform than it was traced for, and is right there too.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """JAX's name of the devices of the mesh around a function, or of its own without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def is_shared(X: Array) -> bool:
    """True if devices share an axis of X, by its type."""
    return any(axis is not None for axis in jax.typeof(X).sharding.spec)


def whole(X: Array) -> Array:
    """X gathered over the axes of its type; its gradient is shared out again, as X was."""
    if not is_shared(X):
        return X
    return jax.sharding.reshard(X, NamedSharding(jax.typeof(X).sharding.mesh, PartitionSpec()))


def share_of_fsdp(name: str, shape: tuple[int, ...], n: int) -> PartitionSpec:
    """The axis of a parameter that ``fsdp`` splits, by one rule of names and shapes.

    That is the shortest of two or more axes that n devices can share evenly. The longest lies
    innermost on a TPU, where its shares are seldom whole tiles, and the compiler then adds up the
    whole gradient on every device and cuts it up afterwards. Biases and scales, which cost more to
    gather than they save, are not split.

    Args:
        name: its last name.
        shape: of one layer.
        n: the size of ``fsdp``.

    Returns:
        Empty for one that is not split.
    """
    is_bias = name.startswith("b_")  # that of a map with heads has more axes
    if n > 1 and len(shape) >= 2 and not is_bias:
        for axis in sorted(range(len(shape)), key=lambda i: shape[i]):
            if shape[axis] % n == 0:
                return PartitionSpec(*["fsdp" if i == axis else None for i in range(len(shape))])
    return PartitionSpec()


def whole_of_fsdp(name: str, X: Array) -> Array:
    """A parameter gathered over an Auto axis ``fsdp``; as it is where no such axis is around it.

    Its gradient is split again as the parameter is: left to itself the compiler would add up the
    whole of it on every device. `crate_jax.parallel.on_mesh` puts the axis around a function.
    """
    if not are_weights_split():
        return X
    size = jax.sharding.get_abstract_mesh().shape["fsdp"]
    return _gathered(X, share_of_fsdp(name, X.shape, size))


def are_weights_split() -> bool:
    """True if an Auto axis ``fsdp`` of more than one device is around."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return types.get("fsdp") is AxisType.Auto and mesh.shape["fsdp"] > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(X: Array, share: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(X, PartitionSpec())


_gathered.defvjp(
    lambda X, share: (_gathered(X, share), None),
    lambda share, _, dX: (jax.lax.with_sharding_constraint(dX, share),),
)


@contextlib.contextmanager
def rows_within(axis: str) -> Iterator[None]:
    """Around what is mapped over an axis of the mesh already: examples lie on the others alone."""
    token = _TAKEN.set(_TAKEN.get() | {axis})
    try:
        yield
    finally:
        _TAKEN.reset(token)


def rows_over(X: Array) -> tuple[str, ...] | None:
    """The axes of the mesh over which the rows of X, its axis 0, are spread; () if none is.

    None: a function of rows cannot be split here. The rows cannot be dealt out evenly, another axis
    of X is shared, or the mesh has axes of which nobody knows what they spread.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = [axis for axis in types if types[axis] is AxisType.Auto and mesh.shape[axis] > 1]
    if is_shared(X):
        first, *others = jax.typeof(X).sharding.spec
        axes = first if isinstance(first, tuple) else (first,)
        alone = not auto and not any(others) and None not in axes
        return axes if alone else None
    partly_manual = 0 < list(types.values()).count(AxisType.Manual) < len(types)
    if partly_manual or not set(auto) <= {"data", "fsdp"}:
        return None
    axes = tuple(axis for axis in auto if axis not in _TAKEN.get())
    even = X.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
    return axes if even else None


def by_rows(
    function: Callable[..., _Result], *arrays: Array, whole: tuple[Array, ...] = ()
) -> _Result:
    """Call a function of arrays, so that each device computes its own rows, on axis 0.

    The compiler cannot split a kernel, and would gather what it takes.

    Args:
        function: to arrays, whose rows are put one device's after another's.
        *arrays: of as many rows each; of the first `rows_over` is not None.
        whole: arrays that it takes besides, which every device has whole.
    """
    axes, mesh = rows_over(arrays[0]) or (), jax.sharding.get_abstract_mesh()
    if mesh.empty:  # the type of an array knows its own
        mesh = jax.typeof(arrays[0]).sharding.mesh
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return function(*arrays, *whole)
    rows = PartitionSpec(axes) if axes else PartitionSpec()
    specs = (*(rows for _ in arrays), *(PartitionSpec() for _ in whole))
    # No gradient is taken of what is called here, so nothing is checked for one. A TPU's kernel
    # wants to be told of every axis, of those of one device too.
    on_each = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=rows,
        axis_names={*mesh.axis_names},
        check_vma=False,
    )
    return on_each(*arrays, *whole)


def may_be_of_one_device() -> bool:
    """True if a kernel is called correctly though nothing says how the devices share the arrays.

    Without a mesh around it a program may be for arrays that several devices share, which JAX says
    to nobody who is traced, and a TPU's kernel is an error then.
    """
    if not jax.sharding.get_abstract_mesh().empty or jax.default_backend() != "tpu":
        return True
    return jax.device_count() == 1


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


def after(X: Array, done: Array) -> Array:
    """X, but not before another array is computed.

    On a CPU a factorisation of many matrices waits, on a thread of JAX's, for work that it hands to
    the others. Two that run beside each other on two cores wait for ever, so what has several makes
    one come after the other. XLA drops a barrier too early; it keeps a product with zero, because
    that may be NaN.
    """
    return X + jnp.zeros((), X.dtype) * done.real.sum().astype(X.dtype)


def taken(table: Array, index: Array) -> Array:
    """Rows of a table, which every device has whole; the result is shared as the index is.

    An index beyond the table gives its nearest row.
    """
    if not is_shared(index):
        return jnp.take(table, index, axis=0, mode="clip")
    mesh, spec = jax.typeof(index).sharding.mesh, jax.typeof(index).sharding.spec
    rows = NamedSharding(mesh, PartitionSpec(*spec, *(None,) * (table.ndim - 1)))
    return table.at[index].get(mode="clip", out_sharding=rows)
