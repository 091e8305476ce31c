"""What a model must say of itself before it can be built on the shared frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sizes import sizes_of

from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.cost import abstract_parameters
from crate_jax.models.crate import Crate
from crate_jax.models.zoo import CLASSES, create_model

SIZES = dict(image_size=8, patch_size=4, num_classes=3, width=8, depth=1, num_heads=2)


class WithoutAttention(Crate):
    attention_part = ImageClassifier.attention_part


class WithoutNonlinearity(Crate):
    nonlinearity_part = ImageClassifier.nonlinearity_part


class WithoutEmbedding(Crate):
    embed = ImageClassifier.embed


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (WithoutAttention, "a model must say what its attention is"),
        (WithoutNonlinearity, "a model must say what its nonlinearity is"),
        (WithoutEmbedding, "a model must say how it embeds images"),
    ],
)
def test_a_model_that_leaves_a_part_out_is_told_which(model, missing):
    images = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(TypeError, match=missing):
        jax.eval_shape(lambda key: model(**SIZES).init(key, images, train=False), jax.random.key(0))


def test_sizes_that_follow_from_the_fields():
    model = Crate(**SIZES | dict(image_size=(8, 12), in_channels=1))
    assert model.input_shape == (8, 12, 1)
    assert model.grid == (2, 3)
    assert model.num_tokens == 7
    assert model.subspace_dim == 4


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8])
def test_sizes_may_be_numpys_integers(number):
    sizes = {name: number(value) for name, value in SIZES.items()}
    model, images = create_model("crate_tiny_patch16_224", **sizes), jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    assert model.input_shape == (8, 8, 3)
    assert shapes["params"]["embedding"]["pos_embedding"].shape == (5, 8)


def test_a_model_runs_in_the_bridge_to_nnx():
    """The bridge asks a module for its attributes by the names of its parameters."""
    model, images = Crate(**SIZES), jnp.ones((2, 8, 8, 3))
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), images, train=False)
    params = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    expected = model.apply({"params": params}, images, train=False)
    np.testing.assert_allclose(bridged(images, train=False), expected, rtol=1e-6)


@pytest.mark.parametrize("family", CLASSES)
def test_no_method_has_the_name_of_a_parameter(family):
    """Flax would let it pass, and the bridge to NNX take one for the other."""
    model = CLASSES[family](**sizes_of(family))
    assert set(abstract_parameters(model)) & set(dir(model)) == set()
