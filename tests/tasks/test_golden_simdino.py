"""A whole step of SimDINO from the official file, against what the official code computed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import ViT
from crate_jax.config import OptimConfig
from crate_jax.interop.layouts.layout import Tree
from crate_jax.interop.layouts.vit import SIMDINO
from crate_jax.interop.networks import load_network
from crate_jax.interop.tree import flatten, tree_of
from crate_jax.models.embedding import resize_positions_as_official_maps
from crate_jax.tasks.coding_losses import Coding
from crate_jax.tasks.simdino import SimDino
from crate_jax.training.layerwise import clip_each
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.state import TrainState
from crate_jax.training.step import make_train_step

pytest.importorskip("torch")

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = json.loads((GOLDEN / "simdino_step.json").read_text())
MODEL = ViT(
    image_size=CONFIG["img_size"],
    patch_size=CONFIG["patch_size"],
    num_classes=0,
    width=CONFIG["embed_dim"],
    depth=CONFIG["depth"],
    num_heads=CONFIG["num_heads"],
    mlp_ratio=int(CONFIG["mlp_ratio"]),
)
TASK = SimDino(
    model=MODEL,
    coding=Coding(eps=CONFIG["eps"], coeff=CONFIG["coeff"]),
    head_hidden=CONFIG["hidden_dim"],
    head_features=CONFIG["bottleneck_dim"],
    momentum=CONFIG["momentum"],
    end_momentum=CONFIG["momentum"],
    local_crops=2,
    local_size=CONFIG["local_size"],
    bank_size=8,
)
OPTIM = OptimConfig(
    lr=CONFIG["lr"],
    weight_decay=CONFIG["weight_decay"],
    clip_each=CONFIG["clip_grad"],
    no_decay=("bias", "scale", "b_qkv", "b_out", "b_in"),
)


def official(params):
    """A tree of the task by the official names."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tree = Tree({path: leaf.shape for path, leaf in flat.items()}, tree_of(MODEL).patch)
    return {SIMDINO.in_file(k, tree.depth): v for k, v in SIMDINO.to_official(flat, tree).items()}


def without_key_bias(name, array):
    """Its gradient is rounding alone, of which Adam makes a whole step."""
    return np.delete(array, np.s_[24:48]) if name.endswith("attn.qkv.bias") else array


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "simdino_step.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state():
    student, teacher = (
        jax.tree.map(jnp.asarray, load_network(GOLDEN / "simdino_step.pth", MODEL, which))
        for which in ("student", "teacher")
    )
    _, extra = TASK.init(jax.random.key(0))
    extra |= {"teacher": {"params": teacher}}
    tx = make_optimizer(OPTIM, lambda step: OPTIM.lr)
    return TrainState(jnp.zeros((), jnp.int32), student, tx.init(student), extra=extra)


@pytest.fixture(scope="module")
def batch(expected):
    crops = [expected[f"crop{i}_nchw"].transpose(0, 2, 3, 1) for i in range(4)]
    views = {"global": np.stack(crops[:2], axis=1), "local": np.stack(crops[2:], axis=1)}
    return jax.tree.map(jnp.asarray, views | {"label": np.arange(4, dtype=np.int32)})


def test_both_networks_see_what_the_official_ones_see(state, batch, expected):
    network = TASK.network
    see = jax.jit(lambda variables, views: network.see(variables, views).features)
    student, teacher = {"params": state.params}, state.extra["teacher"]
    views = [see(student, batch["global"]), see(student, batch["local"])]
    found = np.concatenate(views, axis=1).swapaxes(0, 1).reshape(16, -1)  # view by view
    np.testing.assert_allclose(found, expected["student_out"], atol=2e-6)
    found = np.asarray(see(teacher, batch["global"])).swapaxes(0, 1).reshape(8, -1)
    np.testing.assert_allclose(found, expected["teacher_out"], atol=2e-6)


def test_positions_of_the_small_views(state, expected):
    pos_Nxd = state.params["embedding"]["pos_embedding"]
    found = resize_positions_as_official_maps(pos_Nxd, (4, 4), (2, 2))
    np.testing.assert_allclose(found, expected["pos_embed_local"][0], atol=1e-5)


def test_the_loss_its_parts_and_its_gradient(state, batch, expected):
    def loss(params):
        value, (_, scalars) = TASK.loss(params, state.extra, batch, jax.random.key(0))
        return value, scalars

    (value, scalars), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(scalars["compression"], expected["comp_loss"], rtol=1e-5)
    np.testing.assert_allclose(scalars["expansion"], expected["expa_loss"], rtol=1e-5)
    found = official(grads)
    theirs = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    assert found.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6, rtol=1e-4, err_msg=name)

    norms = dict(
        zip(
            expected["clipped_parameters"].tolist(),
            expected["gradient_norms_before_clipping"],
            strict=True,
        )
    )
    tx = clip_each(CONFIG["clip_grad"])
    clipped = official(tx.update(grads, tx.init(grads))[0])
    assert norms.keys() == clipped.keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(found[name]), norm, rtol=1e-5, err_msg=name)
        bounded = norm * min(1, 0.3 / (norm + 1e-6))
        np.testing.assert_allclose(np.linalg.norm(clipped[name]), bounded, rtol=1e-5, err_msg=name)
    assert sum(norm > 0.3 for norm in norms.values()) == 3


def test_the_step_ends_where_the_official_one_ends(state, batch, expected):
    tx = make_optimizer(OPTIM, lambda step: OPTIM.lr)
    after, metrics = jax.jit(make_train_step(TASK, tx))(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    trees = {"student": after.params, "teacher": after.extra["teacher"]["params"]}
    for which, params in trees.items():
        found = official(params)
        prefix = f"{which}_after/"
        theirs = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
        assert found.keys() == theirs.keys()
        for name, array in theirs.items():
            arrays = (found[name], array, expected[f"grad/{name}"])
            ours, array, grad = (without_key_bias(name, x) for x in arrays)
            # A last digit besides, for scales near one. A gradient that is as small as Adam's ε
            # lets its own rounding through.
            allowed = np.where(np.abs(grad) < 1e-7, 1e-2, 1e-4) * OPTIM.lr + 1.2e-7 * np.abs(array)
            wrong = np.abs(ours - array) > allowed
            assert not wrong.any(), (which, name, (ours - array)[wrong] / OPTIM.lr)
