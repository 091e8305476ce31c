"""What a model must say of itself before it can be built on the shared frame."""

import jax
import jax.numpy as jnp
import pytest

from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.crate import Crate

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
