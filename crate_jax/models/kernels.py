"""Shared code of the kernels of GPUs and TPUs: types of results, and scores in one unit for all.

Inside of a kernel scores are in the unit that costs least there. What it keeps of them is natural,
so that any other kernel, and XLA's functions, can go on with it. The letters are those of
`crate_jax.models.layers`.
"""

from typing import Any

import jax
from jax import Array


def like(X: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape that varies along the axes of a `jax.shard_map` along which X does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(X).mat)


def to_natural(largest_BxKxN: Array, total_BxKxN: Array, unit: float) -> tuple[Array, Array]:
    """Each row's largest score, max S, and the sum of e^(S − max S), in natural units.

    The largest is rounded anew, and the sum makes up for it: scores of a hundred would else be off
    by 1e-5.

    Args:
        largest_BxKxN: in the unit of a kernel.
        total_BxKxN: of e^(S − max S).
        unit: S of a score of 1 in the kernel.
    """
    # Else the compiler would multiply the two factors, and find nothing to make up for.
    natural_BxKxN = jax.lax.optimization_barrier(largest_BxKxN * unit)
    left_BxKxN = (largest_BxKxN - from_natural(natural_BxKxN, unit)) * unit
    return natural_BxKxN, total_BxKxN * (1 + left_BxKxN)


def from_natural(largest_BxKxN: Array, unit: float) -> Array:
    """The largest of each row of scores, max S, in the unit of a kernel."""
    return largest_BxKxN * (1 / unit)
