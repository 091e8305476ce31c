"""CRATE's two steps as pure functions, then the Flax modules that own their parameters.

Tokens are rows: where the paper writes D Z, this is ``Z @ D.T``. Matrix products take whole (B·N,
d) and (B·K, N, p) operands because XLA runs few large products faster than many small ones.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from crate_jax.models.derivatives import ATTEND, NORMALISE


class LayerNorm(nn.Module):
    """PyTorch's LayerNorm over the last axis: `crate_jax.models.derivatives.normalise`.

    Parameters scale and bias are float32, and so is the computation; the result is of `dtype`.
    """

    dtype: DTypeLike = jnp.float32
    backward: str = "derived"

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """(…, d) to (…, d)."""
        scale_d = self.param("scale", init.ones, X.shape[-1:])
        bias_d = self.param("bias", init.zeros, X.shape[-1:])
        return NORMALISE[self.backward](X, scale_d, bias_d, self.dtype)


# nn.Linear's defaults in PyTorch: weight and bias uniform in ±1/√fan_in.
linear_kernel_init = init.variance_scaling(1 / 3, "fan_in", "uniform")
# kaiming_uniform_ on D (d, d): uniform in ±√(6/d).
dictionary_init = init.variance_scaling(2.0, "fan_in", "uniform")


def linear_bias_init(fan_in: int) -> Callable[..., Array]:
    """Uniform in ±1/√fan_in, as nn.Linear starts its bias; Flax's own default is zero."""

    def initialise(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def whole(weight: Array) -> Array:
    """A weight as a product takes it: gathered from the devices of an ``fsdp`` axis that share it.

    Without such an axis around it (`crate_jax.parallel.on_mesh`), the weight as it is. Left to
    itself, the compiler splits the product as the weight is split, and then the activations of the
    whole batch travel in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get("fsdp") is not AxisType.Auto or mesh.shape["fsdp"] == 1:
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def product(X: Array, W: Array, multiply: Callable[[Array, Array], Array] = jnp.matmul) -> Array:
    """``multiply(X, W)`` of tokens X and a weight W, in the tokens' dtype.

    The backward pass casts and gathers W again: kept, copies of the weights of all layers would lie
    on every device at once.
    """
    run = jax.checkpoint(lambda X, W: multiply(X, whole(W.astype(X.dtype))), prevent_cse=False)
    return run(X, W)


def _dot_general(X: Array, W: Array, *args: Any, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` as nn.Dense calls it, as a `product`."""
    return product(X, W, lambda X, W: jax.lax.dot_general(X, W, *args, **kwargs))


def dense(features: int, fan_in: int, dtype: DTypeLike, name: str) -> nn.Dense:
    """A linear layer that starts as nn.Linear does."""
    return nn.Dense(
        features,
        kernel_init=linear_kernel_init,
        bias_init=linear_bias_init(fan_in),
        dtype=dtype,
        dot_general=_dot_general,
        name=name,
    )


def subspace_tokens(Z_BxNxd: Array, U_dxKxp: Array) -> Array:
    """Coordinates of every token in every subspace: U_kᵀ Z, here ``Z @ U_k``.

    Args:
        Z_BxNxd: tokens.
        U_dxKxp: bases of the K subspaces, any float dtype.

    Returns:
        Subspace tokens (B, N, K, p), of the tokens' dtype.
    """
    B, N, d = Z_BxNxd.shape
    _, K, p = U_dxKxp.shape
    project = lambda Z_Mxd, U_dxKxp: Z_Mxd @ U_dxKxp.reshape(d, K * p)  # noqa: E731
    return product(Z_BxNxd.reshape(B * N, d), U_dxKxp, project).reshape(B, N, K, p)


def subspace_self_attention(W_BxNxKxp: Array, backward: str = "derived") -> tuple[Array, Array]:
    """SSA in every subspace: softmax(p^{-1/2} W_k W_kᵀ) W_k with W_k = U_kᵀ Z.

    Query, key and value are one matrix, so the scores are symmetric before the softmax, which runs
    in float32. Source: arXiv 2306.01129, equation 11 (tokens as rows); scale p^{-1/2} as in the
    code.

    Args:
        W_BxNxKxp: subspace tokens.
        backward: one of `crate_jax.models.derivatives.BACKWARD`.

    Returns:
        The attended subspace tokens (B, N, K, p), and the attention (B, K, N, N) whose rows sum to
        one; both of the input's dtype.
    """
    B, N, K, p = W_BxNxKxp.shape
    W_GxNxp = W_BxNxKxp.transpose(0, 2, 1, 3).reshape(B * K, N, p)
    O_GxNxp, A_GxNxN = ATTEND[backward](W_GxNxp)
    O_BxNxKxp = O_GxNxp.reshape(B, K, N, p).transpose(0, 2, 1, 3)
    return O_BxNxKxp, A_GxNxN.reshape(B, K, N, N)


def mssa(
    Z_BxNxd: Array,
    U_dxKxp: Array,
    W_out_Kxpxd: Array | None = None,
    b_out_d: Array | None = None,
    backward: str = "derived",
) -> Array:
    """Multi-head subspace self-attention: W_out [SSA_1; …; SSA_K] + b_out.

    One approximate gradient step on R^c(Z; U) is Z + MSSA(Z); the residual is the caller's.
    Source: arXiv 2306.01129, equations 11 and 12 (section 2.3).
    Differs from the paper, as the official code does: W_out is learned and not p/(N ε²) [U_1, …,
        U_K].

    Args:
        Z_BxNxd: tokens, normalised.
        U_dxKxp: bases of the K subspaces, any float dtype.
        W_out_Kxpxd: output projection, likewise; None leaves it out, which needs K = 1 and p = d.
        b_out_d: its bias, likewise.
        backward: one of `crate_jax.models.derivatives.BACKWARD`.

    Returns:
        Update of the tokens (B, N, d), of the tokens' dtype.
    """
    O_BxNxKxp, _ = subspace_self_attention(subspace_tokens(Z_BxNxd, U_dxKxp), backward)
    B, N, K, p = O_BxNxKxp.shape
    O_MxKp = O_BxNxKxp.reshape(B * N, K * p)
    if W_out_Kxpxd is not None:
        project = lambda O_MxKp, W_Kxpxd: O_MxKp @ W_Kxpxd.reshape(K * p, -1)  # noqa: E731
        O_MxKp = product(O_MxKp, W_out_Kxpxd, project)
    if b_out_d is not None:
        O_MxKp = O_MxKp + b_out_d.astype(O_MxKp.dtype)[None, :]
    return O_MxKp.reshape(B, N, -1)


def ista_step(Y_BxNxd: Array, D_dxd: Array, *, eta: float, lmbda: float) -> Array:
    """One step of ISTA on ½‖Y − D A‖² + λ‖A‖₁ over A ≥ 0, from A⁰ = Y.

    ReLU(Y + η Dᵀ(Y − D Y) − η λ); with tokens as rows D Y is ``Y @ D.T`` and Dᵀ R is ``R @ D``.
    There is no residual: the result replaces the tokens.
    Source: arXiv 2306.01129, equation 17 (section 2.4).
    Differs from official: Dᵀ(Y − D Y) takes two matrix products where DᵀY − DᵀD Y takes three.

    Args:
        Y_BxNxd: tokens, normalised.
        D_dxd: dictionary, atoms as columns, any float dtype.
        eta: step size η.
        lmbda: sparsity weight λ.

    Returns:
        Sparse, non-negative tokens (B, N, d), of the tokens' dtype.
    """
    B, N, d = Y_BxNxd.shape
    Y_Mxd = Y_BxNxd.reshape(B * N, d)
    R_Mxd = Y_Mxd - product(Y_Mxd, D_dxd, lambda Y_Mxd, D_dxd: Y_Mxd @ D_dxd.T)
    return jax.nn.relu(Y_Mxd + eta * product(R_Mxd, D_dxd) - eta * lmbda).reshape(B, N, d)


class MSSA(nn.Module):
    """`mssa` with its parameters U (d, K, p), W_out (K, p, d) and b_out (d,).

    W_out and b_out are absent when one subspace fills the space (K = 1, p = d), as in the official
    code. They start as PyTorch's nn.Linear does. Parameters are float32, the computation is
    `dtype`.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"

    @nn.compact
    def __call__(self, Z_BxNxd: Array) -> tuple[Array, dict[str, Array]]:
        """Tokens (B, N, d) to their update (B, N, d); also ``subspace_tokens``, ``attention``."""
        Z_BxNxd = Z_BxNxd.astype(self.dtype)
        d, K, p = Z_BxNxd.shape[-1], self.num_heads, self.head_dim
        U_init = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(1, 2))
        U_dxKxp = self.param("U", U_init, (d, K, p))
        W_out_Kxpxd = b_out_d = None
        if (K, p) != (1, d):
            W_init = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)
            W_out_Kxpxd = self.param("W_out", W_init, (K, p, d))
            b_out_d = self.param("b_out", linear_bias_init(K * p), (d,))
        update_BxNxd = mssa(Z_BxNxd, U_dxKxp, W_out_Kxpxd, b_out_d, self.backward)
        # The compiler merges these with the same products inside mssa, or drops them if unused.
        W_BxNxKxp = subspace_tokens(Z_BxNxd, U_dxKxp)
        _, A_BxKxNxN = subspace_self_attention(W_BxNxKxp, self.backward)
        return update_BxNxd, {"subspace_tokens": W_BxNxKxp, "attention": A_BxKxNxN}


class ISTA(nn.Module):
    """`ista_step` with its dictionary D (d, d), which starts uniform in ±√(6/d)."""

    eta: float
    lmbda: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> Array:
        """Normalised tokens (B, N, d) to sparse tokens (B, N, d)."""
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        d = Y_BxNxd.shape[-1]
        D_dxd = self.param("D", dictionary_init, (d, d))
        return ista_step(Y_BxNxd, D_dxd, eta=self.eta, lmbda=self.lmbda)
