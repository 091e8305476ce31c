"""The next token: the loss against NumPy, exact sums, runs, meshes, plans, mistakes.

That a run is resumed with the same bits is tested in tests/training/test_objectives.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import create_model
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from crate_jax.parallel import batch_sharding, make_mesh, replicated
from crate_jax.planning.plan import plan
from crate_jax.tasks import NextToken
from crate_jax.tasks.losses import token_losses
from crate_jax.training.loop import train
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.run import jit_train_step, set_up
from crate_jax.training.state import init_sharded

SIZES = dict(context_length=8, vocab_size=257, width=16, depth=2, num_heads=2)
CAUSAL = ("crate_causal_base", "crate_lm_1l", "tost_lm_base")
STEPS = 10


def config(**changes):
    """A run of four steps over Python's own documentation."""
    made = TrainConfig(
        name="text",
        task="next_token",
        batch_size=16,
        eval_batch_size=256,
        total_steps=4,
        log_every_steps=1,
        eval_every_steps=2,
        log_objective_every_steps=4,
        model=ModelConfig(name="crate_causal_base", **SIZES),
        data=DataConfig(dataset="pydoc", num_threads=2),
        optim=OptimConfig(lr=3e-3),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(params=CAUSAL)
def task(request):
    return NextToken(create_model(request.param, **SIZES))


def texts(rows, seed=0):
    """A batch, some of whose targets are none."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 257, (2, rows, 8)).astype(np.int32)
    targets[:, 5:] = np.where(rng.random((rows, 3)) < 0.5, -1, targets[:, 5:])
    told = np.where(targets >= 0, rng.integers(0, 4, targets.shape), 0)
    return {"tokens": tokens, "targets": targets, "bytes": told.sum(axis=1).astype(np.int32)}


def likelihoods(task, params, batch):
    """−ln p of each target (B, T) by NumPy in double precision; 0 where there is none."""
    logits = np.asarray(task.model.apply({"params": params}, batch["tokens"], train=False), float)
    logs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    ids = np.maximum(batch["targets"], 0)
    own = np.take_along_axis(logs, ids[:, :, None], axis=2)[:, :, 0]
    return np.where(batch["targets"] >= 0, -own, 0), logs


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_targets_of_each_text(task):
    params, batch = jax.jit(task.init)(jax.random.key(0))[0], texts(4)
    own, logs = likelihoods(task, params, batch)
    count = (batch["targets"] >= 0).sum(axis=1)
    found, (extra, scalars) = task.loss(params, (), batch, jax.random.key(0))
    assert found.dtype == jnp.float32 and (extra, scalars) == ((), {})
    assert float(found) == pytest.approx((own.sum(axis=1) / count).mean(), rel=1e-5)
    smooth = dataclasses.replace(task, label_smoothing=0.2)
    spread = 0.8 * own - 0.2 * np.where(batch["targets"] >= 0, logs.mean(axis=2), 0)
    found = smooth.loss(params, (), batch, jax.random.key(0))[0]
    assert float(found) == pytest.approx((spread.sum(axis=1) / count).mean(), rel=1e-5)
    silent = batch | {"targets": np.full((4, 8), -1, np.int32)}
    assert float(task.loss(params, (), silent, jax.random.key(0))[0]) == 0


def test_no_gradient_comes_from_where_there_is_no_target():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    targets = jnp.array([[0, -1, 4], [-1, -1, 2]])
    gradient = jax.grad(lambda z: token_losses(z, targets).sum())(logits)
    wanted = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 5)
    wanted = jnp.where(targets[..., None] >= 0, wanted, 0)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_a_token_is_told_from_those_before_it_alone(task):
    """Whatever comes later, its own target included, makes no difference."""
    params, batch = jax.jit(task.init)(jax.random.key(0))[0], texts(3)
    own, _ = likelihoods(task, params, batch)
    later = batch["tokens"].copy()
    later[:, 4:] = (later[:, 4:] + 1) % 257
    other, _ = likelihoods(task, params, batch | {"tokens": later})
    np.testing.assert_allclose(own[:, :4], other[:, :4], rtol=1e-5, atol=1e-6)
    assert np.abs(own - other)[:, 4:].max() > 1e-4


def test_sums_are_exact_over_texts_of_any_length(task):
    params, batch = jax.jit(task.init)(jax.random.key(0))[0], texts(6)
    own, _ = likelihoods(task, params, batch)
    mask = np.array([1, 1, 0, 1, 0, 1], np.float32)
    real, sums = mask > 0, jax.jit(task.sums)
    found = {k: float(v) for k, v in sums(params, (), batch | {"mask": mask}).items()}
    told = (batch["targets"] >= 0)[real].sum()
    assert found == pytest.approx(
        {
            "loss": own[real].sum(),
            "tokens": told,
            "bytes": batch["bytes"][real].sum(),
            "examples": 4,
        },
        rel=1e-5,
    )
    metrics = task.metrics(found)
    assert metrics["loss"] == pytest.approx(own[real].sum() / told)  # and no mean over texts
    assert metrics["bits_per_token"] == pytest.approx(metrics["loss"] / math.log(2))
    bits = own[real].sum() / math.log(2)
    assert metrics["bits_per_byte"] == pytest.approx(bits / batch["bytes"][real].sum())
    assert set(task.metrics(found | {"bytes": 0.0})) == {"loss", "bits_per_token"}
    whole = batch | {"mask": mask}
    thirds = [{name: values[i : i + 2] for name, values in whole.items()} for i in (0, 2, 4)]
    parts = [sums(params, (), third) for third in thirds]
    added = {name: sum(float(part[name]) for part in parts) for name in found}
    assert added == pytest.approx(found, rel=1e-5)


def test_micro_batches_take_the_same_step(task):
    params, batch = jax.jit(task.init)(jax.random.key(0))[0], texts(8)
    gradient = jax.jit(jax.grad(lambda p, b: task.loss(p, (), b, jax.random.key(0))[0]))
    parts = [gradient(params, {k: v[i::2] for k, v in batch.items()}) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        mean,
        gradient(params, batch),
    )


def test_the_objective_is_measured_by_layer(task):
    params, batch = jax.jit(task.init)(jax.random.key(0))[0], texts(4)
    scalars, images = jax.jit(task.inspect)(params, (), batch)
    assert images == {} and np.isfinite([float(value) for value in scalars.values()]).all()
    assert {"objective/rate_mean/layer00", "objective/rate_mean/layer01"} <= set(scalars)


def test_the_blank_batch_is_a_row_of_the_loader():
    run = set_up(config(), "train")
    blank, rows = run.task.blank(), run.rows["train"]
    assert {k: (v.shape[1:], v.dtype) for k, v in blank.items()} == {
        k: (s.shape, s.dtype) for k, s in rows.shapes.items()
    }
    assert run.task.step_flops() == 6 * 8 * (
        2 * (2 * 16 * 16 + 2 * 8 * 16 + 2 * 16 * 16) + 16 * 257
    )


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("text")
    return workdir, train(config(), workdir)


def test_a_run_ends_with_bits_per_byte(trained):
    _, summary = trained
    assert summary["step"] == 4 and 5 < summary["test/loss"] < 5.6  # ln 257 = 5.55
    run = set_up(config(), "eval")
    rows = run.rows["eval"]
    assert summary["test/examples"] == len(rows)
    text = len(rows.tokens) - 1 - (rows.tokens.tokens[1:] == 256).sum()
    bits = summary["test/loss"] * (len(rows.tokens) - 1) / math.log(2)
    assert summary["test/bits_per_byte"] == pytest.approx(bits / text, rel=1e-6)


def test_facts_say_what_numbers_mean(trained):
    run = set_up(config(), "train")
    facts = run.task.facts(run.rows["train"])
    assert set(facts) == {"examples", "listing", "vocabulary", "tokenizer", "end"}
    assert (facts["vocabulary"], facts["tokenizer"], facts["end"]) == (257, "bytes", 256)
    unknown = NextToken(run.task.model, TextConfig(tokenizer=None))
    assert set(unknown.facts(run.rows["train"])) == {"examples", "listing", "vocabulary"}


def test_a_run_does_not_go_on_with_other_text(tmp_path):
    (tmp_path / "train.txt").write_text("Ein Text, der lang genug ist. " * 20)
    (tmp_path / "test.txt").write_text("Ein anderer Text, der lang genug ist.")
    data = DataConfig(
        dataset="text",
        data_dir=str(tmp_path),
        train_split="train.txt",
        eval_split="test.txt",
        num_threads=1,
    )
    made = config(data=data, total_steps=1, log_objective_every_steps=0)
    train(made, tmp_path / "run")
    (tmp_path / "train.txt").write_text("Ein Text, der lang genug war. " * 20)
    with pytest.raises(ValueError, match="listing"):
        train(dataclasses.replace(made, total_steps=2), tmp_path / "run")


def losses(spec, devices, made):
    """Of ten steps on a mesh."""
    mesh = make_mesh(spec, devices)
    tx = make_optimizer(made.optim, lambda step: 3e-3)
    run = dataclasses.replace(set_up(made), mesh=mesh, tx=tx)
    state, shardings = init_sharded(run.task, run.tx, run.key, mesh, ema=False)
    step, key = jit_train_step(run, shardings), jax.device_put(run.key, replicated(mesh))
    found = []
    for i in range(STEPS):
        batch = jax.device_put(texts(16, seed=i % 2), batch_sharding(mesh))
        state, metrics = step(state, batch, key)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_any_mesh_takes_the_same_steps(name):
    made = config(model=ModelConfig(name=name, **SIZES))
    alone = losses("data:1", jax.devices()[:1], made)
    assert alone[-1] < alone[0]
    for spec in ("data:8", "data:2,fsdp:4"):
        np.testing.assert_allclose(losses(spec, None, made), alone, rtol=0, atol=1e-5, err_msg=spec)


@pytest.mark.parametrize("vocab_size", [16, 8192])
def test_a_plan_counts_the_logits(vocab_size):
    sizes = SIZES | dict(context_length=64, width=64, depth=4, vocab_size=vocab_size)
    found = plan(config(model=ModelConfig(name="crate_causal_base", **sizes)), "data:8")
    compiled = found["compiled"]
    assert compiled["memory"] == pytest.approx(compiled["memory_by_formula"], rel=0.15)
    assert compiled["collectives"] and found["flops"] > 0


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crate_bert_base", "crate_tiny_patch16_224"])
def test_a_model_that_does_not_tell_the_next_token(name):
    message = r"^model must be a causal model of text for next_token; got a \w+\. Choose"
    with pytest.raises(ValueError, match=message):
        set_up(config(model=ModelConfig(name=name)))


def test_a_tokenizer_other_than_that_of_the_training():
    facts = {"tokenizer": "0123456789abcdef"}
    with pytest.raises(ValueError) as caught:
        set_up(config(), "eval", facts=facts)
    assert str(caught.value) == (
        "text.tokenizer must be that of the training, of digest 0123456789abcdef; got bytes, of "
        "digest bytes. Give that one."
    )
    assert set_up(config(), "eval", facts={"tokenizer": "bytes"}).rows


def test_text_shorter_than_a_context():
    made = config(model=ModelConfig(name="crate_causal_base", **SIZES | {"context_length": 10**6}))
    with pytest.raises(ValueError, match=r"^pydoc/train must hold at least 1000001 tokens, a cont"):
        set_up(made, "train")
