"""Continue texts by a causal model, token by token."""

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from crate_jax.models.language import LanguageModel
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.past import PAST
from crate_jax.models.steering import Steer, steering


def generate(
    model: LanguageModel,
    params: Params,
    tokens_BxN: Array,
    steps: int,
    *,
    key: Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    steer: Sequence[Steer] = (),
) -> Array:
    """Continue texts by so many tokens.

    A token is computed once: each operator keeps what it needs of those before
    (`crate_jax.models.past`). When a text is as long as the model's context, each further token is
    that of the last T tokens, which are computed anew, for their positions have moved. All of it is
    one compiled program; another length of the texts, ``steps`` or ``top_k`` is another program.
    Source: generation in the official code of arXiv 2311.13110 and 2410.16443, which computes all
    tokens at every step.

    Args:
        model: a causal model of text.
        params: its parameters, or its variables.
        tokens_BxN: texts of one length, token ids; the last T of them are seen.
        steps: the number of tokens that are added, >= 0.
        key: the key of the draws; None: the most likely token each time.
        temperature: the logits are divided by it before a token is drawn; a number, or a scalar of
            a compiled program.
        top_k: a token is drawn among so many of the most likely, and all that are as likely as the
            last of them; None: among all.
        steer: what is set inside the model, see `crate_jax.models.steering`.

    Returns:
        The texts and what continues them (B, N + steps), int32.

    Raises:
        ValueError: the model is not causal, an argument breaks its rule, or ``temperature`` or
            ``top_k`` is given without a key.
    """
    tokens_BxN = jnp.asarray(tokens_BxN)
    _check(model, tokens_BxN, steps, temperature, top_k)
    _check_tokens(tokens_BxN, model.vocab_size)
    warm = isinstance(temperature, Tracer) or temperature != 1
    if key is None and (warm or top_k is not None):
        raise ValueError(
            f"key must be given to draw tokens; got none, temperature {temperature} and top_k "
            f"{top_k}. Give a key, or leave these out for the most likely token."
        )
    tokens_BxN = tokens_BxN.astype(jnp.int32)
    if not steps:
        return tokens_BxN
    variables = {**variables_of(params), **steering(model, *steer)}
    scale = jnp.asarray(temperature, jnp.float32)
    return _generate(model, variables, tokens_BxN, key, scale, steps=steps, top_k=top_k)


def _check(
    model: object, tokens_BxN: Array, steps: int, temperature: float | Array, top_k: int | None
) -> None:
    """Refuse what breaks a rule."""
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"model must be a model of text; got a {type(model).__name__}. "
            "Choose one: crate_jax.list_models('*_causal_*')."
        )
    model.empty_past(1)
    for name, value, least in (("steps", steps, 0), ("top_k", top_k, 1)):
        if value is not None and not (isinstance(value, Integral) and value >= least):
            raise ValueError(f"{name} must be a whole number >= {least}; got {value}. Change it.")
    least = jnp.finfo(jnp.float32).tiny  # what is less, a device may take for 0
    if not (isinstance(temperature, Tracer) or temperature >= least):
        raise ValueError(
            f"temperature must be > 0; got {temperature}. Without a key the most likely is taken."
        )


def _check_tokens(tokens_BxN: Array, vocab_size: int) -> None:
    """Refuse arrays that are no text; traced ones are checked by shape and dtype alone."""
    shape, dtype = tokens_BxN.shape, tokens_BxN.dtype
    if len(shape) != 2 or shape[1] < 1 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"tokens must be (B, N) with N >= 1, integers; got {dtype} {shape}. "
            "Begin with the token that ends a text."
        )
    if shape[0] and not isinstance(tokens_BxN, Tracer):
        with jax.ensure_compile_time_eval():  # a program may hold them as constants
            found = (tokens_BxN.min(), tokens_BxN.max())
        for token in found:
            if not 0 <= int(token) < vocab_size:
                raise ValueError(
                    f"tokens must be >= 0 and < {vocab_size}; got {int(token)}. "
                    "Take the tokenizer of the model."
                )


@functools.partial(jax.jit, static_argnames=("model", "steps", "top_k"))
def _generate(
    model: LanguageModel,
    variables: dict[str, Any],
    tokens_BxN: Array,
    key: Array | None,
    temperature: Array,
    *,
    steps: int,
    top_k: int | None,
) -> Array:
    T = model.context_length
    choose = functools.partial(_choose, key=key, temperature=temperature, top_k=top_k)

    def extend(past: Any, tokens_BxN: Array) -> tuple[Array, Any]:
        given = variables | {PAST: past}
        logits_BxV, grown = model.apply(given, tokens_BxN, method="extend", mutable=[PAST])
        return logits_BxV, grown[PAST]  # type: ignore[index, return-value]

    def within(carry: tuple[Any, Array], step: Array) -> tuple[tuple[Any, Array], Array]:
        past, token_B = carry
        logits_BxV, past = extend(past, token_B[:, None])
        token_B = choose(logits_BxV, step)
        return (past, token_B), token_B

    def beyond(window_BxT: Array, step: Array) -> tuple[Array, Array]:
        Z_BxTxd: Any = model.apply(variables, window_BxT, train=False, method="forward_features")
        logits_Bx1xV: Any = model.apply(variables, Z_BxTxd[:, -1:], method="forward_head")
        token_B = choose(logits_Bx1xV[:, 0], step)
        return jnp.concatenate([window_BxT[:, 1:], token_B[:, None]], axis=1), token_B

    window_BxN = tokens_BxN[:, -T:]
    logits_BxV, past = extend(model.empty_past(len(tokens_BxN)), window_BxN)
    first_B = choose(logits_BxV, jnp.int32(0))
    cached = 1 + min(steps - 1, T - window_BxN.shape[1])  # tokens that what is kept can give
    at = jnp.arange(steps, dtype=jnp.int32)
    _, more_sxB = jax.lax.scan(within, (past, first_B), at[1:cached])
    tokens_BxN = jnp.concatenate([tokens_BxN, first_B[:, None], more_sxB.T], axis=1)
    if cached == steps:
        return tokens_BxN
    _, more_sxB = jax.lax.scan(beyond, tokens_BxN[:, -T:], at[cached:])
    return jnp.concatenate([tokens_BxN, more_sxB.T], axis=1)


def _choose(
    logits_BxV: Array, step: Array, *, key: Array | None, temperature: Array, top_k: int | None
) -> Array:
    """A token (B,), int32: the most likely one, or one drawn by the key and the step."""
    if key is None:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    # From the largest on, so that the smallest temperature leaves finite numbers.
    logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        most_BxK = jax.lax.top_k(logits_BxV, min(top_k, logits_BxV.shape[-1]))[0]
        logits_BxV = jnp.where(logits_BxV < most_BxK[:, -1:], -jnp.inf, logits_BxV)
    drawn_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BxV)
    return drawn_B.astype(jnp.int32)
