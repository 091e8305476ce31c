"""ToST: exact counts, class attention, positions, the field of its attention, cost in tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import ToST, analysis, create_model, list_models
from crate_jax.models.class_attention import class_attention
from crate_jax.models.cost import count_parameters, multiply_adds
from crate_jax.models.tost import fourier_positions
from crate_jax.models.transformer import mhsa

# (d, L, K, LayerScale) and the parameters at 224 pixels with 1000 classes.
NAMED = {
    "tost_tiny_patch16_224": (192, 12, 4, 1.0, 5_769_328),
    "tost_small_patch16_224": (384, 12, 8, 1.0, 22_589_944),
    "tost_medium_patch16_224": (512, 24, 8, 1e-5, 71_481_064),
}
# Sizes of the official code that have no name here.
OTHERS = {
    "tiny, 24 layers": (192, 24, 4, 1e-5, 10_223_008),
    "small, 24 layers": (384, 24, 8, 1e-5, 40_344_664),
    "large, 24 layers": (768, 24, 16, 1e-5, 160_286_920),
}
SIZES = dict(
    image_size=16, patch_size=4, num_classes=5, width=16, depth=2, num_heads=2, mlp_ratio=2
)
MODEL = ToST(**SIZES)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(normal(0, 3, 16, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(lambda key: MODEL.init(key, images, train=False))(jax.random.key(0))


def test_every_tost_is_in_the_table():
    assert set(list_models("tost_*_patch*")) == set(NAMED)


@pytest.mark.parametrize("name", NAMED | OTHERS)
def test_parameter_count(name):
    d, L, K, layer_scale, count = (NAMED | OTHERS)[name]
    channels = [3, d // 8, d // 4, d // 2, d]
    stem = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels))
    layer = 10 * d * d + 13 * d + K  # U, W_out, MLP; their biases, norms, factors; τ
    block = 12 * d * d + 15 * d
    rest = (64 * d + d) + d + 2 * d + 1000 * (d + 1)  # positions, class token, norm, head
    assert count == stem + L * layer + 2 * block + rest
    sizes = dict(width=d, depth=L, num_heads=K, layer_scale=layer_scale)
    model = create_model(name) if name in NAMED else create_model("tost_tiny_patch16_224", **sizes)
    assert count_parameters(model) == count
    assert {field: getattr(model, field) for field in sizes} == sizes


def test_class_attention_is_the_row_of_the_class_token():
    Y, W_qkv, W_out = normal(0, 2, 5, 6), normal(1, 6, 3, 2, 4), normal(2, 2, 4, 6)
    b_qkv, b_out = normal(3, 3, 2, 4), normal(4, 6)
    for bias in (None, b_qkv):
        got = jax.jit(class_attention)(Y, W_qkv, bias, W_out, b_out)
        expected = mhsa(Y, W_qkv, bias, W_out, b_out).update[:, :1]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_rows_then_of_columns():
    found = fourier_positions((3, 5)).reshape(3, 5, 64)
    for row, column, j in np.ndindex(3, 5, 32):
        period = 10_000 ** (2 * (j // 2) / 32)
        wave = np.cos if j % 2 else np.sin
        y, x = 2 * np.pi * (row + 1) / (3 + 1e-6), 2 * np.pi * (column + 1) / (5 + 1e-6)
        assert abs(found[row, column, j] - wave(y / period)) < 1e-6
        assert abs(found[row, column, 32 + j] - wave(x / period)) < 1e-6


def test_the_class_token_joins_after_the_layers(variables, images):
    assert MODEL.num_tokens == MODEL.num_patches == 16
    assert set(variables["params"]) == {
        *("embedding", "blocks", "cls_token", "class_blocks", "head_norm", "head")
    }
    tokens = MODEL.apply(variables, images, train=False, method="forward_features")
    assert tokens.shape == (3, 16, 16)
    logits = MODEL.apply(variables, images, train=False)
    head = MODEL.apply(variables, tokens, method="forward_head")
    np.testing.assert_allclose(head, logits, rtol=1e-5, atol=1e-6)


def test_logits_are_those_of_another_batch_in_evaluation_alone(variables, images):
    alone = MODEL.apply(variables, images[:1], train=False)
    np.testing.assert_allclose(
        alone, MODEL.apply(variables, images, train=False)[:1], rtol=1e-4, atol=1e-6
    )
    by_batch = MODEL.apply(variables, images, train=True, mutable=["batch_stats"])[0]
    assert np.abs(by_batch[:1] - alone).max() > 1e-4


@pytest.mark.parametrize(
    ("attention", "shown"),
    [("tssa", "membership"), ("mssa", "attention"), ("cbsa", "contraction")],
)
def test_one_field_swaps_the_attention(attention, shown, images):
    model = MODEL.clone(attention=attention, representatives=(2, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    assert model.tap_names[:3] == ("subspace_tokens", shown, attention)
    logits, seen = jax.jit(lambda v, x: analysis.taps(model, v, x, shown))(variables, images)
    assert np.isfinite(logits).all()
    shapes = {
        "membership": (2, 3, 2, 16),
        "attention": (2, 3, 2, 16, 16),
        "contraction": (2, 3, 2, 6, 16),
    }
    assert seen[shown].shape == shapes[shown]


def test_another_image_size_needs_no_other_parameters(variables):
    larger = MODEL.clone(image_size=(24, 16))
    logits = larger.apply(variables, jnp.asarray(normal(1, 2, 24, 16, 3)), train=False)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


def test_stochastic_depth_has_one_rate():
    rates = MODEL.clone(drop_path=0.15).drop_path_rates()
    np.testing.assert_allclose(rates, [0.15, 0.15])
    assert MODEL.drop_path_rates() is None


def test_half_precision_is_near(variables, images):
    half = MODEL.clone(dtype=jnp.bfloat16).apply(variables, images, train=False)
    exact = MODEL.apply(variables, images, train=False)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_layerwise_measures_what_there_is(variables, images):
    found = analysis.layerwise(MODEL, variables, images)
    assert set(found) == {
        *("rate_mean", "rate_reduction_mean", "coding_rate_mean", "coding_rate_std")
    }
    assert all(np.isfinite(values).all() and values.shape == (2,) for values in found.values())
    official = analysis.layerwise(MODEL, variables, images, definition="official_code")
    assert set(official) == {"coding_rate_mean", "coding_rate_std"}


@pytest.mark.parametrize("name", ["tost_tiny_patch16_224", "cbsa_tiny_patch16_224"])
def test_cost_grows_as_the_tokens_do(name):
    """What four times the tokens add grows fourfold each time; with MSSA it grows faster."""
    costs = [multiply_adds(create_model(name, image_size=side)) for side in (224, 448, 896)]
    first, second = (b - a for a, b in itertools.pairwise(costs))
    assert second == 4 * first
    mssa = [
        multiply_adds(create_model(name, image_size=side, attention="mssa"))
        for side in (224, 448, 896)
    ]
    assert mssa[2] - mssa[1] > 6 * (mssa[1] - mssa[0])


def test_published_operations():
    """Of CBSA, as its repository prints them: two for each multiply-add."""
    printed = {"tiny": 1.1, "small": 4.0, "base": 15.1, "large": 47.3}
    for size, giga in printed.items():
        found = 2 * multiply_adds(create_model(f"cbsa_{size}_patch16_224")) / 1e9
        assert found == pytest.approx(giga, rel=0.02), size
