"""`forward_intermediates` of every family by value against the taps; and `reset_classifier`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

import crate_jax
from crate_jax import CrateMae, HyperSet, create_model, reset_classifier
from crate_jax.models.intermediates import chosen_layers
from crate_jax.models.parameters import variables_of

SIZES = dict(image_size=(16, 32), patch_size=8, num_classes=3, width=12, depth=3, num_heads=2)
NAMES = {
    "crate": "crate_tiny_patch16_224",
    "crate_alpha": "crate_alpha_tiny_patch16_224",
    "vit": "vit_base_patch16_reg4_224",  # four registers between class token and patches
    "tost": "tost_tiny_patch16_224",  # no token before the patches
    "cbsa": "cbsa_tiny_patch16_224",
    "hyperset": "hyperset_patch16_224",
    "crate_mae": "crate_mae_tiny_patch16_224",
}
FIRST = {"vit": 5, "tost": 0}


@functools.cache
def opened(family):
    """A model, variables off their start, images, and the output of every block by its tap."""
    sizes = SIZES | (dict(num_classes=0, decoder_depth=1) if family == "crate_mae" else {})
    model = create_model(NAMES[family], **sizes | dict(head_dim=6))
    start = jax.jit(lambda key: model.init(key, model.sample_input(), train=False))
    noise = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32),
        start(jax.random.key(2)),
    )
    variables = {
        **variables,
        **{k: jax.tree.map(abs, v) for k, v in variables.items() if k != "params"},
    }
    images = jax.random.normal(jax.random.key(1), (2, 16, 32, 3))
    out = jax.jit(lambda v, x: crate_jax.analysis.taps(model, v, x, "out")[1]["out"])
    return model, variables, images, np.asarray(out(variables, images))


def called(family, **options):
    model, variables, images, _ = opened(family)
    apply = jax.jit(
        lambda v, x: model.apply(v, x, train=False, method="forward_intermediates", **options)
    )
    return apply(variables, images)


def near(found, expected):
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_patches_of_layers_are_those_of_the_taps(family):
    model, variables, images, out = opened(family)
    first = FIRST.get(family, 1)
    tokens, layers = called(family, indices=[0, -1])
    near(tokens, out[-1])
    assert len(layers) == 2
    for i, patches in zip((0, 2), layers, strict=True):
        near(patches, out[i][:, first:].reshape(2, 2, 4, 12))  # rows of the image by its columns
    read = jax.jit(functools.partial(model.apply, method="forward_head"))
    near(
        read(variables, tokens),
        jax.jit(functools.partial(model.apply, train=False))(variables, images),
    )


@pytest.mark.parametrize("family", ["crate", "vit", "tost"])
def test_tokens_before_the_patches_are_given_apart_and_the_norm_is_the_heads(family):
    model, variables, _, out = opened(family)
    first = FIRST.get(family, 1)
    layers = called(
        family,
        indices=2,
        norm=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
    )
    norm = {name: np.asarray(leaf) for name, leaf in variables["params"]["head_norm"].items()}
    assert isinstance(layers, list) and len(layers) == 2
    for i, (patches, before) in zip((1, 2), layers, strict=True):
        Z = out[i].astype(np.float64)
        Z = (Z - Z.mean(-1, keepdims=True)) / np.sqrt(Z.var(-1, keepdims=True) + model.EPSILON)
        Z = Z * norm["scale"] + norm["bias"]
        near(patches, Z[:, first:])
        near(before, Z[:, :first])


def test_all_layers_are_given_where_none_is_named():
    out = opened("crate")[-1]
    layers = called("crate", output_fmt="NLC", intermediates_only=True)
    assert len(layers) == 3
    for patches, expected in zip(layers, out, strict=True):
        near(patches, expected[:, 1:])


def test_which_layers_are_meant():
    assert chosen_layers([3, -1, 0], 4) == [3, 3, 0]
    assert chosen_layers(1, 4) == [3] and chosen_layers(4, 4) == [0, 1, 2, 3]
    assert chosen_layers((), 4) == []
    assert chosen_layers(np.int64(1), 4) == [3] and chosen_layers(np.array([1, -1]), 4) == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(indices=0), r"^indices must be at most 3 as a number, .* got 0\. Give a list"),
        (dict(indices=4), r"^indices must be at most 3 as a number, .* got 4\. Give a list"),
        (dict(indices=[0, 3]), r"^indices must be layers in 0 … 2, .* got 3\. Leave it out"),
        (dict(indices=[-4]), r"^indices must be layers in 0 … 2, .* got -4\. Leave it out"),
        (
            dict(output_fmt="NCHW"),
            r"^output_fmt must be NHWC or NLC; got NCHW\. Channels come last",
        ),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        called("crate", **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_a_new_head_stands_on_the_same_layers(family):
    model, variables, images, _ = opened(family)
    key = jax.random.key(5)
    other, given = reset_classifier(model, variables, 6, key=key)
    assert (other.num_classes, model.num_classes) == (6, 0 if family == "crate_mae" else 3)
    without, none = reset_classifier(model, variables, 0)
    features = jax.jit(functools.partial(without.apply, train=False))(none, images)
    start = jax.jit(lambda key: other.init(key, other.sample_input(), train=False)["params"])(key)
    assert set(given["params"]) == set(start) and set(given) == set(variables)
    head = given["params"]["head"]
    for name, leaf in start["head"].items():
        np.testing.assert_allclose(head[name], leaf, rtol=1e-6)
    assert jnp.abs(head["kernel"]).max() > 0
    near(
        jax.jit(functools.partial(other.apply, train=False))(given, images),
        np.asarray(features, np.float64) @ np.asarray(head["kernel"], np.float64)
        + np.asarray(head["bias"], np.float64),
    )


def test_parameters_alone_come_back_alone_and_nothing_given_is_changed():
    model = create_model(NAMES["crate"], **SIZES)
    params = random_params(model)
    before = {**params}
    other, given = reset_classifier(model, params, 7)
    assert params == before and set(given) == set(params)
    assert given["head"]["kernel"].shape == (12, 7)
    assert given["blocks"] is params["blocks"]
    again, none = reset_classifier(other, given, 0)
    assert type(reset_classifier(other, given, np.int64(3))[0].num_classes) is int
    assert again.num_classes == 0 and set(none) == set(params) - {"head"}
    default = reset_classifier(model, params, 7, key=jax.random.key(0))[1]
    np.testing.assert_array_equal(default["head"]["kernel"], given["head"]["kernel"])


def test_a_decoder_goes_where_classes_come():
    model, variables, _, _ = opened("crate_mae")
    other, given = reset_classifier(model, variables_of(variables)["params"], 4)
    assert isinstance(other, CrateMae) and other.decoder_depth == 0
    assert {"decoder", "mask_token"} <= set(variables["params"])
    assert not {"decoder", "mask_token"} & set(given)
    kept, same = reset_classifier(model, variables["params"], 0)
    assert kept == model and set(same) == set(variables["params"])


@pytest.mark.parametrize("number", [-1, True, 2.0, "2"])
def test_numbers_of_classes_that_are_none(number):
    model = HyperSet(**SIZES)
    with pytest.raises(ValueError, match=r"^num_classes must be a whole number >= 0; got "):
        reset_classifier(model, {}, number)


def test_a_model_of_text_has_no_classifier():
    model = create_model("crate_lm_2l", context_length=8, vocab_size=9, width=8, num_heads=2)
    with pytest.raises(ValueError, match=r"^model must classify images here; got a CrateLM"):
        reset_classifier(model, {}, 3)
