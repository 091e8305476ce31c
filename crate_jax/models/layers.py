"""The steps of a layer as pure functions, then the Flax modules that own their parameters.

Tokens are rows: where the paper writes D Z, this is ``Z @ D.T``. The letters, here and above:

    Z  tokens that a layer takes and gives     B  batch        N  tokens, the class token included
    Y  tokens after a LayerNorm                d  width        K  subspaces   p  their dimension
    U  bases of the subspaces                  m  atoms of a wide dictionary, hidden units
    V  subspace tokens, U_kᵀ Y                 A  attention    O  attended subspace tokens
    E  error of a sparse code                  S  scores       P  patches, N − 1 (an axis)
    D  dictionary, atoms as columns            H, W, c  image  h, w  patch    Y (an axis)  classes

A weight is cast to the dtype of the computation, and gathered where devices share it, at one place:
`crate_jax.models.parameters.read`. The equations take it as it then is. They name what the backward
pass may keep of them (``keep``); whether it does is decided at one place too,
`crate_jax.models.block.REMAT`.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.attention import attend_by, keep_merged
from crate_jax.models.derivatives import NORMALISE, attend, plain
from crate_jax.models.parameters import (
    SubspaceMaps,
    dictionary_init,
    linear_bias_init,
    linear_kernel_init,
    parameter,
    read,
    read_bases,
    read_output,
)
from crate_jax.models.past import PAST, SubspaceTokens
from crate_jax.models.steering import STEERING, Steering, steered


class Attended(NamedTuple):
    """The result of an attention step.

    Attributes:
        update: of the tokens (B, N, d), before the residual.
        seen: what it made on the way, by the name of the tap.
    """

    update: Array
    seen: dict[str, Array]


def mssa(
    Y_BxNxd: Array,
    U_dxKxp: Array,
    W_out_Kxpxd: Array | None = None,
    b_out_d: Array | None = None,
    *,
    mask: Array | None = None,
    kernel: str | None = None,
    past: SubspaceTokens | None = None,
    steering: Steering | None = None,
) -> Attended:
    """Multi-head subspace self-attention: W_out [SSA_1; …; SSA_K] + b_out.

    SSA_k = softmax(p^{-1/2} V_k V_kᵀ) V_k with V_k = U_kᵀ Y, here ``Y @ U_k``: a token is query,
    key and value at once, so the scores are symmetric before the softmax. One approximate gradient
    step on R^c(Z; U) is Z + MSSA(Z); the residual is the caller's.
    Source: arXiv 2306.01129, equations 11 and 12 (section 2.3); scale p^{-1/2} as in the code.
    Differs from the paper, as the official code does: W_out is learned and not p/(N ε²) [U_1, …,
        U_K].

    Examples:
        Two tokens in one subspace of basis (1, 0), with coordinates V = (0, √ln 3). The scores are
        (0, 0) and (0, ln 3), so the second token attends by 1 to 3; W_out divides by √ln 3:

        >>> v = jnp.log(3.0) ** 0.5
        >>> Y, U = jnp.array([[[0.0, 5.0], [v, 7.0]]]), jnp.array([[[1.0]], [[0.0]]])
        >>> update, seen = mssa(Y, U, jnp.array([[[1 / v, 0.0]]]))
        >>> seen["attention"].round(4).tolist()
        [[[[0.5, 0.5], [0.25, 0.75]]]]
        >>> update.round(4).tolist()
        [[[0.5, 0.0], [0.75, 0.0]]]

    Args:
        Y_BxNxd: tokens, normalised.
        U_dxKxp: bases of the K subspaces.
        W_out_Kxpxd: output projection; None leaves it out, which needs K = 1 and p = d.
        b_out_d: its bias.
        mask: see `crate_jax.models.derivatives.attend`.
        kernel: one of `crate_jax.models.attention.KERNELS`, which keep no attention and know
            reverse mode alone; None: the plain function.
        past: tokens before these, which these see too; the plain function attends to them.
        steering: of the subspace tokens.

    Returns:
        The update (B, N, d); seen are ``subspace_tokens`` (B, N, K, p) and, without a kernel,
        ``attention`` (B, K, N, N), whose rows sum to one. All of the tokens' dtype, which the
        weights share.

    Raises:
        ValueError: the kernel does not run here, or not on these tokens.
    """
    V_BxNxKxp = steered(keep_merged(times(Y_BxNxd, U_dxKxp), "subspace_tokens"), steering)
    seen = {"subspace_tokens": V_BxNxKxp}
    if kernel is None or past is not None:
        all_BxKxMxp = past.grown(V_BxNxKxp).V_BxTxKxp.swapaxes(1, 2) if past else None
        O_BxKxNxp, seen["attention"] = attend(V_BxNxKxp.swapaxes(1, 2), mask, all_BxKxMxp)
        O_BxNxKxp = keep_merged(O_BxKxNxp.swapaxes(1, 2), "attended")
    else:
        O_BxNxKxp = attend_by(kernel, V_BxNxKxp, mask)
    if W_out_Kxpxd is None:
        update_BxNxd = O_BxNxKxp[:, :, 0]
    else:
        update_BxNxd = times(O_BxNxKxp, W_out_Kxpxd, axes=2)
    if b_out_d is not None:
        update_BxNxd += b_out_d[None, None]
    return Attended(update_BxNxd, seen)


def mssa_of(
    module: Any, Y_BxNxd: Array, *weights: Any, mask: Array | None, taps: Collection[str]
) -> Attended:
    """`mssa` of tokens and weights, in a module whose ``kernel`` chooses the program.

    Where ``attention`` is among the taps, no kernel does. What the module has in the collections
    `PAST` and `STEERING` counts, and its past grows by these tokens.
    """
    kernel = None if "attention" in taps else module.kernel
    given = {of: module.get_variable(of, "subspace_tokens") for of in (PAST, STEERING)}
    attended = mssa(Y_BxNxd, *weights, mask=mask, kernel=kernel, **given)
    if (past := given[PAST]) is not None:
        module.put_variable(PAST, "subspace_tokens", past.grown(attended.seen["subspace_tokens"]))
    return attended


def ista_step(Y_BxNxd: Array, D_dxd: Array, *, eta: float, lmbda: float) -> Array:
    """One step of ISTA on ½‖Y − D A‖² + λ‖A‖₁ over A ≥ 0, from A⁰ = Y.

    ReLU(Y + η Dᵀ(Y − D Y) − η λ); with tokens as rows D Y is ``Y @ D.T`` and Dᵀ E is ``E @ D``.
    There is no residual: the result replaces the tokens.
    Source: arXiv 2306.01129, equation 17 (section 2.4).
    Differs from official: Dᵀ(Y − D Y) takes two matrix products where DᵀY − DᵀD Y takes three.

    Examples:
        With D = diag(2, 1) the first token (1, 0) leaves the error (−1, 0), which Dᵀ makes (−2, 0),
        so it moves to 1 − ½ − ⅛ for η = ¼ and λ = ½. The second one (0, 2) leaves none, and only
        shrinks:

        >>> Y, D = jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), jnp.diag(jnp.array([2.0, 1.0]))
        >>> ista_step(Y, D, eta=0.25, lmbda=0.5).tolist()
        [[[0.375, 0.0], [0.0, 1.875]]]

    Args:
        Y_BxNxd: tokens, normalised.
        D_dxd: dictionary, atoms as columns, of the tokens' dtype.
        eta: step size η.
        lmbda: sparsity weight λ.

    Returns:
        Sparse, non-negative tokens (B, N, d), of the tokens' dtype.
    """
    eta, lmbda = plain(eta), plain(lmbda)
    E_BxNxd = keep(Y_BxNxd - times(Y_BxNxd, D_dxd.T), "error")
    return relu(Y_BxNxd + eta * times(E_BxNxd, D_dxd) - eta * lmbda)


def times(X: Array, W: Array, axes: int = 1) -> Array:
    """X W over the last axes of X and the first of W, as one product of two matrices.

    That is ``X @ W`` for tokens (B, N, d) and a weight (d, m), and the like for more axes. The
    tokens are flattened because the gradient of W is one product then, too. Over two axes of tokens
    XLA's CPU backend goes another way, which adds up in another order. On a TPU they are not: its
    memory has rows in eights, and unless N is a multiple of that they would be copied. Axes that
    devices share by the type of X are not merged.

    Args:
        X: tokens, of any number of axes in front.
        W: weight, of the tokens' dtype.
        axes: the number of axes that are summed over.

    Returns:
        The axes of X and those of W that are left.
    """
    if placement.is_shared(X):
        return jnp.tensordot(X, W, axes)
    front, inner, outer = X.shape[: X.ndim - axes], W.shape[:axes], W.shape[axes:]
    matrix = W.reshape(math.prod(inner), math.prod(outer))
    rows = (math.prod(front),)
    if placement.platform() == "tpu":
        rows = front
        # Without a barrier the product that makes the gradient of W has its axes (K, p), and takes
        # copies of the tokens for it. Where W is split its gradient could not be scattered then.
        if W.ndim > 2 and not placement.are_weights_split():
            matrix = jax.lax.optimization_barrier(matrix)
    flat = X.reshape(*rows, math.prod(inner)) @ matrix
    return flat.reshape(*front, *outer)


def relu(X: Array) -> Array:
    """max(X, 0); the backward pass saves one byte for each entry."""
    return jnp.where(keep(X > 0, "active"), X, jnp.zeros((), X.dtype))


class LayerNorm(nn.Module):
    """PyTorch's LayerNorm over the last axis: `crate_jax.models.derivatives.normalise`.

    Parameters scale and bias are float32, and so is the computation; the result is of `dtype`.
    Without ``affine`` they are no parameters, and one and zero; without ``bias`` that one is zero.
    """

    dtype: DTypeLike = jnp.float32
    backward: str = "derived"
    epsilon: float = 1e-5  # PyTorch's default
    affine: bool = True
    bias: bool = True

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """(…, d) to (…, d)."""
        scale_d, bias_d = (fill(X.shape[-1:], jnp.float32) for fill in (jnp.ones, jnp.zeros))
        if self.affine:
            scale_d = parameter(self, "scale", init.ones, X.shape[-1:])
        if self.affine and self.bias:
            bias_d = parameter(self, "bias", init.zeros, X.shape[-1:])
        Y = NORMALISE[self.backward](X, scale_d, bias_d, self.dtype, float(self.epsilon))
        return keep(Y, "normalised")


class Linear(nn.Module):
    """X W + b, with kernel and bias that start as nn.Linear's unless told otherwise."""

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Array] = linear_kernel_init
    bias_init: Callable[..., Array] | None = None  # None: nn.Linear's

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """(…, in) to (…, features), of `dtype`."""
        fan_in = X.shape[-1]
        kernel = read(self, "kernel", self.kernel_init, (fan_in, self.features), self.dtype)
        bias_init = self.bias_init or linear_bias_init(fan_in)
        bias = read(self, "bias", bias_init, (self.features,), self.dtype)
        return X.astype(self.dtype) @ kernel + bias.reshape((1,) * (X.ndim - 1) + bias.shape)


