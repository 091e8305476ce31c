"""The ViT: sizes, what its parameters start as, pooling, taps, and fields that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import ViT, analysis, create_model, list_models
from crate_jax.models.cost import count_parameters

# At 224 pixels with 1000 classes; timm's own.
PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_base_patch16_reg4_224": 86_589_160,
    "vit_large_patch16_reg4_224": 304_379_880,
}
BASE = dict(image_size=16, patch_size=4, num_classes=7, width=24, depth=3, num_heads=3)


def build(**changes):
    return ViT(**BASE | changes)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def params(model, tiny_images):
    """Off their start, so that no norm or bias is trivial."""
    start = jax.eval_shape(lambda key: model.init(key, tiny_images, train=False), jax.random.key(0))
    rng = np.random.default_rng(5)

    def fill(path, leaf):
        return jnp.asarray(
            0.2 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype
        )

    return jax.tree.map_with_path(fill, start["params"])


def forward(model, params, images):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, train=False))(params, images)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = create_model(name)
    d, tokens, m = model.width, 14 * 14 + 1, 4 * model.width
    embedding = 3 * 16**2 * d + d + d + tokens * d
    mhsa = 3 * (d * d + d) + d * d + d
    mlp = d * m + m + m * d + d
    layer = 2 * d + mhsa + 2 * d + mlp
    if "reg4" in name:
        embedding, layer = embedding + 4 * d, layer + 2 * d
    depth = 24 if "large" in name else 12
    assert PARAMETERS[name] == embedding + depth * layer + 2 * d + d * 1000 + 1000
    assert count_parameters(model) == PARAMETERS[name]


def test_the_named_models():
    assert set(list_models("vit_*")) == set(PARAMETERS)
    sizes = {name: create_model(name) for name in PARAMETERS}
    assert [(m.width, m.num_heads, m.depth, m.patch_size, m.pool) for m in sizes.values()] == [
        (192, 3, 12, 16, "cls"),
        (384, 6, 12, 16, "cls"),
        (768, 12, 12, 16, "cls"),
        (1024, 16, 24, 16, "cls"),
        (768, 12, 12, 16, "cls"),
        (1024, 16, 24, 16, "cls"),
    ]
    extras = [(m.registers, m.layer_scale) for m in sizes.values()]
    assert extras == [(0, None)] * 4 + [(4, 0.1)] * 2


def test_shapes_of_the_parameter_tree(params):
    L, d, K, p, m = 3, 24, 3, 8, 96
    norm = {"scale": (L, d), "bias": (L, d)}
    assert jax.tree.map(jnp.shape, params) == {
        "embedding": {
            "cls_token": (d,),
            "pos_embedding": (17, d),
            "projection": {"kernel": (48, d), "bias": (d,)},
        },
        "blocks": {
            "mhsa_norm": norm,
            "mhsa": {
                "W_qkv": (L, d, 3, K, p),
                "b_qkv": (L, 3, K, p),
                "W_out": (L, K, p, d),
                "b_out": (L, d),
            },
            "mlp_norm": norm,
            "mlp": {"W_in": (L, d, m), "b_in": (L, m), "W_out": (L, m, d), "b_out": (L, d)},
        },
        "head_norm": {"scale": (d,), "bias": (d,)},
        "head": {"kernel": (d, 7), "bias": (7,)},
    }


def test_parameters_start_as_timms(tiny_images):
    """Normals of deviation 0.02, a convolution as PyTorch's, biases at zero."""
    wide = build(width=96, num_classes=200, depth=2)
    start = jax.jit(lambda key: wide.init(key, tiny_images, train=False)["params"])
    found = start(jax.random.key(3))
    embedding, mhsa, mlp = found["embedding"], found["blocks"]["mhsa"], found["blocks"]["mlp"]
    drawn = (embedding["pos_embedding"], mhsa["W_qkv"], mhsa["W_out"], mlp["W_in"], mlp["W_out"])
    for array in (*drawn, found["head"]["kernel"]):
        assert np.std(array) == pytest.approx(0.02, rel=0.05)
        assert abs(np.mean(array)) < 0.02 * 5 / array.size**0.5
        assert np.abs(array).max() > 3 * 0.02  # not cut at two deviations
    assert not np.array_equal(mhsa["W_qkv"][0], mhsa["W_qkv"][1])  # a draw of its own a layer
    assert 0 < np.abs(embedding["cls_token"]).max() < 1e-5
    bound = 48**-0.5
    for array in (embedding["projection"]["kernel"], embedding["projection"]["bias"]):
        assert 0.9 * bound < np.abs(array).max() <= bound
        assert np.std(array) == pytest.approx(bound / 3**0.5, rel=0.15)
    for bias in (mhsa["b_qkv"], mhsa["b_out"], mlp["b_in"], mlp["b_out"], found["head"]["bias"]):
        assert not np.any(bias)


