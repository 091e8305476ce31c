"""Coding rates for losses: of unit or bounded features, by Cholesky factors of small matrices.

The rates of `crate_jax.objective` measure any tokens, however ill-conditioned, by QR factors of all
rows. A loss whose rows are spread over devices adds up matrices of the width of a feature instead,
and factors those. Everything is float32, and products are exact to that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def mcr2_loss(
    Z_Bxp: Array,
    Pi_BxJ: Array,
    *,
    eps: float,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    regularizer: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """The loss of MCR², in nats: −γ₂ R(Z; γ₁) + R^c(Z; Π) + λ/2 ‖Z‖².

    Source: arXiv 2006.08558 and its code, whose eps is ε²; of λ arXiv 2406.01909.

    Args:
        Z_Bxp: features, of norm 1 where λ is 0.
        Pi_BxJ: memberships; those of `cosines`.
        eps: ε of `class_rates`.
        gamma1: γ₁.
        gamma2: γ₂.
        regularizer: λ.

    Returns:
        The loss, and ``rate`` (R of γ₁ = 1), ``class_rate`` (R^c), ``rate_reduction`` (R − R^c),
        and ``cosine``, the mean of `cosines`; float32 scalars.
    """
    gammas = tuple(dict.fromkeys((gamma1, 1.0)))
    rates_G, class_rate = class_rates(Z_Bxp, Pi_BxJ, eps=eps, gammas=gammas)
    loss, rate = class_rate - gamma2 * rates_G[0], rates_G[-1]
    if regularizer:
        loss += regularizer / 2 * jnp.sum(jnp.square(Z_Bxp))
    total, pairs = cosines(Z_Bxp, Pi_BxJ)
    scalars = {
        "rate": rate,
        "class_rate": class_rate,
        "rate_reduction": rate - class_rate,
        "cosine": total / jnp.maximum(pairs, 1),
    }
    return loss, jax.lax.stop_gradient(scalars)


def class_rates(
    Z_Bxp: Array, Pi_BxJ: Array, *, eps: float, gammas: Sequence[float] = (1.0,)
) -> tuple[Array, Array]:
    """R(Z), for one or several γ, and R^c(Z; Π).

    R = ½ logdet(I + γ p/(B ε²) ZᵀZ), R^c = Σ_j m_j/(2B) logdet(I + p/(m_j ε²) ZᵀΠ_jZ), where m_j
    is the sum of the memberships Π_j. The matrices of all classes are factored at once, p x p, or
    B x B of fewer rows than that (Sylvester's identity). A class without rows adds nothing.
    Source: arXiv 2006.08558, section 2.

    Args:
        Z_Bxp: features as rows.
        Pi_BxJ: memberships, >= 0.
        eps: ε, > 0, in the unit of the features.
        gammas: γ, > 0.

    Returns:
        R by γ (G,), and R^c (), nats, float32.
    """
    B, p = Z_Bxp.shape
    Z_Bxp, members_JxB = Z_Bxp.astype(jnp.float32), Pi_BxJ.T.astype(jnp.float32)
    m_J = members_JxB.sum(axis=1)
    G = len(gammas)
    scale_G = np.asarray(gammas, np.float32) * (p / (B * eps**2))
    all_GxB = jnp.broadcast_to(scale_G[:, None], (G, B))
    scale_J = p / (jnp.maximum(m_J, 1e-8) * eps**2)
    roots_CxB = jnp.sqrt(jnp.concatenate([all_GxB, members_JxB * scale_J[:, None]]))
    X_CxBxp = roots_CxB[:, :, None] * Z_Bxp[None]
    axes = "cbp,cbq->cpq" if p <= B else "cap,cbp->cab"
    rates_C = half_logdet(jnp.einsum(axes, X_CxBxp, X_CxBxp, precision="highest"))
    return rates_C[:G], jnp.sum(m_J / B * rates_C[G:])


@jax.custom_jvp
def half_logdet(G_xnxn: Array) -> Array:
    """½ logdet(I + G) of symmetric matrices, by one batch of Cholesky factors; (...), float32.

    It is not a number where rounding has left I + G with an eigenvalue that is not positive.
    """
    return _log_diagonal(_cholesky(G_xnxn))


@half_logdet.defjvp
def _half_logdet_derivative(inputs: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The derivative ½ tr((I + G)⁻¹ dG), where (I + G)⁻¹ = L⁻ᵀ L⁻¹ by the same factors L."""
    L_xnxn = _cholesky(inputs[0])
    I_xnxn = jnp.broadcast_to(jnp.eye(L_xnxn.shape[-1], dtype=L_xnxn.dtype), L_xnxn.shape)
    root_xnxn = jax.scipy.linalg.solve_triangular(L_xnxn, I_xnxn, lower=True)
    slope_xnxn = 0.5 * jnp.einsum("...kn,...km->...nm", root_xnxn, root_xnxn, precision="highest")
    return _log_diagonal(L_xnxn), jnp.einsum("...nm,...nm->...", slope_xnxn, tangents[0])


def _cholesky(G_xnxn: Array) -> Array:
    n = G_xnxn.shape[-1]
    I_xnxn = jnp.eye(n, dtype=G_xnxn.dtype).reshape(*(1,) * (G_xnxn.ndim - 2), n, n)
    return jnp.linalg.cholesky(G_xnxn + I_xnxn)


def _log_diagonal(L_xnxn: Array) -> Array:
    return jnp.log(jnp.diagonal(L_xnxn, axis1=-2, axis2=-1)).sum(-1)


def class_sums(Z_Bxp: Array, Pi_BxJ: Array) -> dict[str, Array]:
    """Sums for `metrics_of_sums`, to be added up over batches.

    Args:
        Z_Bxp: features.
        Pi_BxJ: a single 1 in each row that counts, 0 in the others.

    Returns:
        ``moments``, Σ z zᵀ of each class (J, p, p); ``members`` (J,); ``cosines`` and ``pairs`` of
        `cosines`; float32.
    """
    counts_B = Pi_BxJ.sum(axis=1)
    Z_Bxp = jnp.where(counts_B[:, None] > 0, Z_Bxp.astype(jnp.float32), 0)
    members_JxBxp = Pi_BxJ.T[:, :, None] * Z_Bxp[None]
    S_Jxpxp = jnp.einsum("jbp,bq->jpq", members_JxBxp, Z_Bxp, precision="highest")
    total, pairs = cosines(Z_Bxp, Pi_BxJ)
    members_J = Pi_BxJ.sum(axis=0)
    return {"moments": S_Jxpxp, "members": members_J, "cosines": total, "pairs": pairs}


def metrics_of_sums(totals: Mapping[str, Any], *, eps: float) -> dict[str, float]:
    """``rate``, ``class_rate``, ``rate_reduction`` of all rows, nats; ``cosine``, of `cosines`.

    The rates are those of `class_rates` of all rows together, in float64. The mean |cosine| is of
    those pairs of different classes that shared a batch.

    Args:
        totals: the totals of `class_sums`.
        eps: ε.
    """
    S_Jxpxp, m_J = totals["moments"], totals["members"]
    p, m = S_Jxpxp.shape[-1], m_J.sum()
    scale_J = p / (np.maximum(m_J, 1e-8) * eps**2)
    rate = _exact_half_logdet(S_Jxpxp.sum(axis=0) * (p / (m * eps**2)))
    class_rate = m_J @ _exact_half_logdet(S_Jxpxp * scale_J[:, None, None]) / m
    return {
        "rate": float(rate),
        "class_rate": float(class_rate),
        "rate_reduction": float(rate - class_rate),
        "cosine": totals["cosines"] / max(totals["pairs"], 1.0),
    }


def _exact_half_logdet(G_xnxn: np.ndarray) -> np.ndarray:
    return np.linalg.slogdet(np.eye(G_xnxn.shape[-1]) + G_xnxn)[1] / 2


def cosines(Z_Bxp: Array, Pi_BxJ: Array) -> tuple[Array, Array]:
    """The sum of the |cosines| of pairs of rows of different classes, and the number of pairs.

    Args:
        Z_Bxp: features; one of norm zero has cosine 0 with all.
        Pi_BxJ: a single 1 in each row that counts, 0 in the others.

    Returns:
        Two float32 scalars; each pair is counted twice.
    """
    U_Bxp = unit(Z_Bxp)
    cosine_BxB = jnp.abs(jnp.einsum("ap,bp->ab", U_Bxp, U_Bxp, precision="highest"))
    real_B = Pi_BxJ.sum(axis=1)
    same_BxB = jnp.einsum("aj,bj->ab", Pi_BxJ, Pi_BxJ)
    other_BxB = real_B[:, None] * real_B[None, :] - same_BxB
    return jnp.sum(cosine_BxB, where=other_BxB > 0), jnp.sum(other_BxB)


def picture_of_cosines(Z_Bxp: Array, class_B: Array) -> Array:
    """|cosine| of all pairs of rows, sorted by class: white is 0, black 1; (1, B, B, 1), float32.

    Orthogonal classes are dark squares along the diagonal, and white elsewhere.
    """
    U_Bxp = unit(Z_Bxp)[jnp.argsort(class_B)]
    cosine_BxB = jnp.abs(jnp.einsum("ap,bp->ab", U_Bxp, U_Bxp, precision="highest"))
    return 1 - jnp.clip(cosine_BxB, 0, 1)[None, :, :, None]


def unit(Z_xp: Array) -> Array:
    """Rows of norm 1, float32; a row of norm below 1e-6 is divided by that."""
    Z_xp = Z_xp.astype(jnp.float32)
    squares_x1 = jnp.sum(jnp.square(Z_xp), axis=-1, keepdims=True)
    return Z_xp * jax.lax.rsqrt(jnp.maximum(squares_x1, 1e-12))


def largest_regularizer(N: int, share: float | Array, *, p: int, eps: float) -> Array:
    """The largest λ with orthogonal classes at every maximum: p (√r − 1) / (N (√r + 1) ε²).

    Of R − R^c − λ/2 ‖Z‖². Source: arXiv 2406.01909.

    Args:
        N: features.
        share: of the largest class, N_max / N = 1 / r.
        p: values of a feature.
        eps: ε of the rates.
    """
    root = jnp.asarray(share, jnp.float32) ** -0.5
    return p / (N * eps**2) * (root - 1) / (root + 1)
