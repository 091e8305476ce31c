"""The parts of a layer whose backward pass is written out here, next to the plain functions.

The written passes equal automatic differentiation and cost less: they keep one array where it keeps
two or three, and use that a token is query, key and value at once. Only reverse mode knows them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

EPSILON = 1e-5  # of every LayerNorm: PyTorch's default

# How a model's backward pass is had: "derived", from this module; "autodiff", from JAX.
BACKWARD = ("derived", "autodiff")


def attend(W_GxNxp: Array) -> tuple[Array, Array]:
    """Softmax attention of tokens to each other: A = softmax(p^{-1/2} W Wᵀ) and A W.

    Scores and softmax are float32.

    Args:
        W_GxNxp: tokens of G independent groups.

    Returns:
        A W (G, N, p) and A (G, N, N), whose rows sum to one; both of the input's dtype.
    """
    S_GxNxN = jnp.einsum("gnp,gmp->gnm", W_GxNxp, W_GxNxp, preferred_element_type=jnp.float32)
    A_GxNxN = jax.nn.softmax(S_GxNxN * W_GxNxp.shape[-1] ** -0.5, axis=-1).astype(W_GxNxp.dtype)
    return jnp.einsum("gnm,gmp->gnp", A_GxNxN, W_GxNxp), A_GxNxN


def _attend_and_keep(W_GxNxp: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    O_GxNxp, A_GxNxN = attend(W_GxNxp)
    return (O_GxNxp, A_GxNxN), (W_GxNxp, A_GxNxN)


def _attend_backward(kept: tuple[Array, Array], gradients: tuple[Array, Array]) -> tuple[Array]:
    """The gradient dW = Aᵀ dO + (dS + dSᵀ) W; automatic differentiation has dS W and dSᵀ W apart.

    The scores are p^{-1/2} S, S = W Wᵀ; through the softmax dS = A (dA − Σ A dA), row by row.
    """
    (W_GxNxp, A_GxNxN), (dO_GxNxp, dA_GxNxN) = kept, gradients
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    P_GxNxN = A_GxNxN.astype(jnp.float32)
    dA_GxNxN = dA_GxNxN.astype(jnp.float32) + product("gnp,gmp->gnm", dO_GxNxp, W_GxNxp)
    # Rounded to half precision, rows of A no longer sum to one; those of dS have to sum to zero.
    mean_GxNx1 = jnp.sum(P_GxNxN * dA_GxNxN, axis=-1, keepdims=True)
    mean_GxNx1 /= jnp.sum(P_GxNxN, axis=-1, keepdims=True)
    dS_GxNxN = P_GxNxN * (dA_GxNxN - mean_GxNx1)
    both_GxNxN = (dS_GxNxN + dS_GxNxN.swapaxes(1, 2)) * W_GxNxp.shape[-1] ** -0.5
    dW_GxNxp = product("gnm,gnp->gmp", A_GxNxN, dO_GxNxp)
    dW_GxNxp += product("gnm,gmp->gnp", both_GxNxN.astype(W_GxNxp.dtype), W_GxNxp)
    return (dW_GxNxp.astype(W_GxNxp.dtype),)


def normalise(X: Array, scale_d: Array, bias_d: Array, dtype: DTypeLike) -> Array:
    """LayerNorm over the last axis, computed in float32.

    Args:
        X: (…, d), any float dtype.
        scale_d: float32.
        bias_d: float32.
        dtype: of the result.

    Returns:
        (X − mean) / √(variance + `EPSILON`) · scale + bias, of X's shape.
    """
    return _normalise_and_keep(X, scale_d, bias_d, dtype)[0]


def _normalise_and_keep(X: Array, scale_d: Array, bias_d: Array, dtype: DTypeLike):
    mean = jnp.mean(X.astype(jnp.float32), axis=-1, keepdims=True)
    centred = X.astype(jnp.float32) - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)
    Y = (centred * (inverse * _row(scale_d, X)) + _row(bias_d, X)).astype(dtype)
    return Y, (X, mean, inverse, scale_d)


def _normalise_backward(dtype: DTypeLike, kept: tuple[Array, Array, Array, Array], dY: Array):
    """With X̂ = (X − mean)/σ and g = dY · scale: dX = (g − mean(g) − X̂ mean(g X̂))/σ."""
    X, mean, inverse, scale_d = kept
    dY = dY.astype(jnp.float32)
    standard = (X.astype(jnp.float32) - mean) * inverse
    g = dY * _row(scale_d, X)
    along = functools.partial(jnp.mean, axis=-1, keepdims=True)
    dX = inverse * (g - along(g) - standard * along(g * standard))
    rows = tuple(range(X.ndim - 1))
    return dX.astype(X.dtype), jnp.sum(dY * standard, axis=rows), jnp.sum(dY, axis=rows)


def _row(values_d: Array, X: Array) -> Array:
    """Values along the last axis, with as many axes as X."""
    return values_d.reshape((1,) * (X.ndim - 1) + values_d.shape)


def _derived(function: Callable, keep: Callable, backward: Callable, **options: Any) -> Callable:
    derived = jax.custom_vjp(function, **options)
    derived.defvjp(keep, backward)
    return derived


ATTEND = {"derived": _derived(attend, _attend_and_keep, _attend_backward), "autodiff": attend}
NORMALISE = {
    "derived": _derived(normalise, _normalise_and_keep, _normalise_backward, nondiff_argnums=(3,)),
    "autodiff": normalise,
}
