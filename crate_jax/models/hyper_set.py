"""Hyper-SET: one block that is applied again and again, each time with steps of its own.

Source: arXiv 2502.11646 and its code. The letters are those of `crate_jax.models.layers`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Part
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import PatchEmbedding, sinusoids
from crate_jax.models.energy import BisoftmaxAttention, RMSNorm, TiedMLP
from crate_jax.models.fields import HyperSetFields
from crate_jax.models.layers import Linear
from crate_jax.models.modulation import Modulation, PerLayer


class Steps(nn.Module):
    """The step sizes α and β of every token and channel: Linear(GELU(c_t + RMSNorm(X))).

    c_t (d,) is what `DepthCode` makes of the depth. The linear map starts at zero, so that the
    block starts as the identity.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, X_BxNxd: Array, c_d: Array, _: Array | None) -> tuple[Modulation, ...]:
        """Tokens (B, N, d) to the gates of the two halves (B, N, d)."""
        d = X_BxNxd.shape[-1]
        state_BxNxd = c_d[None, None] + RMSNorm(self.dtype, name="norm")(X_BxNxd)
        linear = Linear(2 * d, self.dtype, init.zeros, init.zeros, name="linear")
        both_BxNx2d = linear(_gelu(state_BxNxd))
        return Modulation(both_BxNx2d[..., :d]), Modulation(both_BxNx2d[..., d:])


class DepthCode(nn.Module):
    """The code that distinguishes the depths t = 1, …, L: c (L, d).

    512 sines and cosines of t → Linear → RMSNorm → GELU → RMSNorm → Linear → RMSNorm. Both linear
    maps start at zero.
    """

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, depth: int) -> Array:
        """L to (L, d)."""

        def linear(name: str) -> Linear:
            return Linear(self.width, self.dtype, init.zeros, init.zeros, name=name)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(self.dtype, name=name)

        t_Lx512 = jnp.concatenate(sinusoids(np.arange(1, depth + 1), 256, slowest=255), axis=1)
        c_Lxd = norm("norm_0")(linear("linear_0")(t_Lx512))
        c_Lxd = norm("norm_1")(_gelu(c_Lxd))
        return norm("norm_2")(linear("linear_1")(c_Lxd))


def positions(N: int, d: int) -> Array:
    """Fixed positions (N, d): sines and cosines in turn. Source: arXiv 1706.03762, section 3.5."""
    both = sinusoids(np.arange(N), (d + 1) // 2)
    return jnp.stack(both, axis=-1).reshape(N, -1)[:, :d]


class HyperSet(HyperSetFields, ImageClassifier):
    """The Hyper-SET image classifier.

    A layer: X ← X − α ∘ attention(X), then X ← X + β ∘ MLP(X), both with tied weights and without a
    LayerNorm. All layers share one set of parameters; they differ in α and β, which are computed
    from the depth and the tokens that the layer takes.
    Source: arXiv 2502.11646 and its code. Parameters start as there, in distribution.

    Attributes: as `crate_jax.Crate`, and
        depth: L, how often the block is applied; no parameter depends on it.
        mlp_ratio: hidden units of the MLP over the width.
    """

    SHARED, NORMED_PATCHES = True, True
    WITHOUT_EXAMPLES = ("depth_code",)

    @property
    def attention_part(self) -> Part:
        """Attention that is softmax over keys and over queries."""
        make = functools.partial(BisoftmaxAttention, self.num_heads, self.subspace_dim, self.dtype)
        return Part("bisoftmax", make, BisoftmaxAttention.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """The tied MLP."""
        return Part("tied_mlp", functools.partial(TiedMLP, self.mlp_ratio * self.width, self.dtype))

    def block_fields(self) -> dict[str, Any]:
        """A descent and an ascent, with computed step sizes."""
        steps = Part("steps", functools.partial(Steps, self.dtype))
        return {"sign": -1, "residual": True, "norm": "none", "modulation": steps}

    def per_layer(self) -> PerLayer:
        """The code of each depth."""
        return PerLayer(condition=DepthCode(self.width, self.dtype, name="depth_code")(self.depth))

    def embed(self, train: bool) -> nn.Module:
        """Patches between two LayerNorms, at fixed positions."""
        del train
        patch_size = pair(self.patch_size)
        return PatchEmbedding(
            patch_size, self.width, self.dtype, self.backward, positions=positions, name="embedding"
        )


def _gelu(X: Array) -> Array:
    """The exact GELU."""
    return jax.nn.gelu(X, approximate=False)
