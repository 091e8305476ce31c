"""The sparse rate reduction, the objective of a CRATE layer, as pure functions of arrays.

The paper keeps tokens as the columns of Z (d x N); here they are the rows of ``Z`` (..., N, d), so
the paper's ``U_kᵀ Z`` is ``Z @ U[:, k]``. An x in a name stands for the axes in front. Every
function takes any number of leading batch axes, runs under `jax.jit`, is differentiable, and
computes in float32 at full matrix precision. Rates are in nats. The determinant is that of the
smaller of the two Gram matrices (Sylvester's identity).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from crate_jax import placement


def coding_rate(Z: Array, *, eps: float) -> Array:
    """Lossy coding rate of the tokens: R(Z) = ½ logdet(I + d/(N ε²) Z Zᵀ).

    Source: arXiv 2306.01129, equation 7 (section 2.3).

    Examples:
        Two tokens of width 2, so that d/N = 1, and ε = 1: I + Z Zᵀ = diag(10, 2) and R = ½ ln 20.

        >>> round(float(coding_rate(jnp.array([[3.0, 0.0], [0.0, 1.0]]), eps=1.0)), 4)
        1.4979

    Args:
        Z: tokens (..., N, d), any float dtype, or complex.
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Rate in nats (...), float32.

    Raises:
        ValueError: ``Z`` has fewer than two axes or no token, or ``eps`` is not positive.
    """
    _check_tokens(Z, eps)
    N, d = Z.shape[-2:]
    return _half_logdet(_exact(Z), d / (N * eps**2))


def subspace_coding_rate(Z: Array, U: Array, *, eps: float) -> Array:
    """Rate of the tokens coded in K subspaces.

    R^c(Z; U) = Σ_k ½ logdet(I + p/(N ε²) (U_kᵀZ)ᵀ(U_kᵀZ)).

    Source: arXiv 2306.01129, equation 8 (section 2.3).

    Args:
        Z: tokens (..., N, d), any float dtype.
        U: subspace bases (d, K, p), as in the parameter tree at ``blocks/mssa/U`` without the layer
            axis. They need not be orthonormal.
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Rate in nats (...), float32.

    Raises:
        ValueError: the shapes of ``Z`` and ``U`` do not fit, there is no token, or ``eps`` is not
            positive.
    """
    _check_tokens(Z, eps)
    if U.ndim != 3 or U.shape[0] != Z.shape[-1]:
        raise ValueError(
            f"U must be (d, K, p) with d = {Z.shape[-1]} as in Z; got {U.shape}. "
            "Take one layer of blocks/mssa/U."
        )
    Z, U = Z.astype(jnp.float32), placement.whole(U.astype(jnp.float32))
    V_xNxKxp = jnp.einsum("...nd,dkp->...nkp", Z, U, precision="highest")
    return projected_coding_rate(V_xNxKxp, eps=eps)


def projected_coding_rate(V: Array, *, eps: float) -> Array:
    """R^c of tokens that are projected already: Σ_k ½ logdet(I + p/(N ε²) V_k V_kᵀ), V_k = U_kᵀZ.

    Args:
        V: subspace tokens (..., N, K, p), any float dtype.
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Rate in nats (...), float32.

    Raises:
        ValueError: ``V`` has fewer than three axes or no token, or ``eps`` is not positive.
    """
    if V.ndim < 3:
        raise ValueError(f"V must be (..., N, K, p); got shape {V.shape}. Project Z by U first.")
    V_xKxNxp = jnp.swapaxes(V, -3, -2).astype(jnp.float32)
    _check_tokens(V_xKxNxp, eps)
    N, p = V_xKxNxp.shape[-2:]
    return _half_logdet(V_xKxNxp, p / (N * eps**2)).sum(-1)


def rate_reduction(Z: Array, U: Array, *, eps: float) -> Array:
    """Information gain of the representation: ΔR(Z; U) = R(Z) − R^c(Z; U).

    Source: arXiv 2306.01129, section 2.1.

    Args:
        Z: tokens (..., N, d), any float dtype.
        U: subspace bases (d, K, p).
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Rate in nats (...), float32.

    Raises:
        ValueError: see `subspace_coding_rate`.
    """
    compressed = subspace_coding_rate(Z, U, eps=eps)
    return coding_rate(placement.after(Z, compressed), eps=eps) - compressed


def class_coding_rate(Z: Array, Pi: Array, *, eps: float) -> Array:
    """Rate of the tokens coded class by class: Σ_j m_j/(2N) logdet(I + d/(m_j ε²) Z Π_j Zᵀ).

    m_j, the tokens in class j, is the sum of its memberships Π_j. A class without tokens adds
    nothing.
    Source: arXiv 2006.08558, section 2.

    Args:
        Z: tokens (..., N, d), any float dtype, or complex.
        Pi: memberships (N, J), >= 0; a row of labels known for certain holds a single one.
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Rate in nats (...), float32.

    Raises:
        ValueError: the shapes of ``Z`` and ``Pi`` do not fit, there is no token, or ``eps`` is not
            positive.
    """
    _check_tokens(Z, eps)
    N, d = Z.shape[-2:]
    if Pi.ndim != 2 or Pi.shape[0] != N:
        raise ValueError(
            f"Pi must be (N, J) with N = {N} as in Z; got {Pi.shape}. "
            "Make it of labels by jax.nn.one_hot."
        )
    members_JxN = Pi.T.astype(jnp.float32)
    m_J = members_JxN.sum(-1)
    weights_JxN = jnp.sqrt(members_JxN * (d / (jnp.maximum(m_J, 1e-8) * eps**2))[:, None])
    Z = _exact(Z)
    weighted_JxxNxd = jnp.einsum("...nd,jn->j...nd", Z, weights_JxN.astype(Z.dtype))
    return jnp.tensordot(m_J / N, _half_logdet(weighted_JxxNxd, 1.0), 1)


def sparse_rate_reduction(Z: Array, U: Array, *, lmbda: float, eps: float) -> Array:
    """The objective that a CRATE layer ascends: ΔR(Z; U) − λ ‖Z‖₀.

    Its gradient is that of ΔR: ‖Z‖₀, the number of non-zero entries, is constant almost everywhere,
    which is why the network descends it by a proximal (ISTA) step on ‖Z‖₁ instead.
    Source: arXiv 2306.01129, equation 1 (section 2.1).

    Args:
        Z: tokens (..., N, d), any float dtype.
        U: subspace bases (d, K, p).
        lmbda: nats paid for each non-zero entry, λ >= 0.
        eps: quantisation precision ε, > 0, in the unit of the tokens.

    Returns:
        Objective in nats (...), float32.

    Raises:
        ValueError: see `subspace_coding_rate`.
    """
    nonzero = jnp.count_nonzero(Z, axis=(-2, -1)).astype(jnp.float32)
    return rate_reduction(Z, U, eps=eps) - jnp.asarray(lmbda, jnp.float32) * nonzero


def sparsity(Z: Array) -> Array:
    """Share of the entries of the tokens that are exactly zero: 1 − ‖Z‖₀ / (N d).

    The official code reports this; the paper's figure 3 plots its complement, ‖Z‖₀ / (N d).
    Measure it on float32 tokens: bfloat16 arithmetic moves ISTA's zeros.

    Args:
        Z: tokens (..., N, d), any dtype.

    Returns:
        Share in [0, 1] (...), float32.

    Raises:
        ValueError: ``Z`` has fewer than two axes or no token.
    """
    _check_tokens(Z, 1.0)
    return jnp.mean(jnp.equal(Z, 0), axis=(-2, -1), dtype=jnp.float32)


def _exact(Z: Array) -> Array:
    """Tokens in single precision, complex ones as they are."""
    return Z.astype(jnp.complex64 if jnp.iscomplexobj(Z) else jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _half_logdet(X_xNxd: Array, scale: float) -> Array:
    """½ logdet(I + scale · Gram(X)), as log|det R| of the QR factors of [√scale X; I]; (...).

    The Gram matrix is never formed: that squares the condition number, and the Cholesky factor of a
    float32 Gram matrix is NaN for tokens that are compressed to nearly one direction.
    """
    R_xnxn, _ = _factor(X_xNxd, scale)
    return jnp.log(jnp.abs(jnp.diagonal(R_xnxn, axis1=-2, axis2=-1))).sum(-1)


@_half_logdet.defjvp
def _half_logdet_derivative(
    scale: float, inputs: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The derivative s tr((I + s XᵀX)⁻¹ Xᵀ dX), by R of the QR factors: I + s XᵀX = RᵀR.

    That of a QR decomposition would be of its orthogonal factor too, which is not needed. Of
    complex numbers Xᵀ and Rᵀ are the conjugate transposes, and the trace's real part counts.
    """
    R_xnxn, X_xmxn = _factor(inputs[0], scale)
    dX_xmxn = tangents[0] if X_xmxn.shape == inputs[0].shape else tangents[0].swapaxes(-2, -1)
    solve = functools.partial(jax.scipy.linalg.solve_triangular, R_xnxn)
    G_xnxm = scale * solve(solve(X_xmxn.swapaxes(-2, -1).conj(), trans="C"))
    value = placement.after(_half_logdet(inputs[0], scale), G_xnxm.real)
    return value, jnp.einsum("...nm,...mn->...", G_xnxm, dX_xmxn).real


