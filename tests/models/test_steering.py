"""One coordinate inside a layer set to a value: against the equations with it written in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, CrateAlpha, CrateLM, Steer, ViT, analysis, steering

LM = CrateLM(context_length=6, vocab_size=9, width=8, depth=3, num_heads=2)
IMAGES = dict(image_size=8, patch_size=4, num_classes=3, width=8, depth=2, num_heads=2)
TAPS = ("subspace_tokens", "mssa", "z_half", "code", "odl", "out")


def start(model):
    return jax.jit(lambda key: model.init(key, model.sample_input(), train=False)["params"])(
        jax.random.key(0)
    )


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 8 * x, start(LM))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 6), 0, 9)


def seen_with(params, tokens, *steers):
    variables = {"params": params} | steering(LM, *steers)
    return LM.apply(variables, tokens, train=False, taps=TAPS, method="forward")


def test_nothing_is_set_where_nothing_is_said():
    assert steering(LM) == {}


def test_an_atom_of_the_code(params, tokens):
    """Layer 1's code has the value at every token; tokens are what that code stands for."""
    plain, before = seen_with(params, tokens)
    logits, seen = seen_with(params, tokens, Steer("code", 1, 5, 2.5))
    np.testing.assert_array_equal(seen["code"][1, ..., 5], 2.5)
    changed = before["code"][1].at[..., 5].set(2.5)
    np.testing.assert_allclose(seen["code"][1], changed, atol=1e-6)
    D = params["blocks"]["odl"]["D"][1]
    np.testing.assert_allclose(seen["odl"][1], changed @ D.T, atol=1e-5)
    np.testing.assert_allclose(seen["out"][0], before["out"][0], atol=1e-6)
    assert np.abs(seen["code"][2] - before["code"][2]).max() > 1e-3  # of its own layer alone
    assert (np.asarray(seen["code"])[[0, 2], ..., 5] != 2.5).all()
    assert np.abs(logits - plain).max() > 1e-3


def test_a_coordinate_of_the_subspace_tokens(params, tokens):
    """Coordinate 6 is the third of the second subspace; the tokens attend with what is set."""
    _, before = seen_with(params, tokens)
    _, seen = seen_with(params, tokens, Steer("subspace_tokens", 0, 6, -1.5))
    V = before["subspace_tokens"][0].at[:, :, 1, 2].set(-1.5)
    np.testing.assert_allclose(seen["subspace_tokens"][0], V, atol=1e-6)
    V = np.asarray(V, np.float64)
    expected = np.zeros((2, 6, 8))
    for b, n, k in np.ndindex(2, 6, 2):
        scores = np.exp(V[b, : n + 1, k] @ V[b, n, k] / 2)
        O = scores @ V[b, : n + 1, k] / scores.sum()  # noqa: E741, the letter of the equation
        expected[b, n] += O @ np.asarray(params["blocks"]["mssa"]["W_out"][0, k])
    np.testing.assert_allclose(seen["mssa"][0], expected, atol=1e-5)


def test_several_at_once_and_the_last_of_two_values(params, tokens):
    steers = (
        Steer("code", 0, 1, 3.0),
        Steer("code", 0, 30, 4.0),
        Steer("code", 2, 1, 5.0),
        Steer("subspace_tokens", 2, 0, 1.0),
        Steer("code", 0, 1, 6.0),
    )
    _, seen = seen_with(params, tokens, *steers)
    for layer, atom, value in ((0, 1, 6.0), (0, 30, 4.0), (2, 1, 5.0)):
        np.testing.assert_array_equal(seen["code"][layer, ..., atom], value)
    np.testing.assert_array_equal(seen["subspace_tokens"][2, ..., 0, 0], 1.0)


def test_another_coordinate_is_the_same_program(params, tokens):
    traced = []

    @jax.jit
    def logits(variables):
        traced.append(variables)
        return LM.apply(variables, tokens, train=False)

    a, b = (logits({"params": params} | steering(LM, Steer("code", 0, i, 9.0))) for i in (3, 4))
    assert len(traced) == 1 and np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "steer"),
    [
        (CrateAlpha(**IMAGES), Steer("code", 0, 1, 2.0)),
        (CrateAlpha(**IMAGES), Steer("subspace_tokens", 1, 3, 2.0)),
        (Crate(**IMAGES, tied_output=True), Steer("subspace_tokens", 1, 3, 2.0)),
    ],
    ids=["code", "mssa", "tied"],
)
def test_models_of_images_that_have_the_operators_are_steered_too(model, steer):
    params, images = start(model), jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    variables = {"params": params} | steering(model, steer)
    kwargs = dict(train=False, taps=(steer.tap,), method="forward")
    _, seen = model.apply(variables, images, **kwargs)
    of_layer = seen[steer.tap][steer.layer].reshape(2, 5, -1)
    np.testing.assert_array_equal(of_layer[..., steer.coordinate], 2.0)
    _, before = analysis.taps(model, params, images, steer.tap)
    assert (of_layer[..., 0] == before[steer.tap][steer.layer].reshape(2, 5, -1)[..., 0]).all()


@pytest.mark.parametrize(
    ("model", "steer", "message"),
    [
        (LM, Steer("odl", 0, 0, 1.0), r"^steer\.tap must be one of subspace_tokens, code for a Cr"),
        (
            Crate(**IMAGES),
            Steer("code", 0, 0, 1.0),
            r"one of subspace_tokens for a Crate; got code",
        ),
        (ViT(**IMAGES), Steer("code", 0, 0, 1.0), r"one of none for a ViT; got code\. Choose"),
        (LM, Steer("code", 3, 0, 1.0), r"^steer\.layer must be >= 0 and < 3; got 3\. Change it"),
        (LM, Steer("code", -1, 0, 1.0), r"^steer\.layer must be >= 0 and < 3; got -1\."),
        (LM, Steer("code", 0, 32, 1.0), r"^steer\.coordinate must be >= 0 and < 32; got 32\."),
        (LM, Steer("subspace_tokens", 0, 8, 1.0), r"^steer\.coordinate must be .* < 8; got 8\."),
    ],
)
def test_what_there_is_not_to_steer(model, steer, message):
    with pytest.raises(ValueError, match=message):
        steering(model, steer)


def test_half_precision_is_set_too(params, tokens):
    half = LM.clone(dtype=jnp.bfloat16)
    variables = {"params": params} | steering(half, Steer("code", 1, 5, 2.5))
    _, seen = half.apply(variables, tokens, train=False, taps=("code",), method="forward")
    assert seen["code"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(seen["code"][1, ..., 5], 2.5)
