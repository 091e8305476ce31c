"""The decoder of CRATE-MAE. It undoes an encoder of CRATE, layer by layer."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Block, Context, Part, stack
from crate_jax.models.classifier import pair
from crate_jax.models.layers import LayerNorm, Linear, times
from crate_jax.models.operator_cost import COSTS
from crate_jax.models.parameters import dictionary_init, read

xavier = functools.partial(init.variance_scaling, 1.0, "fan_avg", "uniform")


class Dictionary(nn.Module):
    """D Y, here ``Y @ D.T``: sparse codes back to tokens. D (d, d) starts uniform in ±√(6/d)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Y_BxNxd: Array) -> Array:
        """Normalised tokens (B, N, d) to tokens (B, N, d)."""
        D_dxd = read(self, "D", dictionary_init, Y_BxNxd.shape[-1:] * 2, self.dtype)
        return times(Y_BxNxd.astype(self.dtype), D_dxd.T)


DICTIONARY = Part("dictionary", Dictionary)


class Decoder(nn.Module):
    """The layers of the decoder, a LayerNorm, and a linear map from tokens to pixels.

    A layer: Z^{l+1/2} = D LN(Z^l), then Z^{l+1} = Z^{l+1/2} − MSSA(LN(Z^{l+1/2})).
    Source: arXiv 2404.02446, section 3.
    """

    depth: int
    pixels: int
    attention: Part
    dtype: DTypeLike
    remat: str
    unroll: int
    block_fields: dict[str, Any]
    train: bool
    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, latent_BxNxd: Array) -> tuple[Array, dict[str, Array]]:
        """The encoder's tokens (B, N, d), normalised, to patches (B, P, h · w · c), float32.

        Beside them the taps, with the layers on axis 0.
        """
        blocks = stack(
            Block,
            self.depth,
            remat=self.remat,
            unroll=min(self.unroll, self.depth),
            attention=self.attention,
            nonlinearity=DICTIONARY._replace(make=functools.partial(Dictionary, self.dtype)),
            dtype=self.dtype,
            attention_first=False,
            sign=-1,
            train=self.train,
            taps=self.taps,
            **self.block_fields,
        )
        Z_BxNxd, seen = blocks(latent_BxNxd.astype(self.dtype), None, Context())
        backward = self.block_fields["backward"]
        Y_BxPxd = LayerNorm(self.dtype, backward, 1e-6, name="norm")(Z_BxNxd)[:, 1:]
        prediction = Linear(self.pixels, self.dtype, xavier(), init.zeros, name="prediction")
        return prediction(Y_BxPxd).astype(jnp.float32), seen


def pixels_of(model: Any) -> int:
    """The number of values of a patch of a model."""
    return math.prod(pair(model.patch_size)) * model.in_channels


def decoder_of(model: Any, train: bool, taps: tuple[str, ...] = ()) -> Decoder:
    """The decoder of an autoencoder, to be called within its compact method.

    Args:
        model: with the fields of an encoder, and ``decoder_depth``.
        train: whether dropout acts.
        taps: names out of `tap_names_of`.
    """
    return Decoder(
        model.decoder_depth,
        pixels_of(model),
        model.attention_part,
        model.dtype,
        model.remat,
        model.layers_at_once,
        dict(backward=model.backward, epsilon=model.EPSILON, dropout=model.dropout),
        train,
        taps,
        name="decoder",
    )


def tap_names_of(attention: Part) -> tuple[str, ...]:
    """The names of the taps of a decoder's layers, in the order of computation."""
    return (DICTIONARY.name, "z_half", *attention.taps, attention.name, "out")


class DecoderCost(NamedTuple):
    """The cost of a layer of the decoder for one example.

    Attributes:
        products: multiply-adds of its matrix products.
        again: of these the ones that the backward pass computes again, by ``remat``.
        kept: values that it keeps, likewise: without recomputation the tokens before and after both
            norms, their means and deviations, and what MSSA keeps.
    """

    products: int
    again: dict[str, int]
    kept: dict[str, int]


def decoder_cost(model: Any) -> DecoderCost:
    """`DecoderCost` of a model with these tokens, this width and these subspaces.

    What comes last in a layer is only subtracted, and never computed again: the product with W_out,
    or without one that of the attention with the subspace tokens.
    """
    mssa, dictionary = COSTS["mssa"](model), COSTS["dictionary"](model)
    products = mssa.products + mssa.attention + dictionary.products
    of_attention = mssa.attention if mssa.last else mssa.attention // 2
    tokens, itemsize = model.num_tokens * model.width, jnp.dtype(model.dtype).itemsize
    numbers = (mssa.kept_bytes + 16 * model.num_tokens) // itemsize
    return DecoderCost(
        products,
        again={
            "none": mssa.scores,
            "dots": of_attention,
            "full": products - mssa.last - mssa.attention + of_attention,
        },
        kept={
            "none": 4 * tokens + mssa.kept + numbers,
            "dots": tokens + mssa.outputs + dictionary.outputs,
            "full": tokens,
        },
    )
