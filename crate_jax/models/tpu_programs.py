"""The programs of the TPU kernels of MSSA's attention, and their groups of subspaces.

A program has the tokens of one image in the core's own memory, as the projection wrote them:
(N, K p). It takes a few subspaces at a time. Their scores are computed with the rows of A as
columns: the softmax goes along the first axis, what is one number a row lies along the lanes, as it
is kept, and the attended tokens come out as (p, N), in which the subspaces are apart. No score
leaves that memory. Beyond `_WHOLE` tokens the scores are computed in blocks of both axes.

The matrix unit takes 128 lanes at a time, and a subspace has some of them. So its first factor is
all the lanes around it, and its second factor has zeros there.

Each stage of a program is written for all subspaces of a group before the next one: the compiler
goes by that order, and takes the softmax of one while the matrix unit has the scores of another.
The letters are those of `crate_jax.models.layers`, s = p^{-1/2}; a t behind one is for transposed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

_LOG2E = math.log2(math.e)  # a TPU has 2^x alone
_LANES = 128
_AT_ONCE, _FEW = 4, 320  # subspaces, of up to so many tokens
_WHOLE = 640  # tokens whose scores are one block
_BLOCKS = (512, 640, 384)  # tokens of a block otherwise: the first that leaves no block of one

LONGEST = 4096  # tokens, up to which one of those does


class Group:
    """The subspaces of an image that are computed together, and the blocks of their scores.

    Attributes:
        N: tokens.
        p: dimensions of a subspace.
        whole: whether the scores are one block.
        block: tokens of a block.
        size: subspaces of a group. Their lanes begin at a multiple of 128, or they are all.
        count: groups.
        lanes: of a group.
        to_base_2: s log₂ e.
    """

    def __init__(self, N: int, K: int, p: int):
        self.N, self.p, self.whole = N, p, N <= _WHOLE
        self.block = N if self.whole else next((n for n in _BLOCKS if N % n != 1), 512)
        least = _LANES // math.gcd(p, _LANES)
        most = _AT_ONCE if N <= _FEW else least
        sizes = [n for n in range(least, max(least, most) + 1, least) if K % n == 0]
        self.size = max(sizes, default=K)
        self.count, self.lanes = K // self.size, self.size * p
        self.to_base_2 = p**-0.5 * _LOG2E

    def each(self, body: Callable[[Array | int, Any], None]) -> None:
        """Call a function of the number of a group and its place among an image's lanes."""
        if self.count == 1:
            return body(0, slice(None))

        def step(i: Array, _: None) -> None:
            body(i, pl.ds(pl.multiple_of(i * self.lanes, _LANES), self.lanes))

        return jax.lax.fori_loop(0, self.count, step, None)

    def blocks(self, body: Callable[[Any, Any], Any], start: Any = None) -> Any:
        """Fold a function of the place of a block of tokens and a carry over all blocks.

        Where there is one block, the carry is None.
        """
        if self.whole:
            return body(slice(None), None)

        size = self.block

        def step(i: Array, carry: Any) -> Any:
            return body(pl.ds(pl.multiple_of(i * size, size), size), carry)

        full, rest = divmod(self.N, size)
        carry = jax.lax.fori_loop(0, full, step, start)
        return body(pl.ds(full * size, rest), carry) if rest else carry

    def own(self, k: int) -> slice:
        """The lanes of a subspace among those of the group."""
        return slice(k * self.p, (k + 1) * self.p)

    def power(self, differences: Array) -> Array:
        """e^(s differences)."""
        return jnp.exp2(differences * self.to_base_2)

    def product(self, rows: Array, columns_ref: Any, at: Any, k: int) -> Array:
        """Tokens of a subspace times tokens of it, (n, m) of (n, lanes) and (lanes, m)."""
        own = self.own(k)
        first = own.start // _LANES * _LANES
        last = min(pl.cdiv(own.stop, _LANES) * _LANES, self.lanes)
        X = columns_ref[own, at]
        parts = [jnp.zeros((n, X.shape[1]), X.dtype) for n in (own.start - first, last - own.stop)]
        X = jnp.concatenate([x for x in (parts[0], X, parts[1]) if x.shape[0]])
        return _product(rows[:, first:last], X, 1, 0)


