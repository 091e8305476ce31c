"""MSSA's attention for TPUs: kernels in Pallas, by way of Mosaic.

No score is ever in the TPU's main memory, and nothing is copied to another layout: the kernels read
and write tokens as the projections do. How they work: `crate_jax.models.tpu_programs`.
The letters are those of `crate_jax.models.layers`; s = p^{-1/2}. Of each row of scores, S = s V Vᵀ,
the largest is kept, and the sum of e^(S − largest). Inside of a kernel scores are V Vᵀ.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from crate_jax import placement
from crate_jax.models.kernels import from_natural, like, to_natural
from crate_jax.models.tpu_programs import (
    LONGEST,
    Group,
    attend_rows,
    gradient_rows,
    precision,
)

# The share of a core's own memory for a program: three quarters, of TPU v4 all but 2 MiB.
_MEBIBYTES = {"TPU v5 lite": 96, "TPU v5": 48, "TPU v5p": 48, "TPU v6 lite": 96}
_MEBIBYTES |= {"TPU v5e": 96, "TPU v6e": 96, "TPU7": 48, "TPU7x": 48}
_LEAST = 14  # of TPU v4, whose cores have 16, and taken for granted of any other

OLDEST = 4  # generation of the TPUs for which Mosaic compiles


def is_new_enough() -> bool:
    """True if the TPUs of the mesh around run the kernels, or if there are none."""
    found = re.match(r"TPU v(\d+)", placement.device_kind())
    return not found or int(found[1]) >= OLDEST


def takes(V_BxNxKxp: Array) -> bool:
    """True if the kernels take such tokens: bfloat16 or float32, of an image that fits.

    And of float32 only where products have one pass or all, by `jax_default_matmul_precision`.
    """
    _, N, K, p = V_BxNxKxp.shape
    if V_BxNxKxp.dtype not in (jnp.bfloat16, jnp.float32) or not 1 < N <= LONGEST or K * p == 1:
        return False
    if precision(V_BxNxKxp.dtype) is None:
        return False
    return _memory(V_BxNxKxp) <= _allowed()


def _allowed() -> int:
    return _MEBIBYTES.get(placement.device_kind(), _LEAST) * 2**20


def _limit(V_BxNxKxp: Array) -> int:
    """The memory that the compiler may use: twice its need, if there is as much."""
    return min(2 * _memory(V_BxNxKxp), _allowed())


def _memory(V_BxNxKxp: Array) -> int:
    """Bytes of a core's own memory that a program takes in either direction, rather too many.

    V, dO, dV and two numbers for each row of scores are there twice, as the next image's are
    fetched meanwhile. Three of a group are there transposed. Of the group's blocks of scores the
    compiler has as many at a time as was found by the least memory that it gets by with.
    """
    _, N, K, p = V_BxNxKxp.shape
    group, number = Group(N, K, p), V_BxNxKxp.dtype.itemsize
    moved = 3 * _padded(N, K * p, number) + 2 * group.count * _padded(group.size, N, 4)
    transposed = 2 * _padded(group.lanes, N, number) + _padded(group.lanes, N, 4)
    at_a_time = 2.2 if group.whole else 3
    if precision(V_BxNxKxp.dtype) == jax.lax.Precision.HIGHEST:
        at_a_time += 3 if group.whole else 4  # the parts of both factors
    scores = group.size * _padded(group.block, group.block, 4)
    return 2 * moved + transposed + int(at_a_time * scores) + 2**18


def _padded(rows: int, columns: int, number: int) -> int:
    """Bytes of an array in a core's memory, where numbers of so many bytes lie in tiles.

    A tile is 8 x 128 words of four bytes; two rows of bfloat16 share a word.
    """
    return number * pl.cdiv(rows, 32 // number) * (32 // number) * pl.cdiv(columns, 128) * 128


def attend(V_BxNxKxp: Array, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """O = softmax(s V Vᵀ) V in every subspace, and the saved numbers of the scores.

    Args:
        V_BxNxKxp: tokens that the kernel `takes`. The softmax and all sums are float32.
        interpret: run on any device, slowly.

    Returns:
        O (B, N, K, p) of V's dtype; of each row of scores the largest, max S, and the sum of
        e^(S − max S), (B, K, N) float32.
    """
    kinds = ("tokens", "rows", "rows")
    O_BxNxKxp, largest, total = _over_images(attend_rows, "attend", (V_BxNxKxp,), kinds, interpret)
    return O_BxNxKxp, *to_natural(largest, total, V_BxNxKxp.shape[-1] ** -0.5)


def attend_backward(
    V_BxNxKxp: Array,
    largest_BxKxN: Array,
    total_BxKxN: Array,
    dO_BxNxKxp: Array,
    *,
    interpret: bool = False,
) -> Array:
    """The gradient dV = Aᵀ dO + s (dS + dSᵀ) V; A and S are computed again from V.

    dS = A (dA − δ) with dA = dO Vᵀ and δ = Σ A dA, row by row.

    Args:
        V_BxNxKxp: see `attend`.
        largest_BxKxN: of `attend`.
        total_BxKxN: of `attend`.
        dO_BxNxKxp: the gradient of O.
        interpret: see `attend`.

    Returns:
        dV (B, N, K, p), of V's dtype.
    """
    own_BxKxN = from_natural(largest_BxKxN, V_BxNxKxp.shape[-1] ** -0.5)
    inputs = (V_BxNxKxp, own_BxKxN, total_BxKxN, dO_BxNxKxp)
    (dV,) = _over_images(gradient_rows, "attend_backward", inputs, ("tokens",), interpret)
    return dV


def _over_images(
    kernel: Callable[..., None],
    name: str,
    inputs: tuple[Array, ...],
    outputs: tuple[str, ...],
    interpret: bool,
) -> list[Array]:
    """A kernel for every image.

    Args:
        kernel: from `Group` and the references of one image to nothing; the last are scratch.
        name: under which a profiler shows it.
        inputs: tokens (B, N, K, p), the first of which gives the sizes, or a number a row
            (B, K, N).
        outputs: which of the two each is.
        interpret: see `attend`.
    """
    V = inputs[0]
    B, N, K, p = V.shape
    group = Group(N, K, p)
    # (group.count, group.size, N) and not (K, N): a TPU slices the second last axis in eights.
    shapes = {"tokens": (B, N, K * p), "rows": (B, group.count, group.size, N)}
    dtypes = {"tokens": V.dtype, "rows": jnp.float32}

    def spec(kind: str) -> pl.BlockSpec:
        rest = shapes[kind][1:]
        return pl.BlockSpec((None, *rest), lambda b: (b, *(0 for _ in rest)))

    taken = ["tokens" if x.ndim == 4 else "rows" for x in inputs]
    transposed = [tpu.VMEM((group.lanes, N), V.dtype) for kind in taken if kind == "tokens"]
    made = pl.pallas_call(
        functools.partial(kernel, group),
        grid=(B,),
        in_specs=[spec(kind) for kind in taken],
        out_specs=[spec(kind) for kind in outputs],
        out_shape=[like(V, shapes[kind], dtypes[kind]) for kind in outputs],
        scratch_shapes=[*transposed, tpu.VMEM((group.lanes, N), jnp.float32)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_limit(V)
        ),
        interpret=interpret,
        name=name,
    )(*(x.reshape(shapes[kind]) for x, kind in zip(inputs, taken, strict=True)))
    whole = {"tokens": V.shape, "rows": (B, K, N)}
    return [x.reshape(whole[kind]) for x, kind in zip(made, outputs, strict=True)]
