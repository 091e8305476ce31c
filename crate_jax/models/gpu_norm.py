"""The gradient of a LayerNorm for NVIDIA GPUs: a kernel in Pallas, by way of Triton."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crate_jax.models.gpu import upto
from crate_jax.models.kernels import like

LONGEST_ROW = 4096  # d, of which a row and two rows of sums fit into registers
_PROGRAMS = 1056  # eight for each of an H100's multiprocessors


def normalise_backward(
    X: Array, mean: Array, inverse: Array, dY: Array, scale_d: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """The gradients of a LayerNorm; see `crate_jax.models.derivatives.normalise`.

    Each program takes every so many-th row and adds up its part of the sums over all rows, where
    XLA reads the tokens once more for these.

    Args:
        X: (…, d), any float dtype, d up to `LONGEST_ROW`.
        mean: (…, 1), float32.
        inverse: 1/σ, likewise.
        dY: (…, d), any float dtype.
        scale_d: any float dtype.
        interpret: see `attend`.

    Returns:
        dX of X's dtype, and the sums over the programs' rows, (programs, d) float32, whose sums are
        the gradients of the scale and the bias.
    """
    d = X.shape[-1]
    rows = math.prod(X.shape[:-1])
    programs = max(1, min(_PROGRAMS, rows))
    sums = like(dY, (programs, d), jnp.float32)
    apart = tuple(jax.typeof(dY).mat.varying - jax.typeof(scale_d).mat.varying)
    scale_d = jax.lax.pcast(scale_d.astype(jnp.float32), apart, to="varying")
    dX, dscale, dbias = pl.pallas_call(
        functools.partial(_normalise_rows, rows, d, programs),
        grid=(programs,),
        out_shape=[like(dY, (rows, d), X.dtype), sums, sums],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="normalise_backward",
    )(X.reshape(rows, d), mean.reshape(rows), inverse.reshape(rows), dY.reshape(rows, d), scale_d)
    return dX.reshape(X.shape), dscale, dbias


def _normalise_rows(
    rows: int, d: int, programs: int,
    X_ref: Any, mean_ref: Any, inverse_ref: Any, dY_ref: Any, scale_ref: Any,
    dX_ref: Any, dscale_ref: Any, dbias_ref: Any,
) -> None:  # fmt: skip
    """With X̂ = (X − mean)/σ and g = dY · scale: dX = (g − mean(g) − X̂ mean(g X̂))/σ."""
    program, at = pl.program_id(0), pl.ds(0, pl.next_power_of_2(d))
    there = upto(pl.next_power_of_2(d)) < d

    scale = triton.load(scale_ref.at[at], mask=there, other=0.0)

    def body(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        n = program + i * programs
        mask = there & (n < rows)

        def row(ref: Any) -> Array:
            return triton.load(ref.at[n, at], mask=mask, other=0.0).astype(jnp.float32)

        def number(ref: Any) -> Array:
            return triton.load(ref.at[n], mask=n < rows, other=0.0)

        dY, inverse = row(dY_ref), number(inverse_ref)
        standard, g = (row(X_ref) - number(mean_ref)) * inverse, dY * scale
        dX = inverse * (g - jnp.sum(g) / d - standard * (jnp.sum(g * standard) / d))
        triton.store(dX_ref.at[n, at], dX.astype(dX_ref.dtype), mask=mask)
        return sums[0] + dY * standard, sums[1] + dY

    none = jnp.zeros(there.shape, jnp.float32)
    dscale, dbias = jax.lax.fori_loop(0, pl.cdiv(rows, programs), body, (none, none))
    triton.store(dscale_ref.at[program, at], dscale, mask=there)
    triton.store(dbias_ref.at[program, at], dbias, mask=there)
