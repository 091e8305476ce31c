"""What the mesh saves: memory of the state, and buffers that are given up."""

import math

import jax
import jax.numpy as jnp
import pytest

from crate_jax import create_model
from crate_jax.config import OptimConfig
from crate_jax.parallel import make_mesh
from crate_jax.tasks import Classify
from crate_jax.training.loop import compile_programs, open_checkpoints, restore_or_init
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.run import set_up
from crate_jax.training.state import abstract_state


def state_on(spec, **optim):
    config = OptimConfig(**optim)
    tx = make_optimizer(config, make_schedule(config, total_steps=10, steps_per_epoch=5))
    task = Classify(create_model("crate_tiny_patch16_224"))
    return abstract_state(task, tx, jax.random.key(0), make_mesh(spec), ema=True)[0]


def bytes_of(tree, per_device):
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if per_device else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(("spec", "shards"), [("fsdp:-1", 8), ("data:2,fsdp:4", 4), ("data:-1", 1)])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_device_holds_its_share_of_the_state(spec, shards, optimizer):
    state = state_on(spec, optimizer=optimizer)
    for part in (state, state.params, state.opt_state, state.ema_params):
        whole, own = (bytes_of(part, per_device) for per_device in (False, True))
        assert whole / shards <= own <= 1.05 * whole / shards
    moments = {"adamw": 2, "lion": 1}[optimizer]
    assert bytes_of(state, False) == pytest.approx((2 + moments) * 4 * 6_090_856, rel=1e-4)


def test_the_average_is_laid_out_like_the_parameters():
    state = state_on("data:2,fsdp:4")
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state.ema_params, state.params)
    assert all(jax.tree.leaves(same))
    assert any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(state.ema_params))


def test_half_the_first_moment():
    full, half = (state_on("data:-1", mu_dtype=d) for d in ("float32", "bfloat16"))
    saved = bytes_of(full, True) - bytes_of(half, True)
    assert saved == 2 * 6_090_856


def test_the_step_gives_up_the_state_it_was_given(tiny_config, tmp_path):
    run = set_up(tiny_config(parallel__mesh="data:4,fsdp:2"), "train", "eval")
    state, shardings, _ = restore_or_init(run, open_checkpoints(run, tmp_path))
    program = compile_programs(run, shardings).train_step
    batch = {"image": jnp.zeros((48, 16, 16, 1), jnp.uint8), "label": jnp.zeros(48, jnp.int32)}
    new_state, _ = program(state, batch, jax.random.key(0))
    old, new = jax.tree.leaves(state), jax.tree.leaves(new_state)
    assert all(x.is_deleted() for x in old) and not any(x.is_deleted() for x in new)
    assert [x.sharding for x in new] == jax.tree.leaves(shardings)