def _factor(X_xNxd: Array, scale: float) -> tuple[Array, Array]:
    """R of the QR factors of [√scale X; I], and X or its transpose, whichever has fewer columns."""
    n = min(X_xNxd.shape[-2:])
    X_xmxn = X_xNxd if X_xNxd.shape[-1] == n else jnp.swapaxes(X_xNxd, -2, -1)
    I_xnxn = jnp.broadcast_to(jnp.eye(n, dtype=X_xmxn.dtype), (*X_xmxn.shape[:-2], n, n))
    scaled_xmxn = jnp.asarray(scale**0.5, X_xmxn.dtype) * X_xmxn
    joined = jnp.concatenate([scaled_xmxn, placement.beside(I_xnxn, X_xmxn)], axis=-2)
    return jnp.linalg.qr(joined, mode="r"), X_xmxn


def _check_tokens(Z: Array, eps: float) -> None:
    if Z.ndim < 2:
        raise ValueError(f"Z must be (..., N, d); got shape {Z.shape}. Add the token axis.")
    if not (Z.shape[-2] and Z.shape[-1]):
        raise ValueError(f"Z must hold tokens; got shape {Z.shape}. N and d must be at least 1.")
    if not isinstance(eps, Tracer) and not eps > 0:
        raise ValueError(f"eps must be > 0; got {eps}. The paper's figures use eps**2 = 0.01.")
