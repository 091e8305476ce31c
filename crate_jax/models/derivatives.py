"""The parts of a layer whose backward pass is written out here, next to the plain functions.

The written passes equal automatic differentiation and cost less: they keep one array where it keeps
two or three, and use that a token is query, key and value at once. Only reverse mode knows them.
A gradient is of the type of what it belongs to: of its dtype, and equal on the devices of a
`jax.shard_map` on which that is equal. The letters are those of `crate_jax.models.layers`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

# How a model's backward pass is had: "derived", from this module; "autodiff", from JAX.
BACKWARD = ("derived", "autodiff")


def wide(dtype: DTypeLike) -> DTypeLike:
    """In what norms, scores and softmax are computed: float32, and float64 for float64 alone."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def plain(number: float) -> float:
    """A number that leaves arrays their dtype, as NumPy's do not."""
    return number.item() if isinstance(number, np.generic) else number


def attend(V_BxKxNxp: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Softmax attention of tokens to each other: A = softmax(p^{-1/2} V Vᵀ) and A V.

    Scores and softmax are of dtype `wide`.

    Args:
        V_BxKxNxp: tokens in K subspaces, attended in each of them apart.
        mask: True where token n (the last axis but one) may see token m (the last axis); it
            broadcasts to (B, K, N, N). None: every token sees all.

    Returns:
        A V (B, K, N, p) and A (B, K, N, N), whose rows sum to one; both of the input's dtype.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=wide(V_BxKxNxp.dtype))
    S_BxKxNxN = product("bknp,bkmp->bknm", V_BxKxNxp, V_BxKxNxp) * V_BxKxNxp.shape[-1] ** -0.5
    if mask is not None:
        S_BxKxNxN = jnp.where(mask, S_BxKxNxN, -jnp.inf)
    A_BxKxNxN = jax.nn.softmax(S_BxKxNxN, axis=-1).astype(V_BxKxNxp.dtype)
    A_BxKxNxN = checkpoint_name(A_BxKxNxN, "attention")
    return jnp.einsum("bknm,bkmp->bknp", A_BxKxNxN, V_BxKxNxp), A_BxKxNxN


def _attend_and_keep(V_BxKxNxp: Array, mask: Array | None = None):
    O_BxKxNxp, A_BxKxNxN = attend(V_BxKxNxp, mask)
    return (O_BxKxNxp, A_BxKxNxN), (V_BxKxNxp, A_BxKxNxN)


def _attend_backward(
    kept: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, None]:
    """The gradient dV = Aᵀ dO + (dS + dSᵀ) V; automatic differentiation has dS V and dSᵀ V apart.

    The scores are p^{-1/2} S, S = V Vᵀ; through the softmax dS = A (dA − Σ A dA), row by row. A is
    zero where the mask is, and so is dS.
    """
    (V_BxKxNxp, A_BxKxNxN), (dO_BxKxNxp, dA_BxKxNxN) = kept, gradients
    dtype = wide(V_BxKxNxp.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    P_BxKxNxN = A_BxKxNxN.astype(dtype)
    dA_BxKxNxN = dA_BxKxNxN.astype(dtype)
    dA_BxKxNxN += product("bknp,bkmp->bknm", dO_BxKxNxp, V_BxKxNxp)
    # Rounded to half precision, rows of A no longer sum to one; those of dS have to sum to zero.
    mean_BxKxNx1 = jnp.sum(P_BxKxNxN * dA_BxKxNxN, axis=-1, keepdims=True)
    mean_BxKxNx1 /= jnp.sum(P_BxKxNxN, axis=-1, keepdims=True)
    dS_BxKxNxN = P_BxKxNxN * (dA_BxKxNxN - mean_BxKxNx1)
    both_BxKxNxN = (dS_BxKxNxN + dS_BxKxNxN.swapaxes(-1, -2)) * V_BxKxNxp.shape[-1] ** -0.5
    dV_BxKxNxp = product("bknm,bknp->bkmp", A_BxKxNxN, dO_BxKxNxp)
    dV_BxKxNxp += product("bknm,bkmp->bknp", both_BxKxNxN.astype(V_BxKxNxp.dtype), V_BxKxNxp)
    return _of_type(dV_BxKxNxp, V_BxKxNxp), None


def normalise(X: Array, scale_d: Array, bias_d: Array, dtype: DTypeLike, epsilon: float) -> Array:
    """LayerNorm over the last axis, computed in the dtype `wide` of the tokens.

    Args:
        X: (…, d), any float dtype.
        scale_d: any float dtype.
        bias_d: any float dtype.
        dtype: of the result.
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
    """With X̂ = (X − mean)/σ and g = dY · scale: dX = (g − mean(g) − X̂ mean(g X̂))/σ."""
    X, mean, inverse, scale_d, bias_d = kept
    dY = dY.astype(mean.dtype)
    standard = (X.astype(mean.dtype) - mean) * inverse
    g = dY * _row(scale_d, dY)
    along = functools.partial(jnp.mean, axis=-1, keepdims=True)
    dX = _of_type(inverse * (g - along(g) - standard * along(g * standard)), X)
    rows = tuple(range(X.ndim - 1))
    dscale_d, dbias_d = jnp.sum(dY * standard, axis=rows), jnp.sum(dY, axis=rows)
    return dX, _of_type(dscale_d, scale_d), _of_type(dbias_d, bias_d)


def _of_type(gradient: Array, argument: Array) -> Array:
    """The gradient as `jax.custom_vjp` has to return it: in the type of what it belongs to.

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


def _derived(function: Callable, keep: Callable, backward: Callable, **options: Any) -> Callable:
    derived = jax.custom_vjp(function, **options)
    derived.defvjp(keep, backward)
    return derived


ATTEND = {"derived": _derived(attend, _attend_and_keep, _attend_backward), "autodiff": attend}
NORMALISE = {
    "derived": _derived(
        normalise, _normalise_and_keep, _normalise_backward, nondiff_argnums=(3, 4)
    ),
    "autodiff": normalise,
}
