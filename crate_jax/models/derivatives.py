"""Attention and LayerNorm as plain functions, and LayerNorm with a backward pass written out.

That of attention is in `crate_jax.models.attention`. The written passes equal automatic
differentiation and cost less: they keep one array where it keeps two or three. Only reverse mode
knows them.
A gradient is of the type of what it belongs to: of its dtype, and equal on the devices of a
`jax.shard_map` on which that is equal. The letters are those of `crate_jax.models.layers`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models import gpu, gpu_norm

# The kinds of a model's backward pass: "derived", written out; "autodiff", from JAX.
BACKWARD = ("derived", "autodiff")


def wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype of norms, scores and softmax: float32, and float64 for float64 alone."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def plain(number: float) -> float:
    """A number that does not change the dtype of arrays, as NumPy's numbers do."""
    return number.item() if isinstance(number, np.generic) else number


def attend(
    V_BxKxNxp: Array, mask: Array | None = None, seen_BxKxMxp: Array | None = None
) -> tuple[Array, Array]:
    """Softmax attention of tokens to each other: A = softmax(p^{-1/2} V Vᵀ) and A V.

    Scores and softmax are of dtype `wide`.

    Args:
        V_BxKxNxp: tokens in K subspaces, attended in each of them apart.
        mask: True where token n (the last axis but one) may see token m (the last axis); it
            broadcasts to (B, K, N, M). None: every token sees all.
        seen_BxKxMxp: the tokens that are seen; None: V itself, so that M = N.

    Returns:
        A V (B, K, N, p) and A (B, K, N, M), whose rows sum to one; both of the input's dtype.
    """
    W_BxKxMxp = V_BxKxNxp if seen_BxKxMxp is None else seen_BxKxMxp
    product = functools.partial(jnp.einsum, preferred_element_type=wide(V_BxKxNxp.dtype))
    S_BxKxNxM = product("bknp,bkmp->bknm", V_BxKxNxp, W_BxKxMxp) * V_BxKxNxp.shape[-1] ** -0.5
    if mask is not None:
        S_BxKxNxM = jnp.where(mask, S_BxKxNxM, -jnp.inf)
    A_BxKxNxM = jax.nn.softmax(S_BxKxNxM, axis=-1).astype(V_BxKxNxp.dtype)
    A_BxKxNxM = checkpoint_name(A_BxKxNxM, "attention")
    return jnp.einsum("bknm,bkmp->bknp", A_BxKxNxM, W_BxKxMxp), A_BxKxNxM


def normalise(X: Array, scale_d: Array, bias_d: Array, dtype: DTypeLike, epsilon: float) -> Array:
    """LayerNorm over the last axis, computed in the dtype `wide` of the tokens.

    Args:
        X: (…, d), any float dtype.
        scale_d: any float dtype.
        bias_d: any float dtype.
        dtype: the dtype of the result.
        epsilon: added to the variance.

    Returns:
        (X − mean) / √(variance + epsilon) · scale + bias, of X's shape.
    """
    return _normalise_and_keep(X, scale_d, bias_d, dtype, epsilon)[0]


def _normalise_and_keep(X: Array, scale_d: Array, bias_d: Array, dtype: DTypeLike, epsilon: float):
    mean = jnp.mean(X.astype(wide(X.dtype)), axis=-1, keepdims=True)
    centred = X.astype(mean.dtype) - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    mean, inverse = checkpoint_name((mean, inverse), "statistics")
    Y = (centred * (inverse * _row(scale_d, centred)) + _row(bias_d, centred)).astype(dtype)
    return Y, (X, mean, inverse, scale_d, bias_d)


def _normalise_backward(
    dtype: DTypeLike, epsilon: float, kept: tuple[Array, Array, Array, Array, Array], dY: Array
):
    X, mean, inverse, scale_d, bias_d = kept
    inputs = (X, mean, inverse, dY, scale_d)
    half = X.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and X.size > 0 and X.shape[-1] <= gpu_norm.LONGEST_ROW and gpu.is_new_enough()
    if fits and placement.rows_over(X) is not None:
        dX, dscale, dbias = _normalise_backward_by_platform(*inputs)
    else:
        dX, dscale, dbias = _normalise_backward_by_xla(*inputs)
    return of_type(dX, X), of_type(dscale, scale_d), of_type(dbias, bias_d)


def _normalise_backward_by_xla(X: Array, mean: Array, inverse: Array, dY: Array, scale_d: Array):
    """With X̂ = (X − mean)/σ and g = dY · scale: dX = (g − mean(g) − X̂ mean(g X̂))/σ."""
    dY = dY.astype(mean.dtype)
    standard = (X.astype(mean.dtype) - mean) * inverse
    g = dY * _row(scale_d, dY)
    along = functools.partial(jnp.mean, axis=-1, keepdims=True)
    dX = inverse * (g - along(g) - standard * along(g * standard))
    rows = tuple(range(X.ndim - 1))
    return dX.astype(X.dtype), jnp.sum(dY * standard, axis=rows), jnp.sum(dY, axis=rows)


def _normalise_backward_on_gpu(X: Array, mean: Array, inverse: Array, dY: Array, scale_d: Array):
    found = placement.by_rows(gpu_norm.normalise_backward, X, mean, inverse, dY, whole=(scale_d,))
    dX, dscale, dbias = found
    return dX, dscale.sum(0), dbias.sum(0)


def of_type(gradient: Array, argument: Array) -> Array:
    """The gradient in the type of its array, as `jax.custom_vjp` has to return it.

    In a `jax.shard_map` an argument may be one and the same along axes of the mesh along which the
    gradient still varies, since each device knows its own rows alone: their sum is the gradient.
    """
    axes = jax.typeof(gradient).mat.varying - jax.typeof(argument).mat.varying
    if axes:
        gradient = jax.lax.psum(gradient, tuple(sorted(axes)))
    return gradient.astype(argument.dtype)


def _row(values_d: Array, X: Array) -> Array:
    """Values along the last axis, with as many axes as X, of its dtype."""
    return values_d.reshape((1,) * (X.ndim - 1) + values_d.shape).astype(X.dtype)


@jax.custom_vjp
def _normalise_backward_by_platform(*inputs: Array):
    return jax.lax.platform_dependent(
        *inputs, cuda=_normalise_backward_on_gpu, default=_normalise_backward_by_xla
    )


# A kernel has no derivative; where somebody differentiates a gradient, XLA's function stands in.
_normalise_backward_by_platform.defvjp(
    lambda *inputs: (_normalise_backward_by_platform(*inputs), inputs),
    lambda inputs, of_results: jax.vjp(_normalise_backward_by_xla, *inputs)[1](of_results),
)

_normalise = jax.custom_vjp(normalise, nondiff_argnums=(3, 4))
_normalise.defvjp(_normalise_and_keep, _normalise_backward)
NORMALISE = {"derived": _normalise, "autodiff": normalise}
