"""CRATE-BERT: RoBERTa with CRATE's layers; every token attends to all that are no padding."""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.block import Part
from crate_jax.models.fields import BertFields
from crate_jax.models.language import LanguageModel, TokenEmbedding, Unembedding
from crate_jax.models.layers import ISTA, MSSA, LayerNorm, Linear
from crate_jax.models.parameters import parameter


def places_of(tokens_BxN: Array, pad_token: int) -> Array:
    """The places of tokens in the table of positions (B, N): counted from pad + 1, without padding.

    Padding lies at the place ``pad_token``, which is nobody else's. Source: RoBERTa's code.

    >>> places_of(jnp.array([[5, 6, 7], [5, 6, 1]]), 1).tolist()
    [[2, 3, 4], [2, 3, 1]]
    """
    real_BxN = (tokens_BxN != pad_token).astype(jnp.int32)
    return jnp.cumsum(real_BxN, axis=1) * real_BxN + pad_token


class BertEmbedding(TokenEmbedding):
    """LN(token + position + type); there is one type of token, a vector (d,) for all of them."""

    epsilon: float = 1e-5
    backward: str = "derived"

    def setup(self) -> None:
        """The parameters."""
        super().setup()
        self.type_d = parameter(self, "token_type", init.normal(0.02), (self.width,))
        self.norm = LayerNorm(self.dtype, self.backward, self.epsilon)

    def __call__(self, tokens_BxN: Array, places: Array) -> Array:
        """Token ids (B, N) at places (B, N) to tokens (B, N, d)."""
        Z_BxNxd = super().__call__(tokens_BxN, places)
        return self.norm(Z_BxNxd + self.type_d.astype(self.dtype)[None, None])


class BertHead(nn.Module):
    """Logits E LN(GELU(Z W + b)) + b_V, with E the table of token embeddings or one of its own."""

    width: int
    vocab_size: int
    dtype: DTypeLike
    epsilon: float
    backward: str

    @nn.compact
    def __call__(
        self, Z_BxNxd: Array, tied: Callable[[Array], Array] | None, pre_logits: bool
    ) -> Array:
        """Tokens (B, N, d) to logits (B, N, V), or to what the table reads.

        Args:
            Z_BxNxd: tokens of the last block.
            tied: to the products with the table of token embeddings; None: the head has its own.
            pre_logits: stop before the products.
        """
        start = init.normal(0.02)
        X_BxNxd = Linear(self.width, self.dtype, start, init.zeros, name="dense")(Z_BxNxd)
        X_BxNxd = jax.nn.gelu(X_BxNxd, approximate=False)
        X_BxNxd = LayerNorm(self.dtype, self.backward, self.epsilon, name="norm")(X_BxNxd)
        bias_V = parameter(self, "bias", init.zeros, (self.vocab_size,))
        if pre_logits:
            return X_BxNxd
        read_by = tied or Unembedding(self.vocab_size, self.dtype, name="decoder")
        return read_by(X_BxNxd) + bias_V[None, None]


class CrateBert(BertFields, LanguageModel):
    """CRATE as an encoder of text, with RoBERTa's embedding and head.

    A layer is CRATE's, and MSSA has no bias. Every token sees all tokens of its text, those before
    it and those after it, and none sees padding: what fills a text up changes nothing at its own
    tokens. The logits at a token are those of what stands there, for masked language modelling.
    Source: arXiv 2311.13110; the sizes and the embedding are those of transformers' pull request
    27759. Parameters start as there, in distribution.
    Differs from official: dropout acts on MSSA's output, and not on its attention too; padding is
        told by its token, and there it is told apart; padding sees itself, so that a text of
        nothing else has finite numbers.

    Attributes: as `crate_jax.CrateCausal`, but for nonlinearity, and
        context_length: the most tokens of a text; the table of positions has as many rows and those
            that no token has, pad_token + 1.
        pad_token: what fills a text up.
    """

    causal: ClassVar[bool] = False

    @property
    def attention_part(self) -> Part:
        """MSSA without biases."""
        make = functools.partial(
            MSSA,
            self.num_heads,
            self.subspace_dim,
            self.dtype,
            self.kernel,
            bias=False,
            kernel_init=init.normal(0.02),
        )
        return Part("mssa", make, MSSA.TAPS)

    @property
    def nonlinearity_part(self) -> Part:
        """ISTA."""
        return Part("ista", functools.partial(ISTA, self.eta, self.lmbda, self.dtype))

    def embed(self) -> TokenEmbedding:
        """Embed tokens, positions and the type, and normalise the sum."""
        return BertEmbedding(
            self.vocab_size,
            self.context_length + self.pad_token + 1,
            self.width,
            self.dtype,
            epsilon=self.EPSILON,
            backward=self.backward,
            name="embedding",
        )

    def places(self, tokens_BxN: Array, before: Array | int) -> Array:
        """Counted from behind the padding's place; nothing is before the tokens of a call."""
        del before
        return places_of(tokens_BxN, self.pad_token)

    def mask(self, tokens_BxN: Array, before: Array | int, length: int) -> Array:
        """The mask: tokens attend to all that is no padding, and padding to itself."""
        del before
        real_Bx1x1xN = (tokens_BxN != self.pad_token)[:, None, None]
        return real_Bx1x1xN | jnp.eye(length, dtype=bool)[None, None]

    def logits_of(self, Z_BxNxd: Array, embedding: TokenEmbedding, pre_logits: bool) -> Array:
        """By RoBERTa's head."""
        sizes = (self.width, self.vocab_size, self.dtype, self.EPSILON, self.backward)
        tied = embedding.logits if self.tied else None
        return BertHead(*sizes, name="head")(Z_BxNxd, tied, pre_logits)

    @property
    def head_products(self) -> int:
        """Multiply-adds of the head's linear maps."""
        return super().head_products + self.num_tokens * self.width**2
