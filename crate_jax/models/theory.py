"""The switches of the theory: choices that CRATE's derivation leaves open, with their equations.

CRATE makes choices that its derivation does not force. `TiedMSSA` has the output projection that
the gradient of R^c asks for, and `IteratedISTA` takes more steps, another threshold, or step sizes
that are learned. The letters are those of `crate_jax.models.layers`.
"""

import math
from collections.abc import Callable, Collection
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name as keep
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.derivatives import plain
from crate_jax.models.layers import Attended, mssa_of, relu, times
from crate_jax.models.parameters import dictionary_init, parameter, read


class StepSizes(NamedTuple):
    """η and λ of ISTA, scalars."""

    eta: float | Array
    lmbda: float | Array


def ista(
    Y_BxNxd: Array, D_dxd: Array, sizes: StepSizes, *, steps: int = 1, soft: bool = False
) -> Array:
    """Steps of ISTA on ½‖Y − D A‖² + λ‖A‖₁, from A⁰ = Y.

    Aⁱ⁺¹ = S(Aⁱ + η Dᵀ(Y − D Aⁱ)). The threshold S is that of the ℓ₁ norm's proximal operator: over
    A ≥ 0 it is ReLU(x − ηλ), and over all A it is sign(x) max(|x| − ηλ, 0), the soft threshold.
    With tokens as rows D A is ``A @ D.T`` and Dᵀ E is ``E @ D``. One step over A ≥ 0 is
    `crate_jax.models.layers.ista_step`.
    Source: arXiv 2306.01129, section 2.4 and equation 17.

    With D = 1 and η = 1 a step goes to Y and shrinks it, and a second one goes there again:

    >>> Y, D = jnp.array([[[0.5, -2.0]]]), jnp.eye(2)
    >>> ista(Y, D, StepSizes(1.0, 0.75), steps=2, soft=True).tolist()
    [[[0.0, -1.25]]]

    Args:
        Y_BxNxd: tokens, normalised.
        D_dxd: dictionary, atoms as columns, of the tokens' dtype.
        sizes: η and λ, numbers or float32 scalars.
        steps: how many, at least one.
        soft: whether the code may be negative.

    Returns:
        Sparse tokens (B, N, d), of the tokens' dtype.
    """
    eta, lmbda = (x.astype(Y_BxNxd.dtype) if isinstance(x, Array) else plain(x) for x in sizes)
    A_BxNxd = Y_BxNxd
    for step in range(steps):
        A_BxNxd = keep(A_BxNxd, "code") if step else A_BxNxd
        E_BxNxd = keep(Y_BxNxd - times(A_BxNxd, D_dxd.T), "error")
        descent_BxNxd = times(E_BxNxd, D_dxd)
        if isinstance(eta, Array):  # whose gradient asks for it
            descent_BxNxd = keep(descent_BxNxd, "error")
        moved_BxNxd = A_BxNxd + eta * descent_BxNxd
        A_BxNxd = relu(moved_BxNxd - eta * lmbda)
        if soft:
            A_BxNxd -= relu(-moved_BxNxd - eta * lmbda)
    return A_BxNxd


class IteratedISTA(nn.Module):
    """`ista` with its dictionary D (d, d), which starts uniform in ±√(6/d).

    With ``learned`` the logarithms of η and λ are parameters of this layer, float32 scalars
    ``log_eta`` and ``log_lmbda``, which start from the fields. So both stay positive.
    """

    eta: float
    lmbda: float
    dtype: DTypeLike = jnp.float32
    steps: int = 1
    soft: bool = False
    learned: bool = False

    @nn.compact
    def __call__(self, Y_BxNxd: Array, sizes: StepSizes | None = None) -> Array:
        """Normalised tokens (B, N, d) to sparse tokens (B, N, d).

        Args:
            Y_BxNxd: tokens.
            sizes: of all layers; None: those of this one.
        """
        d = Y_BxNxd.shape[-1]
        D_dxd = read(self, "D", dictionary_init, (d, d), self.dtype)
        if sizes is None:
            sizes = StepSizes(self.eta, self.lmbda)
            if self.learned:
                sizes = learned_sizes(self, sizes)
        return ista(Y_BxNxd.astype(self.dtype), D_dxd, sizes, steps=self.steps, soft=self.soft)


def learned_sizes(module: nn.Module, start: StepSizes) -> StepSizes:
    """η and λ as parameters of a module, by their logarithms."""
    logarithms = (
        parameter(module, f"log_{name}", init.constant(math.log(number)), ())
        for name, number in start._asdict().items()
    )
    return StepSizes(*map(jnp.exp, logarithms))


class TiedMSSA(nn.Module):
    """MSSA whose output is tied to its bases: s Σ_k U_k SSA_k.

    That is the direction of the gradient of R^c, of which MSSA keeps all but the factor
    p/(N ε²); a learned scalar s, ``step``, stands for it. There is no W_out and no bias. With
    tokens as rows U_k SSA_k is ``O_k @ U_k.T``.
    Source: arXiv 2306.01129, equation 11; tied in the study of OpenReview CAC74VuMWX ("CRATE-T").
    Differs from official: that study's code multiplies by U a second time where the equation has
        its transpose.
    """

    TAPS: ClassVar[tuple[str, ...]] = ("subspace_tokens", "attention")

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    kernel: str | None = "auto"
    kernel_init: Callable[..., Array] | None = None  # of U; None: nn.Linear's
    step_init: Callable[..., Array] = init.ones

    @nn.compact
    def __call__(
        self, Y_BxNxd: Array, mask: Array | None = None, taps: Collection[str] = ()
    ) -> Attended:
        """Normalised tokens (B, N, d) to their update, as `crate_jax.models.layers.mssa`."""
        Y_BxNxd = Y_BxNxd.astype(self.dtype)
        shape = (Y_BxNxd.shape[-1], self.num_heads, self.head_dim)
        U_init = init.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(1, 2))
        U_dxKxp = read(self, "U", self.kernel_init or U_init, shape, self.dtype)
        step = parameter(self, "step", self.step_init, ()).astype(self.dtype)
        back_Kxpxd = step * U_dxKxp.transpose(1, 2, 0)
        return mssa_of(self, Y_BxNxd, U_dxKxp, back_Kxpxd, mask=mask, taps=taps)
