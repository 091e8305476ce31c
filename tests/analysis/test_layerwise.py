"""The objective layer by layer, computed a second time in float64 from the tapped tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, CrateAlpha, CrateBert, CrateCausal, CrateLM, ViT
from crate_jax.analysis import layerwise, taps
from crate_jax.analysis.layerwise import _unit_length
from crate_jax.models.cost import abstract_parameters

PAPER = {
    "coding_rate_mean",
    "coding_rate_std",
    "zero_fraction",
    "rate_mean",
    "rate_reduction_mean",
}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(4), (3, 16, 16, 3))


@pytest.fixture(scope="module")
def seen(tiny_model, tiny_params, images):
    _, seen = jax.jit(lambda p, x: taps(tiny_model, p, x))(tiny_params, images)
    return {name: np.asarray(array, np.float64) for name, array in seen.items()}


@pytest.fixture(scope="module")
def by_paper(tiny_model, tiny_params, images):
    return layerwise(tiny_model, tiny_params, images)


def rate(X_Nxd, eps=0.1):
    N, d = X_Nxd.shape
    return np.linalg.slogdet(np.eye(d) + d / (N * eps**2) * X_Nxd.T @ X_Nxd)[1] / 2


def compressed(Z_LxBxNxd, params, eps=0.1):
    """(L, B): R^c(Z^l; U^l) of each layer and image."""
    U_LxdxKxp = np.asarray(params["blocks"]["mssa"]["U"], np.float64)
    return np.array(
        [
            [sum(rate(Z @ U_dxKxp[:, k], eps) for k in range(3)) for Z in Z_BxNxd]
            for Z_BxNxd, U_dxKxp in zip(Z_LxBxNxd, U_LxdxKxp, strict=True)
        ]
    )


def test_papers_definition_measures_the_tokens_after_mssa(seen, by_paper, tiny_params):
    assert set(by_paper) == PAPER
    Rc_LxB = compressed(seen["z_half"], tiny_params)
    R_LxB = np.array([[rate(Z) for Z in Z_BxNxd] for Z_BxNxd in seen["z_half"]])
    np.testing.assert_allclose(by_paper["coding_rate_mean"], Rc_LxB.mean(1), rtol=2e-5)
    np.testing.assert_allclose(by_paper["rate_mean"], R_LxB.mean(1), rtol=2e-5)
    np.testing.assert_allclose(
        by_paper["rate_reduction_mean"], (R_LxB - Rc_LxB).mean(1), atol=2e-5 * R_LxB.max()
    )
    # Unbiased, over the images: the sum of squares over B − 1.
    deviation = np.sqrt(((Rc_LxB - Rc_LxB.mean(1, keepdims=True)) ** 2).sum(1) / 2)
    np.testing.assert_allclose(by_paper["coding_rate_std"], deviation, rtol=1e-2)


def test_precision_is_an_option(seen, tiny_model, tiny_params, images):
    got = layerwise(tiny_model, tiny_params, images, eps=0.5)
    Rc_LxB = compressed(seen["z_half"], tiny_params, eps=0.5)
    np.testing.assert_allclose(got["coding_rate_mean"], Rc_LxB.mean(1), rtol=2e-5)


def test_zero_fraction_counts_what_ista_set_to_zero(seen, by_paper):
    np.testing.assert_allclose(
        by_paper["zero_fraction"], (seen["ista"] == 0).mean(axis=(1, 2, 3)), rtol=1e-4
    )
    assert 0.05 < by_paper["zero_fraction"].min() < by_paper["zero_fraction"].max() < 0.95


def test_official_definition_measures_unit_subspace_tokens(
    seen, tiny_model, tiny_params, images, by_paper
):
    got = layerwise(tiny_model, tiny_params, images, definition="official_code")
    assert set(got) == {"coding_rate_mean", "coding_rate_std", "zero_fraction"}
    W_LxBxNxKxp = seen["subspace_tokens"]
    W_LxBxNxKxp = W_LxBxNxKxp / np.sqrt((W_LxBxNxKxp**2).sum(-1, keepdims=True))
    Rc_LxB = np.array([[sum(rate(W[:, k]) for k in range(3)) for W in W_B] for W_B in W_LxBxNxKxp])
    np.testing.assert_allclose(got["coding_rate_mean"], Rc_LxB.mean(1), rtol=2e-5)
    deviation = np.sqrt(((Rc_LxB - Rc_LxB.mean(1, keepdims=True)) ** 2).sum(1) / 2)
    np.testing.assert_allclose(got["coding_rate_std"], deviation, rtol=1e-2)
    np.testing.assert_allclose(got["zero_fraction"], by_paper["zero_fraction"], rtol=1e-6)


def test_measured_in_float32_whatever_the_models_dtype(tiny_model, tiny_params, images, by_paper):
    half = layerwise(tiny_model.clone(dtype=jnp.bfloat16), tiny_params, images)
    for name in PAPER:
        assert half[name].dtype == jnp.float32
        np.testing.assert_array_equal(half[name], by_paper[name])


def test_a_silent_model_has_no_rate_and_no_nan(tiny_model, tiny_params, images):
    """U = 0: every subspace token is zero, and has no direction to be scaled along."""
    blocks = tiny_params["blocks"]
    mssa = blocks["mssa"] | {"U": jnp.zeros_like(blocks["mssa"]["U"])}
    silent = tiny_params | {"blocks": blocks | {"mssa": mssa}}
    got = layerwise(tiny_model, silent, images, definition="official_code")
    np.testing.assert_array_equal(got["coding_rate_mean"], 0.0)


def test_unknown_definition(tiny_model, tiny_params, images):
    with pytest.raises(ValueError, match=r"^definition must be one of paper, official_code; got x"):
        layerwise(tiny_model, tiny_params, images, definition="x")


# --- other operators ------------------------------------------------------------------------------

TINY = dict(image_size=16, patch_size=8, num_classes=5, width=12, depth=2, num_heads=2)
# What is measured of each besides R.
MEASURED = {
    "vit": (ViT(**TINY), set()),
    "mhsa": (Crate(**TINY, attention="mhsa"), {"zero_fraction"}),
    "mlp": (
        Crate(**TINY, nonlinearity="mlp"),
        {"coding_rate_mean", "coding_rate_std", "rate_reduction_mean"},
    ),
    "alpha": (CrateAlpha(**TINY), PAPER - {"rate_mean"}),
}
TEXT = dict(context_length=6, vocab_size=9, width=12, depth=2, num_heads=2)
MODELS_OF_TEXT = {"causal": CrateCausal(**TEXT), "lm": CrateLM(**TEXT), "bert": CrateBert(**TEXT)}


def some_params(model):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        abstract_parameters(model),
    )


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_model_has_is_measured(name, images):
    model, measured = MEASURED[name]
    params = some_params(model)
    got = jax.jit(lambda p, x: layerwise(model, p, x))(params, images)
    assert set(got) == measured | {"rate_mean"}
    assert all(values.shape == (2,) for values in got.values())
    _, seen = jax.jit(lambda p, x: taps(model, p, x))(params, images)
    Z_LxBxNxd = np.asarray(seen["z_half"], np.float64)
    R_LxB = np.array([[rate(Z) for Z in Z_BxNxd] for Z_BxNxd in Z_LxBxNxd])
    np.testing.assert_allclose(got["rate_mean"], R_LxB.mean(1), rtol=2e-5)
    if "zero_fraction" in measured:
        sparse = np.asarray(seen["code" if name == "alpha" else "ista"])
        np.testing.assert_allclose(
            got["zero_fraction"], (sparse == 0).mean(axis=(1, 2, 3)), rtol=1e-6
        )


@pytest.mark.parametrize("name", MODELS_OF_TEXT)
def test_a_model_of_text_is_measured_on_tokens(name):
    """Tokens see those before them alone, and R and R^c are those of a whole text."""
    model, tokens = MODELS_OF_TEXT[name], jax.random.randint(jax.random.key(0), (3, 6), 2, 9)
    params = some_params(model)
    got = jax.jit(lambda p, x: layerwise(model, p, x))(params, tokens)
    assert set(got) == PAPER
    _, seen = jax.jit(lambda p, x: taps(model, p, x))(params, tokens)
    Z_LxBxNxd = np.asarray(seen["z_half"], np.float64)
    R_LxB = np.array([[rate(Z) for Z in Z_BxNxd] for Z_BxNxd in Z_LxBxNxd])
    np.testing.assert_allclose(got["rate_mean"], R_LxB.mean(1), rtol=2e-5)
    sparse = np.asarray(seen["code" if name == "lm" else "ista"])
    zeros = (sparse == 0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(got["zero_fraction"], zeros, rtol=1e-6)
    official = layerwise(model, params, tokens, definition="official_code")
    assert set(official) == {"coding_rate_mean", "coding_rate_std", "zero_fraction"}


def test_the_official_definition_needs_mssa(images):
    model, _ = MEASURED["vit"]
    with pytest.raises(ValueError, match=r"^definition must be paper for a model without MSSA, .*"):
        layerwise(model, some_params(model), images, definition="official_code")


# --- where a norm is zero -------------------------------------------------------------------------


def test_gradients_at_zero_tokens_and_at_equal_images(tiny_model, tiny_params, images):
    """A head that maps to zero: its tokens have no direction. Equal images: no deviation."""
    blocks = tiny_params["blocks"]
    U_LxdxKxp = blocks["mssa"]["U"].at[0, :, 1].set(0.0)
    params = tiny_params | {"blocks": blocks | {"mssa": blocks["mssa"] | {"U": U_LxdxKxp}}}
    same = jnp.broadcast_to(images[:1], images.shape)

    @jax.jit
    def gradients(params, images):
        def total(params):
            measures = layerwise(tiny_model, params, images, definition="official_code")
            return sum(values.sum() for values in measures.values())

        return jax.value_and_grad(total)(params)

    for several in (images, same):
        value, found = gradients(params, several)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.abs(found["blocks"]["mssa"]["U"]).max() > 1e-3


def test_the_length_of_a_token_and_its_gradient():
    """d(w/‖w‖) projects on what is orthogonal to w: of (3, 4), (16, −12; −12, 9)/125."""
    W = jnp.array([[3.0, 4.0], [0.0, 0.0]])[None, :, None]
    np.testing.assert_allclose(_unit_length(W)[0, :, 0], [[0.6, 0.8], [0, 0]], rtol=1e-6)
    jacobian = jax.jit(jax.jacobian(_unit_length))(W)[0, :, 0, :, 0, :, 0]
    np.testing.assert_allclose(jacobian[0, :, 0], np.array([[16, -12], [-12, 9]]) / 125, atol=1e-7)
    np.testing.assert_array_equal(jacobian[1], 0)


def test_one_image_has_no_deviation(tiny_model, tiny_params, images, by_paper):
    one = jax.jit(lambda p, x: layerwise(tiny_model, p, x))(tiny_params, images[:1])
    assert np.isnan(one["coding_rate_std"]).all()
    assert all(np.isfinite(one[name]).all() for name in PAPER - {"coding_rate_std"})
    assert set(one) == set(by_paper)
