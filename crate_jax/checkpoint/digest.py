"""Fingerprints of arrays, to find the bytes that changed between a save and a restore."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from crate_jax.parallel import PyTree

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digest(tree: PyTree) -> dict[str, int]:
    """A 32-bit fingerprint of every array of a tree, by its path.

    Each element's bits are mixed with its place by a map that is one-to-one (MurmurHash3's
    finaliser), and the results are added modulo 2³²: one changed element always shows, many go
    unseen once in four billion times. The sum does not depend on how an array is laid out on
    devices; each of them reads its own share.

    Args:
        tree: of arrays, on devices or not; 64 bits count as two elements of 32.

    Returns:
        {"params/head/bias": fingerprint}, on the host; the same on every process.
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    paths = [path_of(path) for path, _ in leaves]
    found = np.asarray(_fingerprints([_halved(leaf) for _, leaf in leaves]))
    return dict(zip(paths, found.tolist(), strict=True))


def path_of(keys: tuple[Any, ...]) -> str:
    """The name of a leaf, such as ``params/head/bias``, whatever containers it is in."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def changed(tree: PyTree, expected: dict[str, int]) -> list[str]:
    """Paths of the arrays whose fingerprint is not the expected one.

    Args:
        tree: the tree of `digest`, or a part of it under the same paths.
        expected: what `digest` gave.
    """
    return [path for path, value in digest(tree).items() if expected.get(path) != value]


def _halved(leaf: ArrayLike) -> ArrayLike:
    """An array on the host of 64 bits an element as one of 32, which JAX takes in any mode."""
    if isinstance(leaf, Array) or (host := np.asarray(leaf)).itemsize < 8:
        return leaf
    return host[..., None].view(np.uint32)


@jax.jit
def _fingerprints(leaves: list[Array]) -> Array:
    return jnp.stack([_fingerprint(leaf) for leaf in leaves])


def _fingerprint(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:  # with another axis, of the halves, the low one first
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, _UINT[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # not by reshaping, which would gather what is sharded
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h = bits ^ (place * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> jnp.uint32(16)), dtype=jnp.uint32)