def test_the_halves_are_added_to_the_tokens(model, params, tiny_images):
    logits, seen = jax.jit(lambda p, x: analysis.taps(model, p, x))(params, tiny_images)
    assert model.tap_names == ("attention", "mhsa", "z_half", "mlp", "out")
    assert set(seen) == set(model.tap_names)
    assert seen["attention"].shape == (3, 2, 3, 17, 17)
    assert {seen[name].shape for name in model.tap_names[1:]} == {(3, 2, 17, 24)}
    np.testing.assert_allclose(seen["z_half"] + seen["mlp"], seen["out"], atol=1e-5)
    before = seen["out"][:-1]
    np.testing.assert_allclose(before + seen["mhsa"][1:], seen["z_half"][1:], atol=1e-5)
    np.testing.assert_allclose(logits, forward(model, params, tiny_images), atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "patches", "patches_twice"])
def test_what_the_head_reads(pool, params, tiny_images):
    model = build(pool=pool)
    _, seen = jax.jit(lambda p, x: analysis.taps(model, p, x, ("out",)))(params, tiny_images)
    Z = np.asarray(seen["out"][-1], np.float64)
    norm, head = (jax.tree.map(np.asarray, params[name]) for name in ("head_norm", "head"))
    token = Z[:, 0] if pool == "cls" else Z[:, 1:].mean(axis=1)
    for _ in range(1 + (pool == "patches_twice")):
        token = token - token.mean(axis=1, keepdims=True)
        token = token / np.sqrt((token**2).mean(axis=1, keepdims=True) + 1e-6)
        token = token * norm["scale"] + norm["bias"]
    expected = token @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(forward(model, params, tiny_images), expected, atol=2e-5)


def test_half_precision_gives_float32_logits(params, tiny_images, model):
    half = forward(build(dtype=jnp.bfloat16), params, tiny_images)
    exact = forward(model, params, tiny_images)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_dropout_acts_while_training_alone(params, tiny_images, model):
    dropped = build(dropout=0.5)
    np.testing.assert_array_equal(
        forward(dropped, params, tiny_images), forward(model, params, tiny_images)
    )
    trained = dropped.apply(
        {"params": params}, tiny_images, train=True, rngs={"dropout": jax.random.key(1)}
    )
    assert np.abs(trained - forward(model, params, tiny_images)).max() > 1e-2


# --- what DINO and DINOv2 add -----------------------------------------------------------------


def off_start(model, images):
    start = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + 0.1, leaf.dtype),
        start["params"],
    )


def test_registers_and_factors_are_parameters_of_their_own(params, tiny_images):
    model = build(registers=4, layer_scale=0.1)
    found = jax.jit(lambda key: model.init(key, tiny_images, train=False)["params"])(
        jax.random.key(0)
    )
    new = {
        "register_tokens": (4, 24),
        "blocks": {"mhsa_scale": (3, 24), "mlp_scale": (3, 24)},
    }
    expected = jax.tree.map(jnp.shape, params) | {"register_tokens": (4, 24)}
    expected["blocks"] |= new["blocks"]
    assert jax.tree.map(jnp.shape, found) == expected
    assert count_parameters(model) == count_parameters(build()) + 4 * 24 + 2 * 3 * 24
    for name in new["blocks"]:
        np.testing.assert_allclose(found["blocks"][name], 0.1)
    assert 0 < np.abs(found["register_tokens"]).max() < 1e-5
    assert (model.num_tokens, model.first_patch, build().first_patch) == (21, 5, 1)


