"""The named models: exact parameter counts, and names that are not known."""

import ast
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import sizes_of

import crate_jax
from crate_jax import create_model, list_models
from crate_jax.config import ModelConfig
from crate_jax.models import fields, sections, variants
from crate_jax.models.cost import count_parameters
from crate_jax.models.fields import FAMILIES, fields_of
from crate_jax.models.sources import source_of
from crate_jax.models.variants import VARIANTS
from crate_jax.models.zoo import (
    CLASSES,
    architecture,
    build_model,
    family_of,
    from_architecture,
    section_of,
)
from crate_jax.options import option_of

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


def test_every_crate_is_in_the_table():
    """Ablations are in test_grid.py, CBSA in test_attentions.py, other families by themselves."""
    of_family = {name for name, variant in VARIANTS.items() if variant.family == "crate"}
    others = {name for name in of_family if name.startswith(("crate_m", "cbsa_"))}
    assert of_family - others == set(PARAMETERS) == set(SIZES)


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
        ("crate_[bs]*_patch8_*", ["crate_small_384_patch8_224", "crate_base_patch8_224"]),
        ("*e_tiny*", ["crate_tiny_patch16_224", "crate_mae_tiny_patch16_224"]),
        ("resnet*", []),
        ("crate_base_patch16_224", ["crate_base_patch16_224"]),
    ],
)
def test_list_models_takes_a_shell_pattern(pattern, names):
    assert list_models(pattern) == names


def test_list_models_is_by_family():
    assert set(list_models()) == set(VARIANTS)
    families = [family for family, _ in itertools.groupby(map(source_of, list_models()))]
    assert len(families) == len(set(families)) >= 10
    sizes = ["tiny", "small", "base", "large"]
    assert list_models("cbsa_*") == [f"cbsa_{size}_patch16_224" for size in sizes]


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
    with pytest.raises(KeyError, match=r"got qqq\. Known: cbsa_base_patch16_224, cbsa_large"):
        create_model("qqq")


def test_unknown_override_suggests_the_nearest():
    with pytest.raises(KeyError, match=r"^'model\.num_class must .*Did you mean num_classes\?"):
        create_model("crate_tiny_patch16_224", num_class=10)
    with pytest.raises(KeyError, match=r"^'model\.parent must name a field of crate_tiny"):
        create_model("crate_tiny_patch16_224", parent=None)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("width", "6", "a whole number >= 1; got '6'"),
        ("depth", 1.5, "a whole number >= 1; got 1.5"),
        ("num_heads", True, "a whole number >= 1; got True"),
        ("num_heads", 0, ">= 1; got 0"),
        ("eta", "big", "a number > 0; got 'big'"),
        ("image_size", (1, 2, 3), "1 or 2 whole numbers >= 1; got (1, 2, 3)"),
        ("image_size", (8, 0), ">= 1; got (8, 0)"),
    ],
)
def test_a_wrong_value_is_one_line(field, value, rule):
    with pytest.raises(ValueError) as caught:
        create_model("crate_tiny_patch16_224", **{field: value})
    assert str(caught.value) == f"model.{field} must be {rule}. Change it."


@pytest.mark.parametrize(("field", "value"), [("pool", "max"), ("dtype", "float16"), ("dtype", 3)])
def test_a_wrong_word_is_one_line(field, value):
    with pytest.raises(ValueError, match=rf"^model\.{field} must be one of .*; got {value}\. \w+"):
        create_model("crate_tiny_patch16_224", **{field: value})


def test_a_type_that_models_do_not_compute_in_is_refused():
    for dtype in (int, np.int32, np.dtype("float64")):
        word = dtype.name if isinstance(dtype, np.dtype) else dtype.__name__
        message = rf"^model\.dtype must be one of float32, bfloat16; got {word}\. \w+"
        with pytest.raises(ValueError, match=message):
            create_model("crate_tiny_patch16_224", dtype=dtype)


def test_a_type_may_be_stated_as_a_word():
    stated = ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"))
    models = [create_model("crate_tiny_patch16_224", dtype=dtype) for dtype in stated]
    assert len(set(models)) == 1
    plain = create_model("crate_tiny_patch16_224")
    assert hash(plain) == hash(plain.clone(dtype=jnp.float32))


# --- families -------------------------------------------------------------------------------------


def test_every_family_has_a_class_with_its_fields():
    assert set(CLASSES) == set(FAMILIES) >= {variant.family for variant in VARIANTS.values()}
    for family, declared in FAMILIES.items():
        assert issubclass(CLASSES[family], declared)
        own = {f.name for f in dataclasses.fields(CLASSES[family])} - {"parent", "name"}
        assert own == set(fields_of(family))


