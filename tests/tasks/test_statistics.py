"""Running statistics travel with the state: a model with BatchNorm trains and resumes."""

import argparse
import functools
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import crate_jax.training.loop as loop
from crate_jax import ToST
from crate_jax.checkpoint.reading import restore_trained
from crate_jax.cli import runs
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, OptimConfig, TrainConfig
from crate_jax.parallel import batch_sharding, make_mesh, on_mesh, replicated
from crate_jax.tasks import Classify, classify
from crate_jax.training.run import evaluate_split, set_up
from crate_jax.training.state import init_sharded, init_state
from crate_jax.training.step import make_train_step

MOMENTUM = 0.9


class Normed(nn.Module):
    """Pixels, normalised over the batch, to logits."""

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (8, 8, 1)

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="norm")(x)
        return nn.Dense(self.num_classes)(x)


def make_batch(rows=16):
    rng = np.random.default_rng(0)
    images = rng.normal(2.0, 3.0, (rows, 8, 8, 1)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, 10, rows).astype(np.int32)}


def one_step(spec, accumulate_steps=1, model=None):
    """State and metrics after a step on a mesh."""
    devices = jax.devices()[:1] if spec == "data:1" else jax.devices()
    mesh, task, tx = make_mesh(spec, devices), Classify(model or Normed()), optax.sgd(0.1)
    state, shardings = init_sharded(task, tx, jax.random.key(1), mesh)
    step = jax.jit(
        on_mesh(mesh, make_train_step(task, tx, accumulate_steps=accumulate_steps)),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    placed = jax.device_put(make_batch(), batch_sharding(mesh))
    return step(state, placed, jax.random.key(0))


@pytest.mark.parametrize("spec", ["data:1", "data:8"])
def test_statistics_are_those_of_the_whole_batch_on_any_devices(spec):
    state, metrics = one_step(spec)
    pixels = make_batch()["image"].reshape(16, -1)
    statistics = state.extra["batch_stats"]["norm"]
    np.testing.assert_allclose(
        statistics["mean"], (1 - MOMENTUM) * pixels.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        statistics["var"], MOMENTUM + (1 - MOMENTUM) * pixels.var(axis=0), rtol=1e-4
    )
    _, alone = one_step("data:1")
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)


