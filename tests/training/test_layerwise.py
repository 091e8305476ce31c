"""Clipping by tensor, rates by layer, a decay that moves: against PyTorch, tensor by tensor."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crate_jax
from crate_jax.config import OptimConfig
from crate_jax.interop.layouts.vit import TIMM
from crate_jax.interop.tree import flatten, nest, tree_of
from crate_jax.parallel import make_mesh, replicated
from crate_jax.training.layerwise import clip_each, layer_rates
from crate_jax.training.optimizer import make_decay, make_optimizer, make_schedule
from crate_jax.training.run import batches_after, jit_train_step, set_up
from crate_jax.training.state import init_sharded

DEPTH, STEPS = 3, 6
VIT = crate_jax.create_model(
    "vit_tiny_patch16_224", image_size=8, patch_size=4, width=8, depth=DEPTH, num_heads=2
).clone(num_classes=5)
NO_DECAY = ("bias", "scale", "b_qkv", "b_out", "b_in")


def some_tree(model, rng, scale=1.0):
    shapes = tree_of(model).shapes
    return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}


def nested(flat, model=VIT):
    return jax.tree.map(jnp.asarray, nest(flat, tree_of(model))[0])


def official_rate(name, decay, patches):
    """The factor by the rules of DINOv2, from PyTorch's names."""
    layer = DEPTH + 1
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    return decay ** (DEPTH + 1 - layer) * (patches if name.startswith("patch_embed") else 1)


@pytest.mark.parametrize("end", [None, 0.4])
def test_a_run_beside_pytorchs_with_a_group_for_every_tensor(end):
    torch = pytest.importorskip("torch")
    optim = OptimConfig(
        lr=0.01,
        weight_decay=0.04,
        end_weight_decay=end,
        clip_each=3.0,
        layer_decay=0.7,
        patch_lr_scale=0.2,
        no_decay=NO_DECAY,
        b2=0.99,
    )
    schedule = make_schedule(optim, total_steps=STEPS, steps_per_epoch=2)
    tx = make_optimizer(optim, schedule, total_steps=STEPS)
    rng, tree = np.random.default_rng(0), tree_of(VIT)
    flat = some_tree(VIT, rng)
    params = nested(flat)
    theirs = {
        name: torch.nn.Parameter(torch.tensor(array))
        for name, array in TIMM.to_official(flat, tree).items()
    }
    groups = [dict(params=[p], name=name) for name, p in theirs.items()]
    torch_opt = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=optim.eps)
    state, clipped = tx.init(params), 0
    for step in range(STEPS):
        grads = some_tree(VIT, rng, scale=0.4)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(nested(grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        decay = 0.04 if end is None else end + (0.04 - end) * cosine
        for group in torch_opt.param_groups:
            name = group["name"]
            group["lr"] = 0.01 * cosine * official_rate(name, 0.7, 0.2)
            is_vector = name.endswith("bias") or "norm" in name
            group["weight_decay"] = 0.0 if is_vector else decay
        for name, grad in TIMM.to_official(grads, tree).items():
            factor = 3.0 / (np.sqrt(np.sum(np.square(grad, dtype=np.float64))) + 1e-6)
            clipped += factor < 1
            theirs[name].grad = torch.tensor(grad * min(1.0, factor), dtype=torch.float32)
        torch_opt.step()
        ours = TIMM.to_official({k: np.asarray(v) for k, v in flatten(params).items()}, tree)
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                ours[name], parameter.detach(), rtol=1e-5, atol=2e-6, err_msg=name
            )
    assert 0 < clipped < STEPS * len(theirs)  # both sides of the bound were met


def test_each_layer_of_a_stack_is_clipped_on_its_own():
    grads = {
        "blocks": {"D": jnp.stack([jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.25)])},
        "class_blocks": {"tau": jnp.asarray([4.0, 0.5])},
        "block": {"D": jnp.full((2, 2), 3.0)},
        "head": {"kernel": jnp.full((2, 2), -3.0), "scale": jnp.float32(0.0)},
    }
    tx = clip_each(2.0)
    got, _ = tx.update(grads, tx.init(grads))
    one = 2 / (6 + 1e-6)
    np.testing.assert_allclose(got["blocks"]["D"][:, 0, 0], [3 * one, 0.25], rtol=1e-6)
    np.testing.assert_allclose(got["class_blocks"]["tau"], [2.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(got["block"]["D"], 3 * one, rtol=1e-6)
    np.testing.assert_allclose(got["head"]["kernel"], -3 * one, rtol=1e-6)
    assert got["head"]["scale"] == 0


def test_a_norm_of_a_small_float_is_computed_in_float32():
    grads = {"head": {"kernel": jnp.full((64, 64), 0.125, jnp.bfloat16)}}
    tx = clip_each(4.0)
    got, _ = tx.update(grads, tx.init(grads))
    assert got["head"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(got["head"]["kernel"].astype(jnp.float32), 0.0625)


def test_rates_of_a_backbone_that_lies_deeper_and_of_what_is_no_layer():
    tree = {
        "student": {
            "embedding": {
                "cls_token": jnp.zeros(4),
                "projection": {"kernel": jnp.zeros((2, 4))},
                "stem": {"stage_0": {"norm": {"bias": jnp.zeros(4)}}},
            },
            "register_tokens": jnp.zeros((2, 4)),
            "head": {"mask_token": jnp.zeros(4), "linear0": {"bias": jnp.zeros(4)}},
            "blocks": {"mssa": {"U": jnp.zeros((2, 4, 1, 3))}, "tau": jnp.zeros(2)},
            "head_norm": {"bias": jnp.zeros(4)},
        },
        "decoder": {"blocks": {"D": jnp.zeros((3, 4, 4))}},
        "head": {"kernel": jnp.zeros((4, 4)), "log": jnp.zeros(())},
    }
    rates = jax.tree.map(lambda rate: np.asarray(rate).tolist(), layer_rates(tree, 0.5, 0.2))
    assert rates == {
        "student": {
            "embedding": {
                "cls_token": [0.125],
                "projection": {"kernel": [[0.125 * 0.2]]},
                "stem": {"stage_0": {"norm": {"bias": [0.125 * 0.2]}}},
            },
            "register_tokens": [[0.125]],
            "head": {"mask_token": [0.125], "linear0": {"bias": [1.0]}},
            "blocks": {"mssa": {"U": [[[[0.25]]], [[[0.5]]]]}, "tau": [0.25, 0.5]},
            "head_norm": {"bias": [1.0]},
        },
        "decoder": {"blocks": {"D": [[[1.0]]]}},
        "head": {"kernel": [[1.0]], "log": 1.0},
    }


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(layer_decay=0.9), r"optim.layer_decay must be 1 .* embedding and blocks.*got 0.9"),
        (dict(patch_lr_scale=0.2), r"optim.patch_lr_scale must be 1 .* got 0.2. Leave it unset."),
    ],
)
def test_rates_that_no_parameter_has_are_refused_before_the_first_step(fields, told):
    tx = make_optimizer(OptimConfig(**fields), lambda step: 0.1)
    with pytest.raises(ValueError, match=told):
        tx.init({"block": {"D": jnp.zeros((2, 2))}, "embedding": {"tokens": jnp.zeros((3, 2))}})


