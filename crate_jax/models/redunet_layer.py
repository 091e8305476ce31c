"""A layer of ReduNet: a gradient step on ΔR, whose operators are computed from features.

Source: arXiv 2105.10446 and its code. The letters, and what differs from official, are those of
`crate_jax.models.redunet`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class ReduLayer(NamedTuple):
    """The operators of a layer; those of a network have the layers on axis 0.

    Attributes:
        E_FxCxC: expands all features.
        C_JxFxCxC: compresses those of each class.
        gamma_J: the classes' shares of the examples, γ_j = m_j/m.
    """

    E_FxCxC: Array
    C_JxFxCxC: Array
    gamma_J: Array


def operators(V_mxFxC: Array, Pi_mxJ: Array, *, eps: float) -> Array:
    """α_j (I + α_j V Π_j Vᴴ)⁻¹ with α_j = C/(m_j ε²), for each class and frequency.

    Of one class of all examples that is E, of the others C_j. They make gradients: that of R(V) is
    E V, and that of R^c is Σ_j γ_j C_j V Π_j.
    Source: arXiv 2105.10446, section 3.

    Args:
        V_mxFxC: features; of signals, their frequencies.
        Pi_mxJ: memberships of the classes, >= 0; m_j are their sums.
        eps: quantisation precision ε.

    Returns:
        Operators (J, F, C, C), of V's dtype. They are Hermitian.
    """
    C, m_J = V_mxFxC.shape[-1], Pi_mxJ.sum(axis=0)
    alpha_Jx1x1x1 = (C / (m_J * eps**2))[:, None, None, None].astype(V_mxFxC.dtype)
    G_JxFxCxC = jnp.einsum(
        "mj,mfc,mfk->jfck",
        Pi_mxJ.astype(V_mxFxC.dtype),
        V_mxFxC,
        V_mxFxC.conj(),
        precision="highest",
    )
    I_JxFxCxC = jnp.broadcast_to(jnp.eye(C, dtype=V_mxFxC.dtype), G_JxFxCxC.shape)
    factors = jax.scipy.linalg.cho_factor(I_JxFxCxC + alpha_Jx1x1x1 * G_JxFxCxC)
    return alpha_Jx1x1x1 * jax.scipy.linalg.cho_solve(factors, I_JxFxCxC)


def build_layer(V_mxFxC: Array, Pi_mxJ: Array, *, eps: float) -> ReduLayer:
    """The layer for the features that enter it, of known classes."""
    everyone_mx1 = jnp.ones_like(Pi_mxJ[:, :1])
    E_and_C = operators(V_mxFxC, jnp.concatenate([everyone_mx1, Pi_mxJ], axis=1), eps=eps)
    return ReduLayer(E_and_C[0], E_and_C[1:], Pi_mxJ.mean(axis=0))


def apply_layer(
    layer: ReduLayer, V_mxFxC: Array, *, eta: float, lmbda: float
) -> tuple[Array, Array]:
    """One step on ΔR: z ← normalise(z + η (E z − Σ_j γ_j π̂_j C_j z)), π̂ = softmax_j(−λ ‖C_j z‖).

    π̂ guesses the class, which is not known of a new example: C_j leaves least of its own class.
    Source: arXiv 2105.10446, section 3, and its code.

    Args:
        layer: one layer.
        V_mxFxC: features, each of length one.
        eta: step size η.
        lmbda: λ.

    Returns:
        Features (m, F, C), each of length one, and π̂ (m, J), whose rows sum to one.
    """
    product = functools.partial(jnp.einsum, precision="highest")
    expanded_mxFxC = product("fck,mfk->mfc", layer.E_FxCxC, V_mxFxC)
    of_class_JxmxFxC = product("jfck,mfk->jmfc", layer.C_JxFxCxC, V_mxFxC)
    length_Jxm = jnp.sqrt(jnp.square(jnp.abs(of_class_JxmxFxC)).sum(axis=(2, 3)))
    Pi_Jxm = jax.nn.softmax(-lmbda * length_Jxm, axis=0)
    weight_Jxm = (layer.gamma_J[:, None] * Pi_Jxm).astype(V_mxFxC.dtype)
    compressed_mxFxC = product("jm,jmfc->mfc", weight_Jxm, of_class_JxmxFxC)
    return unit_length(V_mxFxC + eta * (expanded_mxFxC - compressed_mxFxC)), Pi_Jxm.T


def unit_length(V_mxFxC: Array) -> Array:
    """Each example scaled to length one; a zero stays zero."""
    squares_mx1x1 = jnp.square(jnp.abs(V_mxFxC)).sum(axis=(1, 2), keepdims=True)
    return V_mxFxC / jnp.maximum(jnp.sqrt(squares_mx1x1), 1e-8).astype(V_mxFxC.dtype)
