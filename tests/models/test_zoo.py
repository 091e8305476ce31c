"""The named models: exact parameter counts, and names that are not known."""

import jax.numpy as jnp
import pytest

from crate_jax import create_model, list_models
from crate_jax.config import ModelConfig
from crate_jax.models.cost import count_parameters
from crate_jax.models.zoo import build_model

# Parameters at 224 pixels with 1000 classes. Those of 16-pixel patches are the official code's own.
PARAMETERS = {
    "crate_tiny_patch16_224": 6_090_856,
    "crate_small_patch16_224": 13_116_328,
    "crate_base_patch16_224": 22_796_008,
    "crate_large_patch16_224": 77_641_192,
    "crate_small_384_patch8_224": 6_094_312,
    "crate_base_patch8_224": 22_804_072,
}
# (patch, d, K, L), from the papers.
SIZES = {
    "crate_tiny_patch16_224": (16, 384, 6, 12),
    "crate_small_patch16_224": (16, 576, 12, 12),
    "crate_base_patch16_224": (16, 768, 12, 12),
    "crate_large_patch16_224": (16, 1024, 16, 24),
    "crate_small_384_patch8_224": (8, 384, 6, 12),
    "crate_base_patch8_224": (8, 768, 12, 12),
}


def test_every_model_is_in_the_table():
    assert set(list_models()) == set(PARAMETERS) == set(SIZES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    patch, d, K, L = SIZES[name]
    pixels, tokens = 3 * patch**2, (224 // patch) ** 2 + 1
    embedding = 2 * pixels + (pixels * d + d) + 2 * d + d + tokens * d
    mssa = d * d + (d * d + d)  # U for all heads, W_out and b_out
    layer = 2 * d + mssa + 2 * d + d * d
    head = 2 * d + d * 1000 + 1000
    assert PARAMETERS[name] == embedding + L * layer + head
    model = create_model(name)
    assert count_parameters(model) == PARAMETERS[name]
    assert (model.width, model.num_heads, model.depth) == (d, K, L)


def test_overrides_reach_the_model():
    model = create_model("crate_tiny_patch16_224", num_classes=10, image_size=(32, 64), depth=2)
    assert (model.num_classes, model.image_size, model.depth) == (10, (32, 64), 2)
    assert (model.width, model.patch_size) == (384, 16)  # of the variant still
    plain = create_model("crate_tiny_patch16_224")
    assert (plain.num_classes, plain.image_size) == (1000, 224)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("crate_*_patch8_*", ["crate_base_patch8_224", "crate_small_384_patch8_224"]),
        ("*tiny*", ["crate_tiny_patch16_224"]),
        ("resnet*", []),
        ("crate_base_patch16_224", ["crate_base_patch16_224"]),
    ],
)
def test_list_models_takes_a_shell_pattern(pattern, names):
    assert list_models(pattern) == names


def test_list_models_is_sorted():
    assert len(list_models()) >= 6
    assert list_models() == sorted(list_models())


def test_config_section_to_model():
    section = ModelConfig(
        name="crate_base_patch16_224",
        image_size=(32, 48),
        patch_size=(8,),
        num_classes=10,
        dtype="bfloat16",
        lmbda=0.0,
    )
    model = build_model(section)
    assert (model.image_size, model.patch_size, model.num_classes) == ((32, 48), (8,), 10)
    assert model.dtype == jnp.bfloat16
    assert model.lmbda == 0.0  # a zero is a value, only None keeps the variant's
    assert (model.width, model.depth, model.eta) == (768, 12, 0.1)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(
        KeyError, match=r"got crate_tiny_patch16\. Did you mean crate_tiny_patch16_"
    ):
        create_model("crate_tiny_patch16")
    with pytest.raises(KeyError, match=r"got qqq\. Known: crate_base_patch16_224, "):
        create_model("qqq")


def test_unknown_override_suggests_the_nearest():
    with pytest.raises(KeyError, match=r"^'model\.num_class must .*Did you mean num_classes\?"):
        create_model("crate_tiny_patch16_224", num_class=10)
    with pytest.raises(KeyError, match=r"^'model\.parent must name a field"):
        create_model("crate_tiny_patch16_224", parent=None)
