"""MSSA's attention for NVIDIA GPUs: kernels in Pallas, by way of Triton.

A program of a kernel holds a few rows of the result in registers and reads the rest in pieces, so
that no score is ever in the GPU's memory. Triton's arrays have powers of two for lengths: what lies
beyond an array is masked, read as zero and never written.
The letters are those of `crate_jax.models.layers`; s = p^{-1/2}. Of each row of scores, S = s V Vᵀ,
the largest is kept, and the sum of e^(S − largest): apart, since the logarithm of the sum, added to
a large score, would lose digits. Inside of a kernel scores are S log₂ e. Sizes of blocks:
docs/performance.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crate_jax import placement
from crate_jax.models.kernels import from_natural, like, to_natural

_LOG2E = math.log2(math.e)  # a GPU has 2^x alone
_FEW = 256  # tokens whose scores with a block of rows fit into registers

LONGEST_SUBSPACE = 128  # p, of which a block of rows fits into registers
OLDEST = 8.0  # compute capability of the GPUs for which Triton has bfloat16; tried on 9.0 alone


def is_new_enough() -> bool:
    """True if the GPUs of the mesh around run the kernels, or if no such GPUs are here.

    A mesh says what they are called, and not how old they are: those here do, which are called so.
    """
    if placement.platform() != "gpu" or jax.default_backend() != "gpu":
        return True
    alike = [x for x in jax.devices() if x.device_kind == placement.device_kind()]
    try:
        return all(float(x.compute_capability) >= OLDEST for x in alike)
    except (AttributeError, ValueError):  # of another maker
        return False


def attend(V_BxNxKxp: Array, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """O = softmax(s V Vᵀ) V in every subspace, and the saved numbers of the scores.

    Args:
        V_BxNxKxp: bfloat16 or float16, p up to `LONGEST_SUBSPACE`. Products are added up, and the
            softmax is taken, in float32.
        interpret: run on any device, slowly.

    Returns:
        O (B, N, K, p) of V's dtype; of each row of scores the largest, max S, and the sum of
        e^(S − max S), (B, K, N) float32.
    """
    N = V_BxNxKxp.shape[1]
    # Rows of the result, and of what they are multiplied with; warps, and stages of the pipeline.
    sizes = (64, _FEW, 4, 1) if N <= _FEW else (64, 64, 4, 3)
    kinds = ("tokens", "row", "row")
    made = _over_groups(_attend_rows, "attend", sizes, (V_BxNxKxp,), kinds, interpret)
    O_BxNxKxp, largest_BxKxN, total_BxKxN = made
    return O_BxNxKxp, *to_natural(largest_BxKxN, total_BxKxN, 1 / _LOG2E)


def attend_backward(
    V_BxNxKxp: Array,
    largest_BxKxN: Array,
    total_BxKxN: Array,
    dO_BxNxKxp: Array,
    *,
    interpret: bool = False,
) -> Array:
    """The gradient dV = Aᵀ dO + s (dS + dSᵀ) V; A and S are computed again from V.

    dS = A (dA − δ) with dA = dO Vᵀ and δ = Σ A dA, row by row. A row of the result needs the δ of
    all rows, so δ is computed first, in a kernel of its own.

    Args:
        V_BxNxKxp: see `attend`.
        largest_BxKxN: of `attend`.
        total_BxKxN: of `attend`.
        dO_BxNxKxp: the gradient of O.
        interpret: see `attend`.

    Returns:
        dV (B, N, K, p), of V's dtype.
    """
    own_BxKxN = from_natural(largest_BxKxN, 1 / _LOG2E)
    inputs = (V_BxNxKxp, own_BxKxN, total_BxKxN, dO_BxNxKxp)
    (deltas,) = _over_groups(
        _delta_rows, "attend_deltas", (64, 64, 4, 3), inputs, ("row",), interpret
    )
    inputs = (*inputs, deltas)
    (dV,) = _over_groups(
        _gradient_rows, "attend_backward", (64, 32, 4, 3), inputs, ("tokens",), interpret
    )
    return dV


def _over_groups(
    rows: Callable[..., None],
    name: str,
    sizes: tuple[int, int, int, int],
    inputs: tuple[Array, ...],
    outputs: tuple[str, ...],
    interpret: bool,
) -> list[Array]:
    """A kernel for every block of rows, of every subspace, of every image.

    Args:
        rows: from the number of the block and the references of one subspace to nothing.
        name: under which a profiler shows it.
        sizes: rows of a block, rows that it reads at a time, warps, stages.
        inputs: tokens (B, N, K, p), the first of which gives the sizes, or a number a row
            (B, K, N).
        outputs: which of the two each is.
        interpret: see `attend`.
    """
    V = inputs[0]
    B, N, K, p = V.shape
    own, others, warps, stages = sizes
    specs = {
        "tokens": pl.BlockSpec((None, N, None, p), lambda i, b, k: (b, 0, k, 0)),
        "row": pl.BlockSpec((None, None, N), lambda i, b, k: (b, k, 0)),
    }
    made = {
        "tokens": like(V, V.shape, V.dtype),
        "row": like(V, (B, K, N), jnp.float32),
    }
    group = _Group(N, p, own, others)
    return pl.pallas_call(
        functools.partial(rows, group),
        grid=(pl.cdiv(N, own), B, K),
        in_specs=[specs["tokens" if x.ndim == 4 else "row"] for x in inputs],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[made[kind] for kind in outputs],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*inputs)


class _Group:
    """The tokens of one subspace of an image, in blocks of rows.

    Attributes:
        N: their number.
        p: their length.
        own: rows of a block of the result.
        others: rows that are read at a time.
    """

    def __init__(self, N: int, p: int, own: int, others: int):
        self.N, self.p, self.own, self.others = N, p, own, others
        self.to_base_2 = p**-0.5 * _LOG2E

    def rows(self, ref: Any, first: Array | int, count: int) -> Array:
        """Rows of tokens (count, p, to a power of two), or numbers (count,); zero beyond them."""
        there = first + upto(count) < self.N
        if len(ref.shape) == 1:
            return triton.load(ref.at[pl.ds(first, count)], mask=there, other=0.0)
        at, mask = self._place(first, count, there)
        return triton.load(ref.at[at], mask=mask, other=0.0)

    def write(self, ref: Any, first: Array | int, values: Array) -> None:
        """Write rows, except those beyond the tokens."""
        count = values.shape[0]
        there = first + upto(count) < self.N
        if values.ndim == 1:
            triton.store(ref.at[pl.ds(first, count)], values, mask=there)
        else:
            at, mask = self._place(first, count, there)
            triton.store(ref.at[at], values.astype(ref.dtype), mask=mask)

    def _place(self, first: Array | int, count: int, there: Array):
        length = max(16, pl.next_power_of_2(self.p))
        mask = there[:, None] & (upto(length) < self.p)[None]
        return (pl.ds(first, count), pl.ds(0, length)), mask

    def over_others(self, body: Callable[[Array | int, Any], Any], start: Any) -> Any:
        """Fold a function of the first row of a piece and a carry over all pieces."""
        pieces = pl.cdiv(self.N, self.others)
        if pieces == 1:
            return body(0, start)
        return jax.lax.fori_loop(0, pieces, lambda j, carry: body(j * self.others, carry), start)

    @property
    def zeros(self) -> Array:
        """One number for each row of a block."""
        return jnp.zeros(self.own, jnp.float32)


def _attend_rows(group: _Group, V_ref: Any, O_ref: Any, largest_ref: Any, total_ref: Any) -> None:
    """Softmax and product piece by piece; what came before is scaled when a larger score comes."""
    first = pl.program_id(0) * group.own
    W = group.rows(V_ref, first, group.own)

    def body(start: Array | int, carry: tuple[Array, Array, Array]):
        out, largest, total = carry
        other = group.rows(V_ref, start, group.others)
        S = _product(W, other.T) * group.to_base_2
        S = jnp.where((start + upto(group.others) < group.N)[None], S, -jnp.inf)
        new = jnp.maximum(largest, S.max(-1))
        scale, E = jnp.exp2(largest - new), jnp.exp2(S - new[:, None])
        out = out * scale[:, None] + _product(E.astype(other.dtype), other)
        return out, new, total * scale + E.sum(-1)

    start = (jnp.zeros(W.shape, jnp.float32), group.zeros - jnp.inf, group.zeros)
    out, largest, total = group.over_others(body, start)
    group.write(O_ref, first, out / total[:, None])
    group.write(largest_ref, first, largest)
    group.write(total_ref, first, total)


def _delta_rows(
    group: _Group, V_ref: Any, largest_ref: Any, total_ref: Any, dO_ref: Any, deltas_ref: Any
) -> None:
    first = pl.program_id(0) * group.own
    refs = (V_ref, dO_ref, largest_ref, total_ref)
    W, dO, largest, total = (group.rows(ref, first, group.own) for ref in refs)

    def body(start: Array | int, delta: Array) -> Array:
        other = group.rows(V_ref, start, group.others)
        E = jnp.exp2(_product(W, other.T) * group.to_base_2 - largest[:, None])
        return delta + (E * _product(dO, other.T)).sum(-1)  # dA is 0 beyond the tokens

    group.write(deltas_ref, first, group.over_others(body, group.zeros) / total)


def _gradient_rows(
    group: _Group,
    V_ref: Any,
    largest_ref: Any,
    total_ref: Any,
    dO_ref: Any,
    deltas_ref: Any,
    dV_ref: Any,
) -> None:
    """A_ij and A_ji come from the same score. Beyond the tokens V, dO and δ are 0, and so is dV."""
    refs = (V_ref, dO_ref, largest_ref, total_ref, deltas_ref)
    first = pl.program_id(0) * group.own
    W, dO, largest, total, deltas = (group.rows(ref, first, group.own) for ref in refs)

    def body(start: Array | int, dV: Array) -> Array:
        W_j, dO_j, largest_j, total_j, deltas_j = (
            group.rows(ref, start, group.others) for ref in refs
        )
        there = start + upto(group.others) < group.N
        S = _product(W, W_j.T) * group.to_base_2
        A = jnp.exp2(S - largest[:, None]) * (1 / total)[:, None]
        At = jnp.exp2(S - largest_j[None]) * jnp.where(there, 1 / total_j, 0.0)[None]
        both = A * (_product(dO, W_j.T) - deltas[:, None])
        both += At * (_product(W, dO_j.T) - deltas_j[None])
        dV += _product(At.astype(dO.dtype), dO_j)
        return dV + _product((both * group.p**-0.5).astype(W.dtype), W_j)

    start = jnp.zeros(W.shape, jnp.float32)
    group.write(dV_ref, first, group.over_others(body, start))


def upto(n: int) -> Array:
    """0 … n − 1, of 32 bits in any mode."""
    return jax.lax.iota(jnp.int32, n)


def _product(X: Array, Y: Array) -> Array:
    """X Y, added up in float32."""
    return jnp.dot(X, Y, preferred_element_type=jnp.float32)
