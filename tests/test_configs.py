"""Every recipe is a program that was lowered, or differs from one by the size of its model alone.

Programs are built without the data of the recipe.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from crate_jax.config import DataConfig, TrainConfig, from_dict, to_dict, validate
from crate_jax.data.images.transform_spec import parse_transforms
from crate_jax.models.zoo import build_model
from crate_jax.parallel import batch_sharding
from crate_jax.tasks import Classify
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.run import jit_sums, jit_train_step, set_up
from crate_jax.training.state import abstract_state

CONFIGS = Path(__file__).parents[1] / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path) for path in sorted(CONFIGS.glob("*.py"))}
RECIPES = [(name, arg) for name, module in MODULES.items() for arg in module.RECIPES]
# Of these recipes two each are lowered: the smallest, and the largest of another preset or with the
# longer list of what decays. Those between differ from them in the fields named here, each of which
# has so many values: in lengths of arrays, rates and lists, and so not in what the program is.
ALPHA = {"model.name": 20, "optim.decay_only": 2}
FAMILIES = {
    "alpha_imagenet1k": (("tiny-32", "huge-14-decay"), ALPHA),
    "alpha_imagenet21k": (("tiny-32", "huge-14-decay"), ALPHA),
    "cbsa_imagenet1k": (("tiny", "large"), {"model.name": 4}),
    "mae_imagenet1k": (("tiny", "large-unscaled"), {"model.name": 4, "optim.lr": 2}),
    "openwebtext": (("base", "xl"), {"model.name": 4}),
    "simdino_imagenet1k": (
        ("base", "v2-large"),
        {
            "model.name": 4,
            "model.drop_path": 2,
            "model.drop_path_uniform": 2,
            "optim.lr": 2,
            "optim.no_decay": 2,
            "optim.clip_each": 2,
            "optim.clip_norm": 2,
            "optim.layer_decay": 2,
            "optim.patch_lr_scale": 2,
            "simdino.momentum": 2,
            "simdino.patch_weight": 2,
        },
    ),
    "tost_imagenet1k": (
        ("tiny", "medium-options"),
        {"model.name": 3, "model.drop_path": 3, "optim.cooldown_epochs": 2},
    ),
}


def fields_of_program(name, arg):
    """What of a recipe reaches its programs, by field."""
    config = MODULES[name].get_config(arg)
    values = to_dict(config)
    data = ("mean", "std", "mixup_alpha", "cutmix_alpha", "mix_switch")
    return {
        "task": config.task,
        "batch_size": config.batch_size,
        **{f"model.{key}": value for key, value in values["model"].items()},
        **{f"optim.{key}": value for key, value in values["optim"].items()},
        **{f"masking.{key}": value for key, value in values["masking"].items()},
        **{f"mcr2.{key}": value for key, value in values["mcr2"].items()},
        **{f"simdino.{key}": value for key, value in values["simdino"].items()},
        **{f"data.{key}": values["data"][key] for key in data},
    }


def group(recipes, without=()):
    """Recipes by the program that they are, some fields left out of sight."""
    groups = {}
    for recipe in recipes:
        fields = fields_of_program(*recipe)
        key = json.dumps({key: value for key, value in fields.items() if key not in without})
        groups.setdefault(key, []).append(recipe)
    return list(groups.values())


OTHERS = group(recipe for recipe in RECIPES if recipe[0] not in FAMILIES)
LOWERED = [recipes[0] for recipes in OTHERS]
LOWERED += [(name, arg) for name, (args, _) in FAMILIES.items() for arg in args]


DEVICES = {
    "tpu": AbstractDevice("TPU v5e", 1, "tpu"),
    "cuda": AbstractDevice("NVIDIA H100", 132, "gpu"),
}


def programs(config, device, num_classes=10):
    """The training and the evaluation step on a mesh, and the shapes of what they take."""
    config.batch_size -= config.batch_size % 8
    config.parallel.mesh = "data:-1,fsdp:2"
    schedule = make_schedule(config.optim, total_steps=1000, steps_per_epoch=5)
    run = set_up(config)
    sizes, names, types = run.mesh.axis_sizes, run.mesh.axis_names, run.mesh.axis_types
    task = run.task
    if isinstance(task, Classify):
        task = Classify.from_config(config, config.model.num_classes or num_classes)
    run = dataclasses.replace(
        run,
        mesh=AbstractMesh(sizes, names, axis_types=types, abstract_device=device),
        task=task,
        schedule=schedule,
        tx=make_optimizer(config.optim, schedule),
    )
    state, shardings = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    rows = batch_sharding(run.mesh)
    blank = run.task.blank() | {"mask": np.ones(1, np.float32)}
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *row.shape[1:]), row.dtype, sharding=rows)
        for name, row in blank.items()
    }
    mask = {"mask": batch.pop("mask")}
    key = jax.eval_shape(lambda: run.key)
    train_step, eval_step = jit_train_step(run, shardings), jit_sums(run)
    of_eval = (state.params, state.extra, batch | mask)
    return (train_step, (state, batch, key)), (eval_step, of_eval)


def test_every_recipe_is_lowered_but_for_its_size():
    assert len(OTHERS) == 23
    seen = [recipe for recipes in OTHERS for recipe in recipes]
    for name, (args, between) in FAMILIES.items():
        recipes = [recipe for recipe in RECIPES if recipe[0] == name]
        assert {(name, arg) for arg in args} < set(recipes)
        assert len(group(recipes, without=between)) == 1
        for field, values in between.items():
            found = {json.dumps(fields_of_program(*recipe)[field]) for recipe in recipes}
            assert len(found) == values, field
        seen += recipes
    assert sorted(seen) == sorted(RECIPES)


def test_every_recipe_is_valid():
    for name, arg in RECIPES:
        config = validate(MODULES[name].get_config(arg))
        parse_transforms(config.data.train_transforms, "data.train_transforms")
        parse_transforms(config.data.eval_transforms, "data.eval_transforms")
        assert build_model(config.model).num_tokens > 1


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        pytest.param(*recipe, marks=[] if recipe[0] == "digits" else pytest.mark.slow)
        for recipe in LOWERED
    ],
)
def test_recipe_builds_and_lowers_for_tpu_and_cuda(name, arg):
    """Ahead of time, over eight devices, on a machine that has neither; each by itself.

    JAX does not export a kernel of one platform together with another platform.
    """
    results, config = [], MODULES[name].get_config(arg)
    half = config.model.dtype == "bfloat16"
    model = build_model(config.model)
    # Tokens to tokens without a kernel: none knows a mask, nor three maps of a head.
    linear = getattr(model, "attention", "") in ("tssa", "cbsa") or hasattr(model, "vocab_size")
    linear = linear or model.attention_part.name == "mhsa"
    kernels = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    both = {
        platform: programs(MODULES[name].get_config(arg), device)
        for platform, device in DEVICES.items()
    }
    for platform, (program, arguments) in ((x, one) for x in both for one in both[x]):
        export = jax.export.export(program, platforms=(platform,), disabled_checks=[kernels])
        exported = export(*arguments)
        assert exported.platforms == (platform,) and exported.nr_devices == 8
        module = exported.mlir_module()
        assert module.count("stablehlo.dot_general") > 3
        assert "stablehlo.while" in module or platform == "cuda"  # GPUs have a layer after another
        # Of the attention of tokens to tokens, and of the derivative of a norm.
        kernel = half and platform == "cuda" and (program is both["cuda"][0][0] or not linear)
        assert ("xla.gpu.triton" in module) is kernel
        if platform == "cuda":
            results.append(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    (new_state, metrics), sums = results
    state = both["cuda"][0][1][0]
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    told, summed = {
        "classify": ("top1", "top5"),
        "masked_autoencoding": ("loss", "loss_of_means"),
        "mcr2": ("rate_reduction", "pairs"),
        "simdino": ("compression", "knn"),
        "next_token": ("loss", "tokens"),
    }[config.task]
    assert {"loss", told, "lr"} <= set(metrics)
    assert sums[summed].shape == ()


def test_imagenet_presets_say_what_their_sources_say():
    paper = MODULES["imagenet1k"].get_config("base-paper")
    assert (paper.optim.optimizer, paper.optim.lr, paper.optim.weight_decay) == (
        "lion",
        2.4e-4,
        0.5,
    )
    assert (paper.batch_size, paper.total_epochs, paper.optim.warmup_epochs) == (2048, 150, 5)
    readme = MODULES["imagenet1k"].get_config("base-readme")
    assert (readme.optim.lr, readme.optim.weight_decay) == (2e-4, 0.05)
    assert (readme.batch_size, readme.total_epochs) == (512, 200)
    assert readme.optim.schedule == "official_readme" and readme.optim.warmup_epochs == 20
    assert paper.optim.label_smoothing == readme.optim.label_smoothing == 0.1
    for config in (paper, readme):
        assert config.optim.clip_norm == 0 and config.optim.no_decay == ()


def test_recipes_have_different_names():
    names = [MODULES[name].get_config(arg).name for name, arg in RECIPES]
    # Short forms are the same recipe as one of the long ones.
    assert len(set(names)) == 10 + 8 + 16 + 2 * 40 + 4 + 6 + 8 + 1 + 4 + 4


def test_configs_survive_json():
    for name, arg in RECIPES:
        config = MODULES[name].get_config(arg)
        assert from_dict(to_dict(config)) == config
    assert isinstance(from_dict(to_dict(config)).data, DataConfig)
    assert isinstance(config, TrainConfig)


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(KeyError, match=r"got larg. Did you mean large\?"):
        MODULES["imagenet1k"].get_config("larg")
