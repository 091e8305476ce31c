"""The recipes of SimDINO say what its code says."""

import jax
import pytest

from crate_jax.cli.recipes import load_recipe
from crate_jax.config import validate
from crate_jax.data.images.transform_spec import parse_transforms
from crate_jax.tasks.simdino import SimDino
from crate_jax.training.layerwise import layer_rates
from crate_jax.training.optimizer import decay_mask

FORMS = ("base", "large", "v2-base", "v2-large")


def paths(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


@pytest.mark.parametrize("form", FORMS)
def test_what_both_have(form):
    config = validate(load_recipe(f"simdino_imagenet1k:{form}"))
    views, optim = config.simdino, config.optim
    assert (config.batch_size, config.total_epochs, optim.warmup_epochs) == (512, 100, 10)
    assert (optim.weight_decay, optim.end_weight_decay, optim.end_lr) == (0.04, 0.4, 1e-6)
    assert (views.group_size, views.eps, views.local_crops, views.local_size) == (64, 0.05, 10, 96)
    assert (views.head_hidden, views.head_features, views.end_momentum) == (2048, 256, 1)
    assert views.gamma is None
    steps = {
        "data.train_transforms": config.data.train_transforms,
        "simdino.second_transforms": views.second_transforms,
        "simdino.local_transforms": views.local_transforms,
    }
    found = {field: len(parse_transforms(spec, field)) for field, spec in steps.items()}
    assert list(found.values()) == [5, 6, 5]


@pytest.mark.parametrize("form", FORMS)
def test_decay_leaves_out_biases_norms_and_factors_alone(form):
    config = load_recipe(f"simdino_imagenet1k:{form}")
    params, _ = jax.eval_shape(SimDino.from_config(config).init, jax.random.key(0))
    kept = {
        path for path, decays in paths(decay_mask(params, config.optim.no_decay)).items() if decays
    }
    assert {path.split("/")[-1] for path in kept} == {
        *("W_qkv", "W_out", "W_in", "kernel", "cls_token", "pos_embedding"),
        *(("register_tokens", "mask_token") if form.startswith("v2") else ()),
    }


def test_how_they_differ():
    first, second = (load_recipe(f"simdino_imagenet1k:{form}") for form in ("base", "v2-large"))
    assert first.optim.lr == 1e-3 and second.optim.lr == pytest.approx(4e-3 / 2**0.5)
    assert (first.optim.clip_each, first.optim.clip_norm, first.optim.layer_decay) == (3, 0, 1)
    assert (second.optim.clip_each, second.optim.clip_norm) == (0, 3)
    assert (first.simdino.momentum, first.simdino.patch_weight) == (0.996, 0)
    assert (second.simdino.momentum, second.simdino.patch_weight) == (0.9, 1)
    task = SimDino.from_config(second)
    assert (task.model.registers, task.model.layer_scale, task.model.drop_path) == (4, 0.1, 0.2)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    optim = second.optim
    rates = paths(layer_rates(params, optim.layer_decay, optim.patch_lr_scale))
    assert rates["head/linear0/kernel"] == rates["head_norm/scale"] == 1
    for name in ("register_tokens", "head/mask_token", "embedding/pos_embedding"):
        assert rates[name] == pytest.approx(0.9**25), name
    assert rates["embedding/projection/kernel"] == pytest.approx(0.2 * 0.9**25)
    scales = rates["blocks/mlp_scale"]
    assert scales[0] == pytest.approx(0.9**24) and scales[-1] == pytest.approx(0.9)
