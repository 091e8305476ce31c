"""Penalties that a training loss has besides its task: skew bases, and layers that code badly.

Both follow the theory. Its derivation takes U and D for orthonormal, which training does not keep
them; and a layer is a step on the sparse rate reduction, which the task alone does not ask for.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax import placement
from crate_jax.objective import rate_reduction
from crate_jax.parallel import PyTree
from crate_jax.sections import PenaltyConfig
from crate_jax.tasks.task import Params, Scalars


@dataclasses.dataclass(frozen=True)
class Penalties:
    """The penalties of a config: its weights, and what they are of.

    Attributes:
        orthogonality: weight of `orthogonality`.
        srr: weight of `srr_penalty`.
        srr_layer: "random", a layer drawn at each step, or "all", their mean.
        srr_lmbda: λ of `srr_penalty`.
        srr_eps: ε likewise.
    """

    orthogonality: float = 0.0
    srr: float = 0.0
    srr_layer: str = "random"
    srr_lmbda: float = 0.1
    srr_eps: float = 0.1

    @classmethod
    def from_config(cls, config: PenaltyConfig) -> Self:
        """Read the values of a config's section."""
        return cls(
            orthogonality=config.orthogonality,
            srr=config.srr,
            srr_layer=config.srr_layer,
            srr_lmbda=config.srr_lmbda,
            srr_eps=config.srr_eps,
        )

    def check(self, model: object) -> None:
        """Refuse a penalty on parts that a model does not have.

        Raises:
            ValueError: srr, of a model without subspaces.
        """
        if self.srr and "subspace_tokens" not in getattr(model, "tap_names", ()):
            raise ValueError(
                "penalty.srr must be 0 for a model without MSSA, TSSA and CBSA, whose layers have "
                f"no subspaces; got {self.srr}. Set it to 0."
            )

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps of a model's layers that the penalties need."""
        return ("out",) if self.srr else ()

    def __call__(self, params: Params, seen: dict[str, Array], key: Array) -> tuple[Array, Scalars]:
        """The addition to the loss, a float32 scalar, and each penalty before its weight.

        Args:
            params: the parameters of the model.
            seen: the taps, with the layers on axis 0.
            key: draws the layer.
        """
        total, found = jnp.zeros((), jnp.float32), {}
        if self.orthogonality:
            found["penalty/orthogonality"] = orthogonality(params)
            total += self.orthogonality * found["penalty/orthogonality"]
        if self.srr:
            found["penalty/srr"] = self._srr(params, seen["out"], key)
            total += self.srr * found["penalty/srr"]
        return total, found

    def _srr(self, params: PyTree, Z_LxBxNxd: Array, key: Array) -> Array:
        (U_LxdxKxp,) = (part["U"] for part in params["blocks"].values() if "U" in part)
        layers = (Z_LxBxNxd, placement.whole(U_LxdxKxp))
        if self.srr_layer == "all":
            return jax.lax.map(lambda layer: self._of_layer(*layer), layers).mean()
        drawn = jax.random.randint(key, (), 0, len(Z_LxBxNxd))
        return self._of_layer(*(jax.lax.dynamic_index_in_dim(x, drawn, 0, False) for x in layers))

    def _of_layer(self, Z_BxNxd: Array, U_dxKxp: Array) -> Array:
        return srr_penalty(Z_BxNxd, U_dxKxp, lmbda=self.srr_lmbda, eps=self.srr_eps)


def orthogonality(params: PyTree) -> Array:
    """Measure the distance of the bases U and the dictionaries D from orthonormal ones.

    For every parameter of the blocks that is called U or D, as a matrix X (d, m) of each layer, all
    subspaces of U side by side: ‖XᵀX − I‖², the squares summed; where m > d, which no orthonormal
    columns fit into, ‖XXᵀ − I‖². The mean over the layers, summed over the parameters.
    Source: arXiv 2306.01129, section 2, which takes [U_1, …, U_K] and D for orthonormal.

    Returns:
        A float32 scalar; 0 where all are orthonormal.

    Raises:
        ValueError: there is neither a U nor a D.
    """
    found = []
    shared = jax.tree.map(lambda leaf: leaf[None], params.get("block", {}))  # one set of all layers
    for path, leaf in jax.tree_util.tree_leaves_with_path(params.get("blocks", shared)):
        if path[-1].key in ("U", "D"):
            X_Lxdxm = leaf.astype(jnp.float32).reshape(*leaf.shape[:2], -1)
            if X_Lxdxm.shape[2] > X_Lxdxm.shape[1]:
                X_Lxdxm = X_Lxdxm.swapaxes(1, 2)
            gram = jnp.einsum("ldm,ldn->lmn", X_Lxdxm, X_Lxdxm, precision="highest")
            found.append(jnp.square(gram - jnp.eye(gram.shape[-1])[None]).sum((1, 2)).mean())
    if not found:
        raise ValueError(
            "penalty.orthogonality must be 0 for a model without U and D. Set it to 0."
        )
    return sum(found, start=jnp.zeros((), jnp.float32))


def srr_penalty(Z_BxNxd: Array, U_dxKxp: Array, *, lmbda: float, eps: float) -> Array:
    """The rest of the sparse rate reduction, for each token: (R^c(Z; U) − R(Z) + λ ‖Z‖₁) / N.

    ‖Z‖₁ is there for ‖Z‖₀, which has no gradient.
    Source: arXiv 2306.01129, equation 1, negated; as a regulariser, OpenReview CAC74VuMWX.

    Args:
        Z_BxNxd: tokens after a layer.
        U_dxKxp: the bases of that layer's MSSA, TSSA or CBSA.
        lmbda: λ.
        eps: ε.

    Returns:
        The mean over the examples in nats, a float32 scalar.
    """
    Z_BxNxd = Z_BxNxd.astype(jnp.float32)
    gain_B = rate_reduction(Z_BxNxd, U_dxKxp, eps=eps)
    return (lmbda * jnp.abs(Z_BxNxd).sum((1, 2)) - gain_B).mean() / Z_BxNxd.shape[1]
