"""The recipes of ToST and of CBSA: what their sources say, and what decays."""

import pytest
from command import ROOT
from flax import traverse_util

from crate_jax.cli.flags import parse_config
from crate_jax.config import validate
from crate_jax.interop.convert import find_layout
from crate_jax.interop.tree import tree_of
from crate_jax.models.zoo import build_model
from crate_jax.training.optimizer import decay_mask

CONFIGS = ROOT / "configs"


def recipe(name, variant, flags=()):
    return validate(parse_config(f"{CONFIGS / name}.py:{variant}", list(flags)))


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.0), ("small", 0.05), ("medium", 0.15)])
def test_what_the_official_code_of_tost_says(size, drop_path):
    config = recipe("tost_imagenet1k", size)
    optim, data = config.optim, config.data
    assert config.model.name == f"tost_{size}_patch16_224" and config.model.drop_path == drop_path
    assert (config.batch_size, config.total_epochs, data.repeats) == (128 * 8, 400, 3)
    assert (optim.optimizer, optim.lr, optim.weight_decay) == ("adamw", 5e-4 * 1024 / 512, 0.05)
    assert (optim.b1, optim.b2, optim.eps, optim.clip_norm) == (0.9, 0.999, 1e-8, 0)
    assert (optim.warmup_epochs, optim.warmup_lr, optim.end_lr) == (5, 1e-6, 1e-5)
    assert (data.mixup_alpha, data.cutmix_alpha, data.mix_switch) == (0.8, 1.0, 0.5)
    assert (optim.label_smoothing, optim.ema_decay) == (0.1, 0.99996)
    crop, flip, *rest = data.train_transforms.split("|")
    assert (crop, flip) == ("random_resized_crop(224, interpolation='bicubic')", "random_flip()")
    mean = tuple(round(255 * value) for value in data.mean)
    deviation = tuple(round(255 * value) for value in data.std)
    assert rest == [
        f"timm_randaugment(2, 9, 0.5, fill={mean}, interpolation='bicubic')",
        "random_erasing(0.25, max_area=0.3333, max_ratio=3.3333, "
        f"value={mean}, deviation={deviation})",
    ]


def test_tosts_options_are_more_than_its_script_makes_of_them():
    code, options = (recipe("tost_imagenet1k", f"small-{preset}") for preset in ("code", "options"))
    assert (code.optim.cooldown_epochs, options.optim.cooldown_epochs) == (0, 10)
    assert (code.total_epochs, options.total_epochs) == (400, 410)
    parts = options.data.train_transforms.split("|")
    assert parts.pop(3) == "color_jitter(0.4, 0.4, 0.4)"
    assert "|".join(parts) == code.data.train_transforms
    options.data.train_transforms, options.name = code.data.train_transforms, code.name
    options.total_epochs, options.optim.cooldown_epochs = code.total_epochs, 0
    assert options == code


def test_what_decays_is_what_has_two_axes_in_the_official_code():
    """And is no class token; the temperature of a subspace is of shape (K, 1) there."""
    config = recipe("tost_imagenet1k", "tiny")
    model = build_model(config.model).clone(num_classes=10)
    tree = tree_of(model).of_parameters
    params = traverse_util.unflatten_dict(dict.fromkeys(tree.shapes, 0), sep="/")
    mask = decay_mask(params, config.optim.no_decay, config.optim.decay_only)
    decays = traverse_util.flatten_dict(mask, sep="/")
    entries = find_layout(model).entries(tree)
    assert {entry.path for entry in entries.values()} == set(decays)
    for name, entry in entries.items():
        assert decays[entry.path] == (len(entry.official) > 1 and name != "cls_token"), name
    assert decays["blocks/tssa/tau"] and 10 < sum(decays.values()) < 20


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_what_the_official_code_of_cbsa_says(size):
    config = recipe("cbsa_imagenet1k", size)
    optim, data = config.optim, config.data
    assert config.model.name == f"cbsa_{size}_patch16_224"
    assert (config.batch_size, config.total_epochs) == (256, 150)
    assert (optim.optimizer, optim.lr, optim.weight_decay, optim.b2) == ("lion", 2e-4, 0.05, 0.99)
    assert (optim.schedule, optim.warmup_epochs) == ("official_readme", 20)
    assert optim.label_smoothing == 0.1
    assert optim.clip_norm == 0 and optim.decay_only == optim.no_decay == ()
    assert data.train_transforms == "random_resized_crop(224)|random_flip()"


@pytest.mark.parametrize("attention", ["tssa", "mssa"])
def test_another_attention_in_the_frame_of_cbsa(attention):
    flags = [f"--config.model.attention={attention}"]
    model = build_model(recipe("cbsa_imagenet1k", "tiny", flags).model)
    assert model.attention == attention and model.stem == "convolutions"
