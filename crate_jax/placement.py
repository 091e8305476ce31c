"""Arrays whose type says how they lie on a mesh: its Explicit axes, `jax.make_mesh`'s default.

JAX refuses a reshape that merges or splits an axis which devices share, and a product whose result
two axes would share. On other meshes everything here is what it would be without them.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec


def is_shared(X: Array) -> bool:
    """Whether devices share an axis of X, by its type."""
    return any(axis is not None for axis in jax.typeof(X).sharding.spec)


def whole(X: Array) -> Array:
    """X on every device; its gradient is dealt out as X was."""
    if not is_shared(X):
        return X
    return jax.sharding.reshard(X, NamedSharding(jax.typeof(X).sharding.mesh, PartitionSpec()))


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
