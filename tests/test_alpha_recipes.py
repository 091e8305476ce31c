"""The recipes of CRATE-α: what their source says, what decays, and the flags that they name."""

import re

import jax
import pytest
from command import ROOT
from flax import traverse_util

from crate_jax.cli.flags import parse_config
from crate_jax.config import validate
from crate_jax.interop.convert import find_layout
from crate_jax.interop.tree import tree_of
from crate_jax.models.cost import count_parameters
from crate_jax.models.zoo import build_model
from crate_jax.training.optimizer import decay_mask

CONFIGS = ROOT / "configs"
FILES = ("alpha_imagenet21k", "alpha_imagenet1k")


def recipe(name, variant="base-32", flags=()):
    return validate(parse_config(f"{CONFIGS / name}.py:{variant}", list(flags)))


@pytest.mark.parametrize(
    ("name", "lr", "smoothing"), [(FILES[0], 8e-4, 0.0), (FILES[1], 1.6e-4, 0.1)]
)
def test_what_the_official_code_says(name, lr, smoothing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a recipe needs nothing beside it
    config = recipe(name)
    assert (config.batch_size, config.total_epochs, config.optim.warmup_epochs) == (4096, 91, 10)
    optim, data = config.optim, config.data
    assert optim.lr == pytest.approx(lr) and optim.label_smoothing == smoothing
    assert (optim.optimizer, optim.b1, optim.b2, optim.mu_dtype) == ("adamw", 0.9, 0.95, "bfloat16")
    assert (optim.weight_decay, optim.clip_norm, optim.end_lr) == (0.1, 1.0, 1e-6)
    assert (data.mixup_alpha, data.cutmix_alpha, data.mix_switch) == (0.8, 1.0, 0.5)
    randaugment = "timm_randaugment(2, 9, 0.5, fill=(124, 116, 104))"
    assert (randaugment in data.train_transforms) == (name == FILES[1])
    assert config.init_fit == (("head",) if name == FILES[1] else ())


@pytest.mark.parametrize("name", FILES)
def test_what_decays_is_what_the_official_code_calls_a_kernel(name):
    config = recipe(name, "tiny-32")
    model = build_model(config.model).clone(num_classes=10)
    tree = tree_of(model)
    entries = find_layout(model, "jax").entries(tree)
    kernels = {entry.path for name, entry in entries.items() if name.endswith("/kernel")}
    params = traverse_util.unflatten_dict(dict(tree.shapes), sep="/")
    leaves = jax.tree.map(lambda shape: shape[0], params, is_leaf=lambda x: isinstance(x, tuple))

    def decays(variant):
        optim = recipe(name, variant).optim
        mask = traverse_util.flatten_dict(
            decay_mask(leaves, optim.no_decay, optim.decay_only), sep="/"
        )
        return {path for path, decayed in mask.items() if decayed}

    assert decays("tiny-32") == kernels and len(kernels) == 4
    assert decays("tiny-32-decay") == kernels | {"blocks/odl/D", "blocks/odl/D1"}


def test_the_flags_of_the_ablation_are_its_models():
    text = (CONFIGS / "alpha_imagenet1k.py").read_text()
    stated = [
        re.findall(r"--config\.\S+?=\w+", flags)
        for flags in re.findall(r"``((?:--config\.model\.\w+=\w+\s*)+)``", text)
    ]
    counts = [
        count_parameters(build_model(recipe(FILES[1], flags=flags).model).clone(num_classes=1000))
        for flags in [*stated, []]
    ]
    assert counts == [24_440_296, 45_673_960, 73_985_512, 73_985_512]


def test_an_unknown_size_suggests_the_nearest():
    with pytest.raises(KeyError, match=r"got base-31\. Did you mean base-32\?"):
        recipe(FILES[0], "base-31")
