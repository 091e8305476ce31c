"""Every recipe builds its model, optimizer and step, without its data."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import DataConfig, TrainConfig, from_dict, to_dict, validate
from crate_jax.data.images.transform_spec import parse_transforms
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


def programs(config, num_classes=10):
    """The training and the evaluation step on a mesh, and the shapes of what they take."""
    config.batch_size -= config.batch_size % 8
    config.parallel.mesh = "data:-1,fsdp:2"
    schedule = make_schedule(config.optim, total_steps=1000, steps_per_epoch=5)
    run = dataclasses.replace(
        set_up(config),
        task=Classify.from_config(config, config.model.num_classes or num_classes),
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
    return (train_step, (state, batch, key)), (eval_step, (state.params, (), batch | mask))


@pytest.mark.parametrize(("name", "arg"), RECIPES)
def test_recipe_builds_and_lowers_for_tpu_and_cuda(name, arg):
    """Ahead of time, over eight devices, on a machine that has neither."""
    config = validate(MODULES[name].get_config(arg))
    parse_transforms(config.data.train_transforms, "data.train_transforms")
    parse_transforms(config.data.eval_transforms, "data.eval_transforms")
    results, both = [], programs(config)
    for program, arguments in both:
        exported = jax.export.export(program, platforms=("tpu", "cuda"))(*arguments)
        assert exported.platforms == ("tpu", "cuda") and exported.nr_devices == 8
        module = exported.mlir_module()
        assert module.count("stablehlo.dot_general") > 5 and "stablehlo.while" in module
        results.append(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    (new_state, metrics), sums = results
    state = both[0][1][0]
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    assert {"loss", "top1", "lr"} <= set(metrics)
    assert sums["top5"].shape == ()


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
    assert len(set(names)) == 1 + 8 + 16


def test_configs_survive_json():
    for name, arg in RECIPES:
        config = MODULES[name].get_config(arg)
        assert from_dict(to_dict(config)) == config
    assert isinstance(from_dict(to_dict(config)).data, DataConfig)
    assert isinstance(config, TrainConfig)


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(KeyError, match=r"got larg. Did you mean large\?"):
        MODULES["imagenet1k"].get_config("larg")