def attend_rows(
    group: Group,
    V_ref: Any,
    O_ref: Any,
    largest_ref: Any,
    total_ref: Any,
    Vt_ref: Any,
    Ot_ref: Any,
) -> None:
    """Softmax and product; what came before is scaled when a block has a larger score."""
    subspaces = range(group.size)

    def of_group(i: Array | int, lanes: Any) -> None:
        Vt_ref[...] = V_ref[:, lanes].T

        def of_columns(at: Any, carry: None) -> None:
            def add(rows: Any, before: Any) -> Any:
                V = V_ref[rows, lanes]
                S = [group.product(V, Vt_ref, at, k) for k in subspaces]
                largest = [S[k].max(0, keepdims=True) for k in subspaces]
                if before:
                    largest = [jnp.maximum(largest[k], before[k][0]) for k in subspaces]
                E = [group.power(S[k] - largest[k]) for k in subspaces]
                total = [E[k].sum(0, keepdims=True) for k in subspaces]
                E = [E[k].astype(V.dtype) for k in subspaces]
                Ot = [_product(Vt_ref[group.own(k), rows], E[k], 1, 0) for k in subspaces]
                if before:
                    scale = [group.power(before[k][0] - largest[k]) for k in subspaces]
                    total = [total[k] + before[k][1] * scale[k] for k in subspaces]
                    Ot = [Ot[k] + before[k][2] * scale[k] for k in subspaces]
                return list(zip(largest, total, Ot, strict=True))

            width = largest_ref[i, :1, at].shape[1]
            rows_of = [jnp.zeros((n, width), jnp.float32) for n in (1, 1, group.p)]
            start = [(rows_of[0] - jnp.inf, rows_of[1], rows_of[2]) for _ in subspaces]
            for k, (largest, total, Ot) in enumerate(group.blocks(add, start)):
                largest_ref[i, k : k + 1, at] = largest
                total_ref[i, k : k + 1, at] = total
                Ot_ref[group.own(k), at] = Ot / total

        group.blocks(of_columns)
        O_ref[:, lanes] = Ot_ref[...].T.astype(O_ref.dtype)

    group.each(of_group)


def gradient_rows(
    group: Group, V_ref: Any, largest_ref: Any, total_ref: Any, dO_ref: Any, dV_ref: Any,
    Vt_ref: Any, dOt_ref: Any, dVt_ref: Any,
) -> None:  # fmt: skip
    """A and dA block by block; of several blocks twice, since a block of dS needs all of its δ."""
    subspaces, s = range(group.size), group.p**-0.5

    def of_group(i: Array | int, lanes: Any) -> None:
        Vt_ref[...] = V_ref[:, lanes].T
        dOt_ref[...] = dO_ref[:, lanes].T
        if not group.whole:
            dVt_ref[...] = jnp.zeros(dVt_ref.shape, jnp.float32)

        def of_columns(at: Any, carry: None) -> None:
            largest = [largest_ref[i, k : k + 1, at] for k in subspaces]
            inverse = [1 / total_ref[i, k : k + 1, at] for k in subspaces]

            def attention(rows: Any) -> tuple[list[Array], list[Array]]:
                V = V_ref[rows, lanes]
                S = [group.product(V, Vt_ref, at, k) for k in subspaces]
                dA = [group.product(V, dOt_ref, at, k) for k in subspaces]
                return [group.power(S[k] - largest[k]) * inverse[k] for k in subspaces], dA

            def sums(A: list[Array], dA: list[Array]) -> list[Array]:
                return [(A[k] * dA[k]).sum(0, keepdims=True) for k in subspaces]

            def add_sums(rows: Any, before: list[Array]) -> list[Array]:
                return [a + b for a, b in zip(before, sums(*attention(rows)), strict=True)]

            def add(rows: Any, deltas: list[Array] | None) -> list[Array]:
                A, dA = attention(rows)
                deltas = deltas or sums(A, dA)
                dS = [(A[k] * (dA[k] - deltas[k])).astype(V_ref.dtype) for k in subspaces]
                for k in subspaces:
                    own = group.own(k)
                    of_at = _product(Vt_ref[own, rows], dS[k], 1, 0) * s
                    of_rows = _product(Vt_ref[own, at], dS[k], 1, 1) * s
                    of_rows += _product(dOt_ref[own, at], A[k].astype(V_ref.dtype), 1, 1)
                    if group.whole:
                        dVt_ref[own] = of_at + of_rows
                    else:
                        dVt_ref[own, at] += of_at
                        dVt_ref[own, rows] += of_rows
                return deltas

            zeros = [jnp.zeros_like(x) for x in largest]
            group.blocks(add, None if group.whole else group.blocks(add_sums, zeros))

        group.blocks(of_columns)
        dV_ref[:, lanes] = dVt_ref[...].T.astype(dV_ref.dtype)

    group.each(of_group)


def _product(X: Array, Y: Array, axis_of_X: int, axis_of_Y: int) -> Array:
    """The sum over an axis of each, added up in float32."""
    axes = (((axis_of_X,), (axis_of_Y,)), ((), ()))
    return jax.lax.dot_general(
        X, Y, axes, precision=precision(X.dtype), preferred_element_type=jnp.float32
    )


def precision(dtype: Any) -> jax.lax.Precision | None:
    """The precision of products of a dtype, as JAX is set; None if Mosaic has none like it."""
    asked = jax.config.values["jax_default_matmul_precision"]
    if dtype == jnp.bfloat16 or asked in (None, "default", "fastest", "bfloat16"):
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST if asked in ("highest", "float32") else None