@pytest.mark.parametrize("spec", ["data:1", "data:8"])
def test_micro_batches_average_their_statistics(spec):
    state, _ = one_step(spec, accumulate_steps=2)
    pixels = make_batch()["image"].reshape(16, -1)
    # A mean of means is the mean of all; a mean of variances is not the variance of all.
    statistics = state.extra["batch_stats"]["norm"]
    np.testing.assert_allclose(
        statistics["mean"], (1 - MOMENTUM) * pixels.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    if spec == "data:1":
        within = (pixels[::2].var(axis=0) + pixels[1::2].var(axis=0)) / 2
        np.testing.assert_allclose(statistics["var"], MOMENTUM + (1 - MOMENTUM) * within, rtol=1e-4)


def test_the_devices_of_a_pmap_average_their_statistics():
    task, tx = Classify(Normed()), optax.sgd(0.1)
    state = init_state(task, tx, jax.random.key(1))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), make_batch())
    step = jax.pmap(make_train_step(task, tx, axis_name="batch"), axis_name="batch")
    after, _ = step(copies, shards, jnp.stack([jax.random.key(0)] * 8))
    mean = np.asarray(after.extra["batch_stats"]["norm"]["mean"])
    pixels = make_batch()["image"].reshape(16, -1)
    assert np.ptp(mean, axis=0).max() == 0
    np.testing.assert_allclose(mean[0], (1 - MOMENTUM) * pixels.mean(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_devices_of_a_shard_map_average_their_statistics(micro_batches):
    task, tx, whole = Classify(Normed()), optax.sgd(0.1), PartitionSpec()
    state = init_state(task, tx, jax.random.key(1))
    step = make_train_step(task, tx, axis_name="data", accumulate_steps=micro_batches)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = dict(in_specs=(whole, PartitionSpec("data"), whole), out_specs=whole)
    step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    after, _ = step(state, make_batch(), jax.random.key(0))
    expected = (1 - MOMENTUM) * make_batch()["image"].reshape(16, -1).mean(axis=0)
    mean = after.extra["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)


TOST = ToST(
    image_size=8, patch_size=4, num_classes=10, width=16, depth=2, num_heads=2, in_channels=1
)


def step_of_tost(spec, accumulate_steps=1):
    """The state after a step of a ToST from key 1."""
    return one_step(spec, accumulate_steps, TOST)[0]


@pytest.fixture(scope="module")
def alone():
    return step_of_tost("data:1")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data:8", "data:2,fsdp:4"])
def test_a_stem_has_the_statistics_of_the_whole_batch_on_any_mesh(alone, spec):
    state = step_of_tost(spec)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    assert jax.tree.leaves(alone.extra)  # or there would be nothing to compare
    jax.tree.map(near, jax.device_get(state.extra), jax.device_get(alone.extra))
    jax.tree.map(near, jax.device_get(state.params), jax.device_get(alone.params))


def test_a_stem_averages_the_statistics_of_micro_batches(alone):
    """A mean of means is that of all, in the first stage; what follows sees other batches."""
    state = step_of_tost("data:8", accumulate_steps=2)
    first, whole = (
        x.extra["batch_stats"]["embedding"]["stem"]["stage_0"]["norm"] for x in (state, alone)
    )
    np.testing.assert_allclose(first["mean"], whole["mean"], rtol=1e-4, atol=1e-6)
    assert np.abs(np.asarray(first["var"]) - np.asarray(whole["var"])).max() > 1e-5


def test_evaluation_uses_the_running_statistics():
    task, batch = Classify(Normed()), make_batch()
    params, extra = task.init(jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 1, extra)
    mask = {"mask": np.ones(16, np.float32)}
    scaled = batch | {"image": (batch["image"] - 1) / np.sqrt(2 + 1e-5)}
    by_hand = Classify(Normed())
    neutral = {"batch_stats": {"norm": {"mean": jnp.zeros(64), "var": jnp.full(64, 1 - 1e-5)}}}
    found = task.sums(params, moved, batch | mask)
    expected = by_hand.sums(params, neutral, scaled | mask)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


# --- a run ----------------------------------------------------------------------------------------


def config(**changes):
    values = dict(
        name="normed",
        batch_size=48,
        eval_batch_size=104,
        total_steps=6,
        log_every_steps=1,
        eval_every_steps=3,
        log_objective_every_steps=3,
        data=DataConfig(num_threads=1),
        optim=OptimConfig(lr=3e-2, ema_decay=0.5),
    )
    return TrainConfig(**values | changes)


@pytest.fixture
def normed(monkeypatch):
    monkeypatch.setattr(classify, "build_model", lambda config: Normed())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was told to stop at the second step and started again."""
    workdir = tmp_path_factory.mktemp("normed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "build_model", lambda config: Normed())
        patch.setattr(loop.StopSignal, "at", lambda self, step: "SIGTERM" if step == 2 else None)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM at step 2 of 6"):
            loop.train(config(), workdir)
        patch.setattr(loop.StopSignal, "at", lambda self, step: None)
        return workdir, loop.train(config(), workdir)


def test_a_run_resumes_with_its_statistics_and_measures_with_them(normed, trained, tmp_path):
    workdir, summary = trained
    whole = loop.train(config(), tmp_path)
    assert {k: v for k, v in whole.items() if k not in ("seconds", "workdir")} == {
        k: v for k, v in summary.items() if k not in ("seconds", "workdir")
    }
    run = set_up(config(), "eval")
    params, extra, _ = restore_trained(workdir, *jax.eval_shape(run.task.init, run.key))
    assert np.abs(extra["batch_stats"]["norm"]["mean"]).max() > 0.1
    found = evaluate_split(run, params, extra)
    assert found["top1"] == summary["test/top1"]
    fresh = evaluate_split(run, params, run.task.init(run.key)[1])
    assert abs(fresh["loss"] - found["loss"]) > 1e-3


def test_a_model_without_the_measured_taps_is_not_measured(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and not any("objective" in name for line in lines for name in line)


def test_a_report_of_it_is_its_curves(normed, trained, tmp_path, capsys):
    """Its model has no layers of the family; the page says so in their place."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    arguments = ["--workdir", str(trained[0]), "--output", str(tmp_path), "--examples", "32"]
    assert main(["report", *arguments]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["figures"] and not {"rate", "subspace_rate"} & said.keys()
    assert any("stack of blocks" in reason for reason in said["left_out"])
    assert "stack of blocks" in (tmp_path / "index.html").read_text()


def test_its_weights_alone_are_refused(normed, monkeypatch, tmp_path):
    class Loaded:
        params, extra, report = {}, {}, []

    monkeypatch.setattr("crate_jax.interop.load_fitted", lambda *args, **options: Loaded)
    run = set_up(config(), "eval")
    args = argparse.Namespace(weights="w.npz", fit=[], method=None, model="normed")
    message = r"--weights must hold all that Normed evaluates with; its batch_stats are in no"
    with pytest.raises(ValueError, match=message):
        runs._load_weights(args, run)
