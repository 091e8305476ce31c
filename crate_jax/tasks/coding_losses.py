"""The losses of SimDINO: views of an image agree, and those of many images fill the space.

Features are unit vectors z of p values. s_v is the student's of view v of an image, t_v the
teacher's. Views 0 and 1 are global crops; the teacher sees them alone. All is computed in float32.
Source: arXiv 2502.10385, and its code.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.sections import SimDinoConfig
from crate_jax.tasks.rates import half_logdet
from crate_jax.tasks.task import Scalars


def compression(s_BxVxp: Array, t_Bx2xp: Array) -> Array:
    """Measure the agreement of the views: c = 1/(2V − 2) Σ_{i<2} Σ_{j≠i} mean_B ⟨t_i, s_j⟩.

    The paper has ½‖t − s‖² in the place of −⟨t, s⟩, which is as much but for a constant.

    Args:
        s_BxVxp: the student's features of V > 1 views, the global ones first.
        t_Bx2xp: the teacher's of these.

    Returns:
        At most 1, for unit vectors; a float32 scalar.
    """
    products_Bx2xV = jnp.einsum("bip,bjp->bij", t_Bx2xp, s_BxVxp, precision="highest")
    others_2xV = 1 - jnp.eye(*products_Bx2xV.shape[1:], dtype=jnp.float32)
    return jnp.sum(products_Bx2xV.mean(axis=0) * others_2xV) / others_2xV.sum()


def official_gamma(p: int, n: int) -> float:
    """γ = (p + n)/(p n), the weight that the official code gives the expansion of n images."""
    return (p + n) / (p * n)


def expansion(F_BxVxp: Array, *, eps: float, group_size: int = 0) -> Array:
    """Measure the volume of each view's images: mean_V mean_G ½ logdet(I + p/(B ε) F_gᵀF_g).

    The F_g (m, p) are the features of one group of m images that follow one another. The official
    code has a group on each device, and divides by all B images nevertheless. With one group of
    them all it is the coding rate R(F), where ε stands for ε². It hangs on the group size, and not
    on the number of devices. It is not a number where the Cholesky factor of rounding is not.

    Args:
        F_BxVxp: features.
        eps: ε of this formula.
        group_size: m, which divides B; 0: B.

    Returns:
        Nats, a float32 scalar; before γ.
    """
    B, V, p = F_BxVxp.shape
    m = group_size or B
    F_VxGxmxp = F_BxVxp.reshape(B // m, m, V, p).transpose(2, 0, 1, 3)
    # The determinant is that of the smaller of the two Gram matrices.
    axes = "vgmp,vgmq->vgpq" if p <= m else "vgmp,vgnp->vgmn"
    gram = jnp.einsum(axes, F_VxGxmxp, F_VxGxmxp, precision="highest")
    return half_logdet(p / (B * eps) * gram).mean()


def masked_agreement(s_BxPxp: Array, t_BxPxp: Array, masked_BxP: Array) -> Array:
    """Measure the agreement of hidden patches: the mean of ⟨t, s⟩ over those hidden, then B crops.

    A crop of which none is hidden counts as 0.

    Args:
        s_BxPxp: the student's features of patches, of which it did not see some.
        t_BxPxp: the teacher's, which saw them all.
        masked_BxP: which were hidden.

    Returns:
        A float32 scalar.
    """
    hidden_BxP = masked_BxP.astype(jnp.float32)
    product_BxP = jnp.einsum("bnp,bnp->bn", s_BxPxp, t_BxPxp, precision="highest")
    counts_B = jnp.maximum(hidden_BxP.sum(axis=1), 1)
    return jnp.mean((product_BxP * hidden_BxP).sum(axis=1) / counts_B)


def mean_cosine(F_Bxp: Array) -> Array:
    """Mean of ⟨z_i, z_j⟩ over all pairs i ≠ j of B unit vectors; 1 where they have collapsed.

    It is (‖Σ z‖² − Σ ‖z‖²)/(B (B − 1)), so no pair is formed.

    >>> float(mean_cosine(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))).__round__(4)
    0.3333
    """
    B = len(F_Bxp)
    together = jnp.sum(jnp.square(F_Bxp.sum(axis=0)))
    return (together - jnp.sum(jnp.square(F_Bxp))) / max(1, B * (B - 1))


def effective_rank(F_Bxp: Array) -> Array:
    """The number of directions that unit vectors use: 1 if they have collapsed, at most min(B, p).

    The exponential of an entropy of the shares λ of the eigenvalues of FᵀF: Rényi's of order two,
    −log Σ λ², which needs no factorisation: (tr FᵀF)² / ‖FᵀF‖². That of Shannon's, of
    `spectral_rank`, is never smaller.
    """
    gram = jnp.einsum("bp,bq->pq", F_Bxp, F_Bxp, precision="highest")
    return jnp.square(jnp.trace(gram)) / jnp.sum(jnp.square(gram))


def spectral_rank(F_Bxp: Array) -> Array:
    """exp(−Σ λ log λ) of the shares λ of the eigenvalues of FᵀF, by those of the smaller Gram.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007; there of singular values.
    """
    short = F_Bxp if F_Bxp.shape[0] <= F_Bxp.shape[1] else F_Bxp.T
    gram = jnp.einsum("ik,jk->ij", short, short, precision="highest")
    values = jnp.maximum(jnp.linalg.eigvalsh(gram), 1e-12)
    shares = values / values.sum()
    return jnp.exp(-jnp.sum(shares * jnp.log(shares)))


def collapse(F_Bxp: Array) -> Scalars:
    """`mean_cosine` and `spectral_rank` by the names under which a run shows them."""
    return {
        "collapse/mean_cosine": mean_cosine(F_Bxp),
        "collapse/effective_rank": spectral_rank(F_Bxp),
    }


@dataclasses.dataclass(frozen=True)
class Coding:
    """The loss: −coeff · `compression` − γ · `expansion` − patch_weight · `masked_agreement`.

    Attributes: as of `crate_jax.sections.SimDinoConfig`.
    """

    eps: float = 0.05
    coeff: float = 1.0
    gamma: float | None = None
    expanded: str = "both"
    group_size: int = 0
    patch_weight: float = 0.0

    @classmethod
    def from_config(cls, config: SimDinoConfig, batch_size: int) -> Self:
        """Read the values of a config's section.

        Raises:
            ValueError: the batch cannot be cut into its groups.
        """
        group = config.group_size
        if group and batch_size % group:
            raise ValueError(
                f"simdino.group_size must divide batch_size; got {group} and {batch_size}. "
                "Set --config.simdino.group_size, or 0 for the whole batch."
            )
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def __call__(
        self, s_BxVxp: Array, t_Bx2xp: Array, patches: tuple[Array, Array, Array] | None = None
    ) -> tuple[Array, Scalars]:
        """The loss, a float32 scalar, negative where it is good; and what it is made of.

        Args:
            s_BxVxp: the student's features, those of the two global views first.
            t_Bx2xp: the teacher's.
            patches: of 2B crops the student's and the teacher's features of patches, and which
                were hidden (B, 2, P); None: nothing is.

        Returns:
            The scalars are ``compression``, ``expansion`` (nats, times γ), ``patches``; and of the
            student's features of the first view `mean_cosine` and `effective_rank`.
        """
        F_BxVxp = s_BxVxp[:, :2]
        if self.expanded == "both":
            F_BxVxp = (F_BxVxp + t_Bx2xp) / 2
        gamma = official_gamma(F_BxVxp.shape[2], len(F_BxVxp)) if self.gamma is None else self.gamma
        seen_Bxp = jax.lax.stop_gradient(s_BxVxp[:, 0])
        scalars = {
            "compression": compression(s_BxVxp, t_Bx2xp),
            "expansion": gamma * expansion(F_BxVxp, eps=self.eps, group_size=self.group_size),
            "mean_cosine": mean_cosine(seen_Bxp),
            "effective_rank": effective_rank(seen_Bxp),
        }
        loss = -self.coeff * scalars["compression"] - scalars["expansion"]
        if patches is not None:
            told, true, masked = patches
            hidden = masked.reshape(told.shape[:2])
            scalars["patches"] = masked_agreement(told, true, hidden)
            loss -= self.patch_weight * scalars["patches"]
        return loss, scalars