@pytest.mark.parametrize("cls", CLASSES.values(), ids=lambda cls: cls.__name__)
def test_every_class_is_a_public_name(cls):
    assert getattr(crate_jax, cls.__name__) is cls and cls.__name__ in crate_jax.__all__


@pytest.mark.parametrize("module", [fields, variants, sections], ids=lambda m: m.__name__)
def test_the_fields_are_declared_without_jax(module):
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert names and not any(str(name).split(".")[0] in ("jax", "flax") for name in names)


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_is_read_by_the_model(family, monkeypatch):
    name = next(name for name, variant in VARIANTS.items() if variant.family == family)
    model = create_model(name, **sizes_of(family))
    cls, read = type(model), set()

    def spy(self, name):
        caller = sys._getframe(1).f_code.co_filename
        if "/crate_jax/models/" in caller:
            read.add(name)
        return object.__getattribute__(self, name)

    sample = jax.eval_shape(model.sample_input)
    key = jax.eval_shape(lambda: jax.random.key(0))
    monkeypatch.setattr(cls, "__getattribute__", spy, raising=False)
    jax.eval_shape(lambda key, x: model.init(key, x, train=False), key, sample)
    assert read >= set(fields_of(family))


def test_a_model_comes_back_from_its_architecture():
    model = create_model("crate_tiny_patch16_224", image_size=(32, 64), eta=0.5, pool="mean")
    stated = architecture(model)
    assert stated["family"] == "crate" and stated["image_size"] == [32, 64]
    assert stated["patch_size"] == [16, 16] and stated["head_dim"] == 64
    told = {name for name, field in fields_of("crate").items() if not option_of(field).how}
    assert set(stated) == told | {"family"} and "dtype" not in stated
    back = from_architecture(json.loads(json.dumps(stated)))
    assert architecture(back) == stated and hash(back)


@pytest.mark.parametrize("name", list_models())
def test_a_section_builds_the_model_again(name):
    model = create_model(name)
    assert section_of(model).name == name
    assert architecture(build_model(section_of(model))) == architecture(model)


@pytest.mark.parametrize("layer_scale", [None, 0.1, 0.5])
def test_the_section_of_no_variant(layer_scale):
    """Where a variant has a value and the model none, its section has another variant's name."""
    sizes = dict(image_size=(32, 16), width=768, depth=12, num_heads=12, registers=4)
    model = create_model("vit_base_patch16_224", **sizes, layer_scale=layer_scale)
    assert architecture(build_model(section_of(model))) == architecture(model)


def test_an_older_file_states_a_crate():
    model = create_model("crate_tiny_patch16_224")
    stated = architecture(model)
    for later in ("family", "attention", "nonlinearity", "stem", "representatives"):
        del stated[later]
    assert architecture(from_architecture(stated)) == architecture(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "crte"}, "must be of a known family; got crte. Did you mean crate?"),
        ({"future": 1}, "must be stated by image_size, "),
        ({"dtype": "float32"}, "must be stated by image_size, "),
        ({"width": None}, "model.width must be a whole number >= 1; got None"),
    ],
)
def test_a_file_that_states_no_model(changes, message):
    stated = architecture(create_model("crate_tiny_patch16_224")) | changes
    with pytest.raises(ValueError) as caught:
        from_architecture(stated)
    assert message in str(caught.value)


@pytest.mark.parametrize("stated", [None, [1, 2], {}, {"width": 3}])
def test_values_that_state_no_model(stated):
    with pytest.raises(ValueError, match="must be stated by image_size, "):
        from_architecture(stated)


def test_the_family_of_a_model_is_that_of_its_class_or_of_one_that_it_extends():
    for family, cls in CLASSES.items():
        assert family_of(cls(**sizes_of(family))) == family

    class Mine(CLASSES["vit"]):
        """A ViT of one's own."""

    model = Mine(8, 4, 2, width=4, depth=1, num_heads=1)
    assert family_of(model) == architecture(model)["family"] == "vit"
    with pytest.raises(ValueError, match=rf"known family, {', '.join(CLASSES)}; got int\. Use"):
        family_of(3)


def test_a_model_of_no_classes_is_one_of_features():
    model = create_model("crate_tiny_patch16_224", num_classes=0)
    assert count_parameters(model) == PARAMETERS["crate_tiny_patch16_224"] - 385 * 1000
    assert from_architecture(architecture(model)).num_classes == 0
    with pytest.raises(ValueError, match=r"^model\.num_classes must be >= 0; got -1"):
        create_model("crate_tiny_patch16_224", num_classes=-1)
