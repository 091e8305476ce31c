"""The frame of the models of text: token ids → tokens → blocks → logits at each place."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax import placement
from crate_jax.models.block import Context
from crate_jax.models.derivatives import wide
from crate_jax.models.fields import LanguageFields
from crate_jax.models.parameters import read
from crate_jax.models.past import PAST, no_subspace_tokens
from crate_jax.models.stacked import BlockModel


def unembed(Z_BxNxd: Array, table_Vxd: Array) -> Array:
    """Logits ⟨Z_n, table_v⟩ (B, N, V), added up and returned in the dtype `wide` of the tokens."""
    product = functools.partial(jnp.einsum, preferred_element_type=wide(Z_BxNxd.dtype))
    return product("bnd,vd->bnv", Z_BxNxd, table_Vxd)


class TokenEmbedding(nn.Module):
    """The table of tokens (V, d) and that of positions (T, d); both start as N(0, 0.02²)."""

    vocab_size: int
    num_positions: int
    width: int
    dtype: DTypeLike = jnp.float32
    token_init: Callable[..., Array] = init.normal(0.02)

    def setup(self) -> None:
        """The parameters, of which both methods read the first."""
        shapes = (self.vocab_size, self.width), (self.num_positions, self.width)
        self.tokens_Vxd = read(self, "tokens", self.token_init, shapes[0], self.dtype)
        self.positions_Txd = read(self, "positions", init.normal(0.02), shapes[1], self.dtype)

    def __call__(self, tokens_BxN: Array, places: Array) -> Array:
        """Token ids (B, N) at places (N,) or (B, N) to tokens (B, N, d)."""
        Z_BxNxd = placement.taken(self.tokens_Vxd, tokens_BxN)
        at_place = placement.taken(self.positions_Txd, places)
        return Z_BxNxd + (at_place if places.ndim > 1 else at_place[None])

    def logits(self, Z_BxNxd: Array) -> Array:
        """The product with every token of the table (B, N, V)."""
        return unembed(Z_BxNxd.astype(self.dtype), self.tokens_Vxd)


class Unembedding(nn.Module):
    """`unembed` with a table of its own, ``tokens`` (V, d), which starts as N(0, 0.02²)."""

    vocab_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, Z_BxNxd: Array) -> Array:
        """Tokens (B, N, d) to logits (B, N, V)."""
        shape = (self.vocab_size, Z_BxNxd.shape[-1])
        table_Vxd = read(self, "tokens", init.normal(0.02), shape, self.dtype)
        return unembed(Z_BxNxd.astype(self.dtype), table_Vxd)


class LanguageModel(LanguageFields, BlockModel):
    """A stack of blocks between a table of tokens and logits over that table.

    A model is a `BlockModel` that overrides what differs of `embed`, `places`, `mask`,
    `make_head_norm`, `logits_of` and `layer_past`. Unless it does, a token sees itself and what
    comes before it, and the logits at a token are those of the next one.
    """

    causal: ClassVar[bool] = True  # whether a token sees nothing that comes after it

    @nn.nowrap
    def embed(self) -> TokenEmbedding:
        """Embed tokens and positions. Call it in a compact method."""
        sizes = (self.vocab_size, self.context_length, self.width)
        return TokenEmbedding(*sizes, self.dtype, name="embedding")

    @nn.nowrap
    def places(self, tokens_BxN: Array, before: Array | int) -> Array:
        """The places of tokens in the table of positions, (N,) or (B, N), behind so many others."""
        return jnp.arange(tokens_BxN.shape[1], dtype=jnp.int32) + before

    @nn.nowrap
    def mask(self, tokens_BxN: Array, before: Array | int, length: int) -> Array | None:
        """The mask between so many tokens, for `crate_jax.models.derivatives.attend`."""
        places_N = jnp.arange(tokens_BxN.shape[1], dtype=jnp.int32) + before
        return (places_N[:, None] >= jnp.arange(length, dtype=jnp.int32)[None])[None, None]

    @nn.nowrap
    def make_head_norm(self) -> nn.Module | None:
        """The LayerNorm before the head; None if there is none."""
        return None

    @nn.nowrap
    def logits_of(self, Z_BxNxd: Array, embedding: TokenEmbedding, pre_logits: bool) -> Array:
        """Logits (B, N, V) float32, or the features that they are computed from."""
        norm = self.make_head_norm()
        features_BxNxd = Z_BxNxd if norm is None else norm(Z_BxNxd)
        if pre_logits:
            return features_BxNxd
        if self.tied:
            return embedding.logits(features_BxNxd)
        return Unembedding(self.vocab_size, self.dtype, name="head")(features_BxNxd)

    @property
    def num_tokens(self) -> int:
        """N: the tokens of a whole context."""
        return self.context_length

    @property
    def embedding_products(self) -> int:
        """None: rows of a table."""
        return 0

    @property
    def head_products(self) -> int:
        """Multiply-adds of the linear map to the logits."""
        return self.num_tokens * self.width * self.vocab_size

    @nn.nowrap
    def sample_input(self) -> Array:
        """A context of the token 0, (1, T) int32."""
        return jnp.zeros((1, self.context_length), jnp.int32)

    def __call__(self, tokens_BxN: Array, *, train: bool) -> Array:
        """Logits of a token for each place.

        Args:
            tokens_BxN: token ids in [0, V), of an integer dtype; 1 <= N <= T.
            train: whether dropout acts; it needs a "dropout" key.

        Returns:
            Logits (B, N, V), float32. Those of a text with other numbers among its tokens are NaN.

        Raises:
            ValueError: a field or the tokens break a rule.
        """
        return self.forward(tokens_BxN, train=train)[0]

    def forward(
        self, tokens_BxN: Array, *, train: bool, taps: str | Iterable[str] = ()
    ) -> tuple[Array, dict[str, Array]]:
        """The logits of a call, and the taps of the layers.

        Args:
            tokens_BxN: as for a call.
            train: as for a call.
            taps: names out of `tap_names`, or one.

        Returns:
            The logits, and {name: array} with the layers on axis 0.

        Raises:
            ValueError: a field or the tokens break a rule.
            KeyError: an unknown tap.
        """

        def compute() -> tuple[Array, dict[str, Array]]:
            embedding = self.embed()
            Z_BxNxd, seen = self._tokens(tokens_BxN, embedding, train, taps)
            return self.logits_of(Z_BxNxd, embedding, pre_logits=False), seen

        return self.with_layers(compute)

    def forward_features(self, tokens_BxN: Array, *, train: bool) -> Array:
        """The tokens (B, N, d) after the last block, in the model's dtype.

        Args:
            tokens_BxN: as for a call.
            train: as for a call.

        Raises:
            ValueError: a field or the tokens break a rule.
        """
        return self.with_layers(lambda: self._tokens(tokens_BxN, self.embed(), train, ())[0])

    def forward_head(self, Z_BxNxd: Array, *, pre_logits: bool = False) -> Array:
        """Logits (B, N, V) of the tokens of `forward_features`; or the head's input.

        Args:
            Z_BxNxd: tokens of the last block, all of them or some.
            pre_logits: stop before the head.

        Raises:
            ValueError: a field breaks a rule.
        """
        return self.with_layers(lambda: self.logits_of(Z_BxNxd, self.embed(), pre_logits))

    def extend(self, tokens_BxN: Array) -> Array:
        """The logits (B, V) of the next token, behind the tokens so far and these.

        Each layer computes these tokens alone: what it needs of those so far lies in the collection
        `crate_jax.models.past.PAST`, which must be given and mutable. So a text grows as
        ``logits, variables = model.apply(variables, tokens, method="extend", mutable=["past"])``.

        Args:
            tokens_BxN: the tokens that follow. With those so far they are T at most; the logits are
                NaN where they are more.

        Raises:
            ValueError: there is no past, or a field or the tokens break a rule.
        """
        if not self.has_variable(PAST, "length"):
            raise ValueError(
                "extend must have the collection past among the variables; got none. "
                "Begin with model.empty_past(batch_size)."
            )

        def compute() -> Array:
            embedding = self.embed()
            Z_BxNxd, _ = self._tokens(tokens_BxN, embedding, False, ())
            return self.logits_of(Z_BxNxd[:, -1:], embedding, pre_logits=False)[:, 0]

        return self.with_layers(compute)

    @nn.nowrap
    def layer_past(self, batch_size: int) -> dict[str, Any]:
        """The cache of a layer's attention, by name, before the first token; {} if it has none."""
        if self.attention_part.name != "mssa":
            return {}
        return {"subspace_tokens": no_subspace_tokens(self, batch_size)}

    @nn.nowrap
    def empty_past(self, batch_size: int) -> dict[str, Any]:
        """The empty cache, `crate_jax.models.past.PAST`, for so many texts.

        Raises:
            ValueError: the model is not causal, or its attention keeps nothing.
        """
        kept = self.layer_past(batch_size)
        if not (self.causal and kept):
            got = "an attention without a past" if self.causal else "tokens that see those after"
            raise ValueError(
                "a model must be causal, with an attention that keeps its past, to continue a "
                f"text; {type(self).__name__} has {got}. Call it on whole texts."
            )
        by_layer = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.depth, *x.shape)), kept)
        return {"length": jnp.int32(0), "blocks": {self.attention_part.name: by_layer}}

    @nn.nowrap
    def _tokens(
        self,
        tokens_BxN: Array,
        embedding: TokenEmbedding,
        train: bool,
        taps: str | Iterable[str],
    ) -> tuple[Array, dict[str, Array]]:
        """Tokens after the last block, and the taps."""
        _check(tokens_BxN, self.context_length)
        length, before = tokens_BxN.shape[1], self.get_variable(PAST, "length")
        if before is not None:
            self.put_variable(PAST, "length", before + length)
            length = self.context_length
        before = 0 if before is None else before
        Z_BxNxd = embedding(tokens_BxN, self.places(tokens_BxN, before))
        context = Context(self.mask(tokens_BxN, before, length))
        Z_BxNxd, seen = self.run_blocks(Z_BxNxd, train=train, taps=taps, context=context)
        # Nothing else would tell: a table gives its last row, and ISTA makes zeros of NaN.
        wrong_BxN = (tokens_BxN < 0) | (tokens_BxN >= self.vocab_size)
        wrong_B = wrong_BxN.any(axis=1) | (before + tokens_BxN.shape[1] > self.context_length)
        return jnp.where(wrong_B[:, None, None], jnp.nan, Z_BxNxd), seen


def _check(tokens_BxN: Array, context_length: int) -> None:
    """Refuse what is no array of token ids, or too long."""
    got = type(tokens_BxN).__name__
    if isinstance(tokens_BxN, jax.Array | np.ndarray):
        shape, dtype = tokens_BxN.shape, tokens_BxN.dtype
        fits = len(shape) == 2 and 1 <= shape[1] <= context_length
        if fits and jnp.issubdtype(dtype, jnp.integer):
            return
        got = f"{dtype} {shape}"
    raise ValueError(
        f"tokens must be an array (B, N) of integers with 1 <= N <= {context_length}, "
        f"model.context_length; got {got}. Make them one, or set model.context_length."
    )
