"""What other programs ask of a model besides logits: features, no head, captured layers, no image.

Every family, and a CRATE with a ViT's halves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, CrateAlpha, ViT, analysis
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import abstract_parameters, count_parameters, multiply_adds
from crate_jax.models.hyper_set import HyperSet
from crate_jax.models.layers import Linear

SIZES = dict(image_size=16, patch_size=8, num_classes=3, width=12, depth=2, num_heads=2)
OTHER_HALVES = dict(attention="mhsa", nonlinearity="mlp")
MODELS = {
    "crate": Crate(**SIZES),
    "crate_mhsa_mlp": Crate(**SIZES, **OTHER_HALVES, pool="mean", dtype=jnp.bfloat16),
    "crate_alpha": CrateAlpha(**SIZES, layer_scale=0.5, drop_path=0.1, remat="full"),
    "vit": ViT(**SIZES, pool="patches_twice"),
    "hyper_set": HyperSet(**SIZES),
}


class Case(NamedTuple):
    model: ImageClassifier
    params: dict
    found: dict

    @property
    def tolerance(self):
        return 2e-2 if self.model.dtype == jnp.bfloat16 else 1e-5


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


@pytest.fixture(scope="module", params=MODELS)
def case(request, images) -> Case:
    """A model, parameters off their start, and what it makes of images in every way."""
    model, rng = MODELS[request.param], np.random.default_rng(7)

    def fill(path, leaf):
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), "f4")

    @jax.jit
    def run(params):
        def apply(*inputs, model=model, method="__call__", **options):
            return model.apply({"params": params}, *inputs, method=method, **options)

        tokens = apply(images, train=False, method="forward_features")
        options = dict(mutable=["intermediates"], capture_intermediates=lambda module, name: True)
        _, captured = apply(images, train=False, **options)
        logits, taps = analysis.taps(model, params, images)
        return {
            "tokens": tokens,
            "features": apply(tokens, pre_logits=True, method="forward_head"),
            "logits of tokens": apply(tokens, method="forward_head"),
            "logits": logits,
            "taps": taps,
            "without a head": apply(images, model=model.clone(num_classes=0), train=False),
            "captured": captured["intermediates"],
        }

    params = jax.tree.map_with_path(fill, abstract_parameters(model))
    return Case(model, params, run(params))


def normalised(X, of, epsilon):
    """LayerNorm of float64 rows."""
    X = np.asarray(X, np.float64)
    X = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + epsilon)
    return X * np.asarray(of["scale"], np.float64) + np.asarray(of["bias"], np.float64)


def test_features_are_the_tokens_of_the_last_block_and_the_head_reads_one_of_them(case):
    found, model, tolerance = case.found, case.model, case.tolerance
    assert (found["tokens"].dtype, found["features"].dtype) == (model.dtype, jnp.float32)
    Z_BxNxd = np.asarray(found["tokens"], np.float64)
    np.testing.assert_allclose(Z_BxNxd, found["taps"]["out"][-1].astype("f4"), atol=tolerance)
    np.testing.assert_allclose(found["logits of tokens"], found["logits"], atol=tolerance)
    means = {"cls": Z_BxNxd[:, 0], "mean": Z_BxNxd.mean(1)}
    pooled = means.get(model.pool, Z_BxNxd[:, 1:].mean(1))
    expected = normalised(pooled, case.params["head_norm"], model.EPSILON)
    if model.pool == "patches_twice":
        expected = normalised(expected, case.params["head_norm"], model.EPSILON)
    np.testing.assert_allclose(found["features"], expected, atol=tolerance)
    head = case.params["head"]
    logits = expected @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(found["logits"], logits, atol=tolerance)


def test_without_classes_there_is_no_head_and_the_features_come_out(case, images):
    model = case.model.clone(num_classes=0)
    assert set(abstract_parameters(model)) == set(case.params) - {"head"}
    features = case.found["without a head"]
    assert (features.shape, features.dtype) == ((2, 12), jnp.float32)
    np.testing.assert_allclose(features, case.found["features"], atol=case.tolerance)
    assert count_parameters(case.model) - count_parameters(model) == 12 * 3 + 3
    assert multiply_adds(case.model) - multiply_adds(model) == 12 * 3


def test_intermediates_hold_every_layer(case):
    """Stacked on axis 0, as taps are; the filter asked for every method.

    The attention of MSSA is seen by its tap alone: a kernel has none to show.
    """
    captured, taps = case.found["captured"], case.found["taps"]
    blocks = captured["block" if case.model.SHARED else "blocks"]
    attention, nonlinearity = case.model.attention_part.name, case.model.nonlinearity_part.name
    normed = case.model.block_fields().get("norm") != "none"
    norms = {f"{attention}_norm", f"{nonlinearity}_norm"} if normed else set()
    assert {attention, nonlinearity} | norms <= set(blocks)
    assert {"embedding", "head_norm", "head", "forward"} <= set(captured)
    update, replaced = (blocks[half]["__call__"][0] for half in (attention, nonlinearity))
    pairs = {
        attention: update.update,
        **{name: update.seen[name] for name in ("attention",) if name in update.seen},
        nonlinearity: replaced[0] if case.model.nonlinearity_part.taps else replaced,
        "out": blocks["__call__"][0][0],
    }
    for name, got in pairs.items():
        expected = np.asarray(taps[name], np.float32)
        scale = case.tolerance * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, "f4"), expected, atol=scale, err_msg=name)
    for norm in norms:
        assert blocks[norm]["__call__"][0].shape == (2, 2, 5, 12)


def test_no_image_has_no_logits_and_moves_no_parameter(case, images):
    none, model = images[:0], case.model

    @jax.jit
    def run(params):
        def total(params):
            logits, seen = model.apply(
                {"params": params},
                none,
                train=True,
                taps=model.tap_names,
                rngs={"dropout": jax.random.key(0)},
                method="forward",
            )
            sums = [array.astype(jnp.float32).sum() for array in (logits, *seen.values())]
            return sum(sums), (logits, seen)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (logits, seen)), gradients = run(case.params)
    assert (logits.shape, logits.dtype) == ((0, 3), jnp.float32)
    assert {tap.shape[:2] for tap in seen.values()} == {(2, 0)}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_mean_over_no_image_is_refused(images):
    model = MODELS["crate"]
    message = r"^images must be at least one; got \(0, 16, 16, 3\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: analysis.layerwise(model, params, images[:0]), abstract_parameters(model)
        )


def test_features_need_no_head_and_have_gradients(images):
    model = MODELS["crate"]

    def init(key):
        return model.init(key, images, train=False, method="forward_features")["params"]

    def total(params):
        tokens = model.apply({"params": params}, images, train=False, method="forward_features")
        return (tokens**2).sum()

    shapes = jax.eval_shape(init, jax.random.key(0))
    assert set(shapes) == {"embedding", "blocks"}
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), shapes)
    gradients = jax.jit(jax.grad(total))(params)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0


def test_a_head_is_not_given_images(images):
    model = MODELS["crate"]
    with pytest.raises(
        ValueError, match=r"^tokens must be \(B, N, 12\) for this model; got \(2, 1"
    ):
        model.init(jax.random.key(0), images, method="forward_head")


class OwnHead(Crate):
    """A model of another program, which overrides a helper without knowing of Flax's wrapping."""

    def make_head(self):
        return Linear(2 * self.num_classes, name="head")


def test_a_subclass_is_captured_too():
    model, images = OwnHead(**SIZES), jnp.ones((1, 16, 16, 3))

    def init(key):
        return model.init(key, images, train=False, capture_intermediates=lambda module, name: True)

    found = jax.eval_shape(init, jax.random.key(0))
    assert found["intermediates"]["head"]["__call__"][0].shape == (1, 6)


def test_a_table_of_all_layers():
    model, images = MODELS["crate"], jnp.zeros((1, 16, 16, 3))
    table = model.tabulate(jax.random.key(0), images, train=False, console_kwargs={"width": 200})
    for path in ("embedding/projection", "blocks/mssa", "blocks/ista_norm", "head_norm", "head"):
        assert f" {path} " in table
    assert f"Total Parameters: {count_parameters(model):,}" in table
