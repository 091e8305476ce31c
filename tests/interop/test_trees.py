"""Trees of our parameters that a user's own program wrote: Orbax and Flax's msgpack."""

import gc
import shutil
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from weights import MODEL, assert_equal_trees, random_params

from crate_jax import load_weights, save_weights
from crate_jax.interop import load_fitted

PARAMS = random_params(MODEL)


class AveragedState(TrainState):
    ema_params: Any = None


def on_device(params=PARAMS):
    return jax.tree.map(jnp.asarray, params)


def train_state(kind=TrainState, **fields):
    tx = optax.adamw(1e-3)
    return kind.create(apply_fn=None, **{"params": on_device(), "tx": tx} | fields)


def averaged():
    zeros = jax.tree.map(jnp.zeros_like, on_device())
    return train_state(AveragedState, params=zeros, ema_params=on_device())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (on_device, []),
        (lambda: {"params": on_device(), "batch_stats": {"mean": jnp.ones(2)}}, []),
        (lambda: {"model": {"params": on_device()}, "step": 3}, []),
        (train_state, []),
        (averaged, ["took ema_params, averaged weights, and left aside params"]),
    ],
)
def test_msgpack(tmp_path, content, said):
    (tmp_path / "w").write_bytes(flax.serialization.to_bytes(content()))
    loaded = load_fitted(tmp_path / "w", MODEL)
    assert_equal_trees(loaded.params, PARAMS)
    assert loaded.report == said


def test_msgpack_that_is_damaged_or_of_something_else(tmp_path):
    whole = flax.serialization.to_bytes(on_device())
    (tmp_path / "w").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"must be a whole msgpack file of Flax; .* incomplete"):
        load_weights(tmp_path / "w", MODEL)
    (tmp_path / "w").write_bytes(flax.serialization.to_bytes({"a": np.ones(2)}))
    with pytest.raises(ValueError, match="it holds no weights of a Crate"):
        load_weights(tmp_path / "w", MODEL)


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Folders by what wrote them."""
    folder = tmp_path_factory.mktemp("orbax")
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "bare", on_device())
        writer.save(folder / "other", {"a": jnp.ones(2)})
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder / "variables", {"params": on_device(), "note": "mine"})
    with ocp.CheckpointManager(folder / "manager") as manager:
        for step, state in ((2, averaged()), (12, train_state())):
            manager.save(step, args=ocp.args.StandardSave(state))
    options = ocp.CheckpointManagerOptions(step_prefix="ck")
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(on_device()),
        opt=ocp.args.StandardSave([jnp.ones(2)]),
        extra=ocp.args.JsonSave({"a": 1}),
    )
    # Under the name that a run of ours has for its checkpoints.
    with ocp.CheckpointManager(folder / "mine" / "checkpoints", options=options) as manager:
        manager.save(3, args=items)
    return folder


@pytest.mark.parametrize(
    "path",
    [
        *("bare", "variables", "manager", "manager/12", "manager/12/default"),
        *("mine", "mine/checkpoints", "mine/checkpoints/ck_3", "mine/checkpoints/ck_3/params"),
    ],
)
def test_orbax(orbax, path):
    params = load_weights(orbax / path, MODEL)
    assert_equal_trees(params, PARAMS)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_orbax_takes_averages_as_a_run_does(orbax):
    loaded = load_fitted(orbax / "manager" / "2", MODEL)
    assert_equal_trees(loaded.params, PARAMS)
    assert loaded.report == ["took ema_params, averaged weights, and left aside params"]


# Orbax's readers of a damaged tree complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_orbax_that_is_damaged_or_of_something_else(orbax, tmp_path):
    with pytest.raises(ValueError, match=r"unknown: a\. "):
        load_weights(orbax / "other", MODEL)
    shutil.copytree(orbax / "bare", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "d", ignore_errors=True)
    shutil.rmtree(tmp_path / "cut" / "ocdbt.process_0", ignore_errors=True)
    with pytest.raises(ValueError, match="cut must be a whole Orbax tree; reading it ended in"):
        load_weights(tmp_path / "cut", MODEL)
    (tmp_path / "cut" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="cut must be a whole Orbax tree; reading it ended in"):
        load_weights(tmp_path / "cut", MODEL)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.ocdbt").touch()
    with pytest.raises(ValueError, match="empty must be a whole Orbax tree; reading it ended in"):
        load_weights(tmp_path / "empty", MODEL)
    gc.collect()


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned, None])
def test_trees_in_boxes_are_saved(tmp_path, box):
    boxed = flax.core.freeze(on_device())
    if box is not None:
        boxed = jax.tree.map(lambda x: box(x, names=(None,) * x.ndim), boxed)
    save_weights(tmp_path / "w.npz", boxed, MODEL)
    assert_equal_trees(load_weights(tmp_path / "w.npz", MODEL), PARAMS)


def test_what_is_no_tree_of_arrays_is_not_saved(tmp_path):
    abstract = jax.eval_shape(on_device)
    with pytest.raises(ValueError, match="must be an array; got ShapeDtypeStruct"):
        save_weights(tmp_path / "w.npz", abstract, MODEL)
    with pytest.raises(ValueError, match=r"a mapping of arrays by name; got list\. Give variables"):
        save_weights(tmp_path / "w.npz", [1], MODEL)
    assert not list(tmp_path.iterdir())
