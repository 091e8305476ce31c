"""Texts that grow: the cached program against one that computes every token at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import CrateBert, CrateLM, Steer, ViT, generate, steering

MODEL = CrateLM(context_length=8, vocab_size=13, width=12, depth=2, num_heads=3)


@pytest.fixture(scope="module")
def params():
    start = jax.jit(lambda key: MODEL.init(key, MODEL.sample_input(), train=False)["params"])
    leaves, tree = jax.tree.flatten(start(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def prompt():
    return jax.random.randint(jax.random.key(5), (3, 4), 0, 13)


def logits_after(variables, tokens):
    """Of the next token, from the last of a context, as the official code has it."""
    window = np.asarray(tokens)[:, -MODEL.context_length :]
    return np.asarray(_last(variables, jnp.asarray(window)))


@jax.jit
def _last(variables, window):
    return MODEL.apply(variables, window, train=False)[:, -1]


def by_steps(variables, tokens, steps, key=None, temperature=1.0):
    """Everything computed anew for each token: the most likely one, or one drawn with the key."""
    for step in range(steps):
        logits = logits_after(variables, tokens)
        if key is None:
            token = logits.argmax(axis=-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        tokens = np.concatenate([tokens, np.asarray(token)[:, None].astype(np.int32)], axis=1)
    return tokens


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 12])
def test_a_text_within_and_past_the_context(params, prompt, steps):
    """With 4 tokens the context is full; the fifth is the last that what is kept can give.

    The most likely tokens of so small a model are few, those drawn from it are not.
    """
    got = generate(MODEL, params, prompt, steps)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, by_steps({"params": params}, prompt, steps))
    draws = dict(key=jax.random.key(9), temperature=0.5)
    drawn = generate(MODEL, params, prompt, steps, **draws)
    np.testing.assert_array_equal(drawn, by_steps({"params": params}, prompt, steps, **draws))
    assert steps < 12 or all(len(np.unique(text[4:])) > 2 for text in drawn)


@pytest.mark.parametrize("length", [8, 11])
def test_a_text_as_long_as_the_context_or_longer(params, length):
    text = jax.random.randint(jax.random.key(6), (2, length), 0, 13)
    got = generate(MODEL, params, text, 3)
    np.testing.assert_array_equal(got, by_steps({"params": params}, text, 3))


def test_it_runs_within_a_program(params, prompt):
    inside = jax.jit(functools.partial(generate, MODEL, steps=6))
    np.testing.assert_array_equal(inside(params, prompt), generate(MODEL, params, prompt, 6))


def test_a_temperature_may_be_a_scalar_of_the_program(params, prompt):
    drawn = functools.partial(generate, MODEL, params, prompt, 6, key=jax.random.key(1))
    inside = jax.jit(lambda temperature: drawn(temperature=temperature))
    for temperature in (0.5, 2.0):
        np.testing.assert_array_equal(inside(temperature), drawn(temperature=temperature))
    with pytest.raises(ValueError, match=r"^key must be given to draw tokens"):
        jax.jit(lambda t: generate(MODEL, params, prompt, 6, temperature=t))(0.5)


def test_variables_are_taken_for_their_parameters(params, prompt):
    np.testing.assert_array_equal(
        generate(MODEL, {"params": params}, prompt, 3), generate(MODEL, params, prompt, 3)
    )


def test_a_step_computes_one_token(params, prompt, equations):
    """Multiply-adds of four more steps: those of one token a text, and of what it attends to."""

    def products(steps):
        program = jax.make_jaxpr(functools.partial(generate, MODEL, steps=steps))(params, prompt)
        total = 0
        for equation, times in equations(program.jaxpr):
            if equation.primitive.name == "dot_general":
                (axes, _), _ = equation.params["dimension_numbers"]
                summed = np.prod([equation.invars[0].aval.shape[axis] for axis in axes])
                total += times * int(summed) * equation.outvars[0].aval.size
        return total

    d, L, T, V = 12, 2, 8, 13
    token = L * (2 * d * d + 2 * T * d + 4 * 4 * d * d) + d * V
    assert products(5) - products(1) == 4 * 3 * token


def test_draws_have_the_probabilities_of_the_model(params):
    """The first token of many equal texts, at two temperatures."""
    many, text = 4000, jnp.array([[3, 1, 7]], jnp.int32)
    texts = jnp.tile(text, (many, 1))
    logits = logits_after({"params": params}, text)[0]
    for temperature in (1.0, 0.5):
        got = generate(MODEL, params, texts, 1, key=jax.random.key(8), temperature=temperature)
        shares = np.bincount(got[:, -1], minlength=13) / many
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        np.testing.assert_allclose(shares, expected, atol=4 * (0.25 / many) ** 0.5)


def test_few_of_the_most_likely_are_drawn_from(params, prompt):
    text = np.asarray(prompt[:1])
    texts = jnp.tile(prompt[:1], (400, 1))
    got = np.asarray(generate(MODEL, params, texts, 7, key=jax.random.key(2), top_k=3))
    best = np.argsort(logits_after({"params": params}, text)[0])[-3:]
    assert set(got[:, 4]) == set(best)
    for row in got[:20]:
        for n in range(4, 11):  # past the context too
            best = np.argsort(logits_after({"params": params}, row[None, :n])[0])[-3:]
            assert row[n] in best


def test_one_of_the_most_likely_is_the_most_likely_and_another_key_another_text(params, prompt):
    greedy = generate(MODEL, params, prompt, 9)
    key = jax.random.key(3)
    np.testing.assert_array_equal(generate(MODEL, params, prompt, 9, key=key, top_k=1), greedy)
    one = generate(MODEL, params, prompt, 9, key=key)
    np.testing.assert_array_equal(one, generate(MODEL, params, prompt, 9, key=key, top_k=99))
    assert (one != generate(MODEL, params, prompt, 9, key=jax.random.key(4))).any()


def test_the_coldest_draws_are_the_most_likely_tokens(params, prompt):
    large = {**params, "embedding": jax.tree.map(lambda x: 30 * x, params["embedding"])}
    cold = generate(MODEL, large, prompt, 9, key=jax.random.key(3), temperature=2e-38)
    np.testing.assert_array_equal(cold, generate(MODEL, large, prompt, 9))


def test_a_steered_text_is_that_of_the_steered_model(params, prompt):
    steer = Steer("code", 1, 7, 9.0)
    got = generate(MODEL, params, prompt, 9, steer=[steer])
    expected = by_steps({"params": params} | steering(MODEL, steer), prompt, 9)
    np.testing.assert_array_equal(got, expected)
    assert (got != generate(MODEL, params, prompt, 9)).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": -1}, r"^steps must be a whole number >= 0; got -1\."),
        ({"steps": 2.0}, r"^steps must be a whole number >= 0; got 2\.0\."),
        ({"top_k": 0, "key": 1}, r"^top_k must be a whole number >= 1; got 0\."),
        ({"top_k": 2.5, "key": 1}, r"^top_k must be a whole number >= 1; got 2\.5\."),
        ({"temperature": 1e-45, "key": 1}, r"^temperature must be > 0; got 1e-45\."),
        ({"temperature": 0.0, "key": 1}, r"^temperature must be > 0; got 0\.0\. Without a key"),
        ({"temperature": 0.5}, r"^key must be given to draw tokens; got none, temperature 0\.5 an"),
        ({"top_k": 2}, r"^key must be given .* top_k 2\. Give a key, or leave these out"),
        ({"tokens": [[1, 13]]}, r"^tokens must be >= 0 and < 13; got 13\. Take the tokenizer"),
        ({"tokens": [[-1, 2]]}, r"^tokens must be >= 0 and < 13; got -1\."),
        ({"tokens": np.zeros((2, 0), int)}, r"^tokens must be \(B, N\) with N >= 1, integers; got"),
        ({"tokens": [0.5]}, r"^tokens must be \(B, N\) .* got float32 \(1,\)\. Begin with"),
        ({"steer": [Steer("out", 0, 0, 1.0)]}, r"^steer\.tap must be one of subspace_tokens, code"),
        ({"model": ViT(8, 4, 3, width=4, depth=1, num_heads=1)}, r"^model must be a .* got a ViT"),
        ({"model": CrateBert(8, 13, width=4, depth=1, num_heads=1)}, r"^a model must be causal"),
    ],
)
def test_what_cannot_be_continued_is_one_line(params, given, message):
    given = dict(given)
    if "key" in given:
        given["key"] = jax.random.key(given["key"])
    first = given.pop("model", MODEL), params, given.pop("tokens", [[1, 2]]), given.pop("steps", 2)
    with pytest.raises(ValueError, match=message):
        generate(*first, **given)


def test_no_text_is_no_text(params):
    assert generate(MODEL, params, jnp.zeros((0, 3), jnp.int32), 2).shape == (0, 5)
