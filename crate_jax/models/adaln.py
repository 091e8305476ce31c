"""The block with adaLN gates, and the white-box diffusion transformer that is made of it.

Source: arXiv 2411.06785 and its code. The letters are those of `crate_jax.models.layers`; G counts
the values of an example, P its patches, and t is the step of the diffusion.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Block, Context, Part, chosen_taps, stack, tap_names
from crate_jax.models.embedding import sinusoids
from crate_jax.models.layers import ISTA, MSSA, LayerNorm, Linear
from crate_jax.models.modulation import Modulation
from crate_jax.models.parameters import uniform_init

xavier = init.xavier_uniform()


class AdaLN(nn.Module):
    """Scale, shift and gate of both halves of a block, from one vector c of each example.

    Linear(SiLU(c)), which starts at zero: then both gates are closed, and the block is the
    identity. Source: arXiv 2212.09748, section 3.2 (adaLN-Zero).
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Z_BxNxd: Array, _: Array | None, c_Bxd: Array) -> tuple[Modulation, ...]:
        """Compute the arguments of `crate_jax.models.block.Block.modulation`; each is (B, 1, d)."""
        linear = Linear(6 * Z_BxNxd.shape[-1], self.dtype, init.zeros, init.zeros, name="linear")
        six = jnp.split(linear(jax.nn.silu(c_Bxd))[:, None], 6, axis=-1)
        return tuple(Modulation(gate, scale, shift) for shift, scale, gate in (six[:3], six[3:]))


class WhiteBoxDiffusion(nn.Module):
    """The noise in a vector, such as the expression of a cell's genes, at a step of a diffusion.

    A layer, with a, b, g of `AdaLN`: Z ← Z + g₁ ∘ MSSA((1 + a₁) ∘ LN(Z) + b₁), then
    Z ← Z + g₂ ∘ ISTA((1 + a₂) ∘ LN(Z) + b₂). ISTA's output is added here and replaces nothing:
    else closed gates would leave no tokens. The LayerNorms have no parameters.
    Source: arXiv 2411.06785 and its code, cratetrans.py. Parameters start as there, in
    distribution: the model starts as zero.
    Differs from official: the bias of MSSA starts as CRATE's does; there at zero.

    Attributes:
        length: G.
        patch_size: values of a patch; divides the length.
        width: d.
        depth: L.
        num_heads: K; divides the width, as 4 does.
        eta: step size of ISTA.
        lmbda: sparsity weight of ISTA.
        dtype: the dtype of the computation, float32 or bfloat16.
        backward: see `crate_jax.Crate`.
        remat: see `crate_jax.Crate`.
    """

    length: int = 2000
    patch_size: int = 10
    width: int = 768
    depth: int = 3
    num_heads: int = 8
    eta: float = 0.1
    lmbda: float = 0.1
    dtype: DTypeLike = jnp.float32
    backward: str = "derived"
    remat: str = "none"

    @property
    def attention_part(self) -> Part:
        """MSSA."""
        sizes = (self.num_heads, self.width // self.num_heads, self.dtype)
        kernel = "auto" if self.backward == "derived" else None
        start = uniform_init((3 / self.width) ** 0.5)  # xavier of a square map
        return Part("mssa", functools.partial(MSSA, *sizes, kernel, kernel_init=start), MSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """ISTA."""
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the taps of the layers, in the order of computation."""
        return tap_names(self.attention_part, self.nonlinearity_part)

    def __call__(self, X_BxG: Array, t_B: Array) -> Array:
        """Noisy vectors (B, G) and their steps t (B,), the first of which is 1, to noise (B, G).

        The noise is float32.

        Raises:
            ValueError: a field breaks a rule, or the arrays are of other shapes.
        """
        return self.forward(X_BxG, t_B)[0]

    @nn.compact
    def forward(
        self, X_BxG: Array, t_B: Array, *, taps: str | Iterable[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """The noise as of a call, and {name: array} with the layers on axis 0.

        Raises:
            ValueError: as a call.
            KeyError: a name that is not in `tap_names`.
        """
        self._check(X_BxG, t_B)
        names, B, P = chosen_taps(taps, self.tap_names), len(X_BxG), self.length // self.patch_size
        X_BxPxk = X_BxG.astype(self.dtype).reshape(B, P, self.patch_size)
        Z_BxPxd = self._linear("embedding", self.width, xavier)(X_BxPxk)
        Z_BxPxd += _positions(P, self.width).astype(self.dtype)[None]
        c_Bxd = self._condition(t_B)
        blocks = stack(
            Block,
            self.depth,
            remat=self.remat,
            attention=self.attention_part,
            nonlinearity=self.nonlinearity_part,
            dtype=self.dtype,
            backward=self.backward,
            residual=True,
            norm="plain",
            epsilon=1e-6,
            modulation=Part("adaln", functools.partial(AdaLN, self.dtype)),
            taps=names,
        )
        Z_BxPxd, seen = blocks(Z_BxPxd, None, Context(condition=c_Bxd))
        both = self._linear("last_adaln", 2 * self.width, init.zeros)(jax.nn.silu(c_Bxd))
        shift_Bx1xd, scale_Bx1xd = jnp.split(both[:, None], 2, axis=-1)
        Z_BxPxd = LayerNorm(self.dtype, self.backward, 1e-6, affine=False)(Z_BxPxd)
        Z_BxPxd = Z_BxPxd * (1 + scale_Bx1xd) + shift_Bx1xd
        noise_BxPxk = Linear(self.patch_size, jnp.float32, init.zeros, init.zeros, name="last")(
            Z_BxPxd
        )
        return noise_BxPxk.reshape(B, self.length), seen

    def _condition(self, t_B: Array) -> Array:
        """The vectors c (B, d): 256 cosines and sines of the step → Linear → SiLU → Linear."""
        sines_Bx128, cosines_Bx128 = sinusoids(t_B, 128)
        t_Bx256 = jnp.concatenate([cosines_Bx128, sines_Bx128], axis=1)
        start = init.normal(0.02)
        hidden_Bxd = jax.nn.silu(self._linear("step_0", self.width, start)(t_Bx256))
        return self._linear("step_1", self.width, start)(hidden_Bxd)

    def _linear(self, name: str, features: int, start: Any) -> Linear:
        """A linear map whose bias starts at zero."""
        return Linear(features, self.dtype, start, init.zeros, name=name)

    def _check(self, X_BxG: Array, t_B: Array) -> None:
        sizes = {"length": self.patch_size, "width": math.lcm(self.num_heads, 4)}
        for name, divisor in sizes.items():
            if getattr(self, name) % divisor:
                raise ValueError(
                    f"{name} must be a multiple of {divisor}; got {getattr(self, name)}. "
                    "Patches, heads and positions divide it."
                )
        if X_BxG.ndim != 2 or X_BxG.shape[1] != self.length or t_B.shape != X_BxG.shape[:1]:
            raise ValueError(
                f"vectors must be (B, {self.length}) and their steps (B,); got {X_BxG.shape} and "
                f"{t_B.shape}. Give one step for each vector."
            )


def _positions(P: int, d: int) -> Array:
    """Fixed positions (P, d): those of a grid that is one patch wide.

    The first half tells the column, which is 0 everywhere, and the second half the row.
    """
    halves = [jnp.concatenate(sinusoids(at, d // 4), axis=1) for at in (np.zeros(P), np.arange(P))]
    return jnp.concatenate(halves, axis=1)
