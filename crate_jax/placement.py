"""How arrays lie on the mesh around a function: weights gathered, shared axes left as they are.

Of Explicit axes, `jax.make_mesh`'s default, the type of an array says which devices share which
axis. JAX refuses to merge or split a shared axis, and a product in whose result the same devices
would share two. Where no axis is shared, everything here leaves the program as it is.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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