class MSSA(SubspaceMaps, nn.Module):
    """`mssa` with its parameters U (d, K, p), W_out (K, p, d) and, with ``bias``, b_out (d,).

    W_out and b_out are absent when one subspace fills the space (K = 1, p = d), as in the official
    code.

    Attributes:
        kernel: see `mssa`.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("subspace_tokens", "attention")

    kernel: str | None = "auto"

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update, by `mssa_of`."""
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        d = Y_BxNxd.shape[-1]
        U_dxKxp = read_bases(self, d)
        fills_the_space = (self.num_heads, self.head_dim) == (1, d)
        W_out_Kxpxd, b_out_d = (None, None) if fills_the_space else read_output(self, d)
        return mssa_of(self, Y_BxNxd, U_dxKxp, W_out_Kxpxd, b_out_d, mask=mask, taps=taps)


class ISTA(nn.Module):
    """`ista_step` with its dictionary D (d, d), which starts uniform in ±√(6/d)."""

    eta: float
    lmbda: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> Array:
        """Normalised tokens (B, N, d) to sparse tokens (B, N, d)."""
        d = Y_BxNxd.shape[-1]
        D_dxd = read(self, "D", dictionary_init, (d, d), self.dtype)
        return ista_step(Y_BxNxd.astype(self.dtype), D_dxd, eta=self.eta, lmbda=self.lmbda)
