"""The named tensors of a forward pass, each against those it is computed from."""

import jax
import numpy as np
import pytest

from crate_jax.analysis import taps


@pytest.fixture(scope="module")
def seen(tiny_model, tiny_params, tiny_images):
    logits, seen = jax.jit(lambda p, x: taps(tiny_model, p, x))(tiny_params, tiny_images)
    return logits, {name: np.asarray(array) for name, array in seen.items()}


def test_all_names_by_default(seen, tiny_model):
    assert set(seen[1]) == set(tiny_model.tap_names)


def test_logits_are_those_without_taps(seen, tiny_model, tiny_params, tiny_images):
    alone = jax.jit(lambda p, x: tiny_model.apply({"params": p}, x, train=False))
    np.testing.assert_allclose(seen[0], alone(tiny_params, tiny_images), atol=2e-6)


def test_only_what_is_asked_for(seen, tiny_model, tiny_params, tiny_images):
    names = ["ista", "attention"]
    _, some = jax.jit(lambda p, x: taps(tiny_model, p, x, names=names))(tiny_params, tiny_images)
    assert set(some) == set(names)
    for name in names:
        np.testing.assert_allclose(some[name], seen[1][name], atol=2e-6)


def test_subspace_tokens_are_projected_normalised_tokens(seen, tiny_params):
    _, seen = seen
    Z_LxBxNxd = seen["z_half"] - seen["mssa"]  # each layer's input
    centred = Z_LxBxNxd - Z_LxBxNxd.mean(-1, keepdims=True)
    Y_LxBxNxd = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    U_LxdxKxp = np.asarray(tiny_params["blocks"]["mssa"]["U"])
    expected = np.einsum("lbnd,ldkp->lbnkp", Y_LxBxNxd, U_LxdxKxp)
    np.testing.assert_allclose(seen["subspace_tokens"], expected, atol=1e-5)


def test_attention_is_the_softmax_of_the_subspace_tokens_products(seen):
    V_LxBxNxKxp = seen[1]["subspace_tokens"].astype(np.float64)
    S = np.einsum("lbnkp,lbmkp->lbknm", V_LxBxNxKxp, V_LxBxNxKxp) / np.sqrt(8)
    E = np.exp(S - S.max(-1, keepdims=True))
    np.testing.assert_allclose(seen[1]["attention"], E / E.sum(-1, keepdims=True), rtol=1e-4)


def test_nothing_is_dropped(seen, tiny_model, tiny_params, tiny_images):
    _, same = taps(tiny_model.clone(dropout=0.5), tiny_params, tiny_images, names=("z_half",))
    np.testing.assert_allclose(same["z_half"], seen[1]["z_half"], atol=1e-5)


def test_unknown_and_missing_names(tiny_model, tiny_params, tiny_images):
    with pytest.raises(KeyError, match=r"taps must be among subspace_tokens, .*; got qkv\."):
        taps(tiny_model, tiny_params, tiny_images, names=("ista", "qkv"))
    with pytest.raises(ValueError, match=r"^names must hold at least one of subspace_tokens, "):
        taps(tiny_model, tiny_params, tiny_images, names=())


@pytest.mark.parametrize(
    "names",
    [
        "attention",
        ("attention", "attention"),
        {"attention"},
        {"attention": 0}.keys(),
        (name for name in ["attention"]),
    ],
    ids=lambda names: type(names).__name__,
)
def test_one_name_however_it_is_given(names, seen, tiny_model, tiny_params, tiny_images):
    logits, one = taps(tiny_model, tiny_params, tiny_images, names=names)
    assert set(one) == {"attention"}
    np.testing.assert_allclose(one["attention"], seen[1]["attention"], atol=2e-6)
    np.testing.assert_allclose(logits, seen[0], atol=2e-6)


def test_the_model_takes_one_name_too(tiny_model, tiny_params, tiny_images):
    def forward(names):
        return tiny_model.apply(
            {"params": tiny_params}, tiny_images, train=False, taps=names, method="forward"
        )

    assert set(forward("z_half")[1]) == {"z_half"}
    assert forward(())[1] == {}
    with pytest.raises(KeyError, match=r"taps must be among subspace_tokens, .*; got z\."):
        forward("z")


def test_an_iterator_without_names_is_none(tiny_model, tiny_params, tiny_images):
    with pytest.raises(ValueError, match=r"^names must hold at least one of .*; got none\."):
        taps(tiny_model, tiny_params, tiny_images, names=iter(()))
