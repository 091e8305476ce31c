"""The device's part of the measures: products and sums of layers, under jit, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def stacked_parameters(model: Any, variables: Any) -> Any:
    """The parameters of the layers, stacked on axis 0, also where all layers share one set."""
    groups = variables["params"]
    for name in getattr(model, "BLOCKS", ("block" if model.SHARED else "blocks",)):
        groups = groups[name]
    if model.SHARED:
        return jax.tree.map(lambda x: jnp.stack([x] * model.depth), groups)
    return groups


def projected(Z_LxBxNxd: Array, U_LxdxKxp: Array) -> Array:
    """U_kᵀ Z of every layer (L, B, N, K, p)."""
    return jax.lax.map(
        lambda layer: jnp.einsum("bnd,dkp->bnkp", *layer, precision="highest"),
        (Z_LxBxNxd, U_LxdxKxp),
    )


def lasso(Y: Array, A: Array, D: Array, lmbda: Array) -> Array:
    """½‖Y − D A‖² + λ‖A‖₁ per token, the mean over the tokens of an image (B,)."""
    error = Y - jnp.einsum("bnm,dm->bnd", A, D, precision="highest")
    of_token = 0.5 * jnp.square(error).sum(axis=2) + lmbda * jnp.abs(A).sum(axis=2)
    return of_token.mean(axis=1)


def attention_entropy(A_BxKxNxN: Array) -> Array:
    """Entropy in nats of what a token attends to, the mean over heads and tokens (B,).

    Rows are scaled to the sum 1, which those of a softmax over keys plus one over queries lack.
    """
    A_BxKxNxN = A_BxKxNxN / A_BxKxNxN.sum(axis=3, keepdims=True)
    logs = jnp.log(jnp.where(A_BxKxNxN > 0, A_BxKxNxN, 1))
    return -(A_BxKxNxN * logs).sum(axis=3).mean(axis=(1, 2))


def gram(X: Array) -> Array:
    """XᵀX or X Xᵀ of every layer, whichever is smaller, of tokens (L, B, N, d) or in subspaces."""
    X = X.swapaxes(2, 3) if X.ndim == 5 else X  # (L, B, K, N, p)
    products = "...in,...jn->...ij" if X.shape[-2] < X.shape[-1] else "...ni,...nj->...ij"
    return jax.lax.map(lambda X: jnp.einsum(products, X, X, precision="highest"), X)