def test_a_decay_that_moves_stays_where_it_starts_without_a_run():
    optim = OptimConfig(weight_decay=0.04, end_weight_decay=0.4)
    assert make_decay(OptimConfig(weight_decay=0.3), 10) == 0.3
    for total, at in ((0, [0.04] * 3), (4, [0.04, 0.22, 0.4])):
        decay = make_decay(optim, total)
        np.testing.assert_allclose([decay(jnp.int32(s)) for s in (0, 2, 9)], at, rtol=1e-6)


def test_what_is_unset_leaves_no_trace_in_the_state():
    """Checkpoints that were written before there was such a field are restored by structure."""
    params = nested(some_tree(VIT, np.random.default_rng(0)))
    plain = jax.tree.structure(make_optimizer(OptimConfig(), lambda step: 0.1).init(params))
    assert plain == jax.tree.structure(optax.adamw(lambda step: 0.1).init(params))
    for fields in (
        dict(clip_each=3.0),
        dict(layer_decay=0.9),
        dict(patch_lr_scale=0.2),
        dict(end_weight_decay=0.4),
    ):
        tx = make_optimizer(OptimConfig(**fields), lambda step: 0.1)
        assert jax.tree.structure(tx.init(params)) != plain, fields


def test_a_mesh_that_splits_the_parameters_takes_the_same_steps(tiny_config):
    fields = dict(clip_each=0.05, layer_decay=0.5, patch_lr_scale=0.2, end_weight_decay=0.4)
    config = tiny_config(**{f"optim__{name}": value for name, value in fields.items()})
    alone = set_up(config, "train", devices=jax.devices()[:1])
    found = []
    for run in (alone, dataclasses.replace(alone, mesh=make_mesh("data:2,fsdp:4"))):
        state, shardings = init_sharded(run.task, run.tx, run.key, run.mesh)
        step, key = jit_train_step(run, shardings), jax.device_put(run.key, replicated(run.mesh))
        with contextlib.closing(batches_after(run, 0)) as batches:
            for _ in range(3):
                state, _ = step(state, next(batches), key)
        found.append(jax.device_get(state.params))
    start = jax.device_get(alone.task.init(alone.key)[0])
    assert np.abs(found[0]["head"]["kernel"] - start["head"]["kernel"]).max() > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)