def test_registers_stand_behind_the_class_token_without_positions(tiny_images):
    """The first layer sees class token, registers, patches; positions are added to the others."""
    model = build(registers=2, depth=1)
    params = off_start(model, tiny_images)
    names = ("attention", "mhsa", "z_half")
    logits, seen = jax.jit(lambda p, x: analysis.taps(model, p, x, names))(params, tiny_images)
    Z = np.asarray(seen["z_half"][0] - seen["mhsa"][0])
    moved = params | {"register_tokens": -params["register_tokens"]}
    assert np.abs(forward(model, moved, tiny_images) - logits).max() > 1e-3
    params = jax.tree.map(np.asarray, params)
    embedding = params["embedding"]
    patches = np.asarray(tiny_images).reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(2, 16, 48) @ embedding["projection"]["kernel"]
    patches = patches + embedding["projection"]["bias"] + embedding["pos_embedding"][1:]
    np.testing.assert_allclose(Z[:, 3:], patches, atol=2e-5)
    cls = embedding["cls_token"] + embedding["pos_embedding"][0]
    np.testing.assert_allclose(Z[:, 0], np.broadcast_to(cls, (2, 24)), atol=1e-5)
    registers = np.broadcast_to(params["register_tokens"], (2, 2, 24))
    np.testing.assert_allclose(Z[:, 1:3], registers, atol=1e-5)


def test_the_mean_of_the_patches_leaves_registers_out(tiny_images):
    model = build(registers=3, pool="patches", num_classes=0)
    params = off_start(model, tiny_images)
    run = dict(train=False, method="forward_features")
    Z = np.asarray(model.apply({"params": params}, tiny_images, **run), np.float64)
    token = Z[:, 4:].mean(axis=1)
    token = token - token.mean(axis=1, keepdims=True)
    token = token / np.sqrt((token**2).mean(axis=1, keepdims=True) + 1e-6)
    norm = jax.tree.map(np.asarray, params["head_norm"])
    expected = token * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(forward(model, params, tiny_images), expected, atol=2e-5)


@pytest.mark.parametrize("uniform", [False, True])
def test_stochastic_depth_grows_or_is_the_same(uniform, params, tiny_images):
    model = build(drop_path=0.4, drop_path_uniform=uniform)
    expected = [0.4] * 3 if uniform else [0, 0.2, 0.4]
    np.testing.assert_allclose(model.drop_path_rates(), expected, rtol=1e-6)
    assert build(drop_path_uniform=True).drop_path_rates() is None
    whole = forward(build(), params, tiny_images)
    np.testing.assert_array_equal(forward(model, params, tiny_images), whole)
    key = {"dropout": jax.random.key(1)}
    trained = model.apply({"params": params}, tiny_images, train=True, rngs=key)
    assert np.abs(trained - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(registers=-1), "model.registers must be >= 0; got -1. Change it."),
        (dict(layer_scale=0.0), "model.layer_scale must be > 0; got 0.0. Change it."),
        (dict(mlp_ratio=0), "model.mlp_ratio must be >= 1; got 0. Change it."),
        (dict(num_heads=0), "model.num_heads must be >= 1; got 0. Change it."),
    ],
)
def test_a_wrong_value_is_one_line(fields, message):
    with pytest.raises(ValueError) as caught:
        create_model("vit_tiny_patch16_224", **fields)
    assert str(caught.value) == message


def test_a_wrong_pool_is_one_line(tiny_images):
    message = r"^model\.pool must be one of cls, patches, patches_twice; got mean"
    with pytest.raises(ValueError, match=message):
        create_model("vit_tiny_patch16_224", pool="mean")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: build(pool="mean").init(key, tiny_images, train=False), jax.random.key(0)
        )


@pytest.mark.parametrize("field", ["eta", "lmbda", "attention", "overcompleteness"])
def test_a_field_of_another_family_is_one_line(field):
    assert field not in {f.name for f in dataclasses.fields(ViT)}
    with pytest.raises(KeyError, match=rf"model\.{field} must name a field of vit_tiny"):
        create_model("vit_tiny_patch16_224", **{field: 1})
