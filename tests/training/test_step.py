"""The pure step: its loss by value, its options, and one result on every layout of devices."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from toy import Regress

from crate_jax import Crate, load_weights
from crate_jax.interop import to_state_dict
from crate_jax.parallel import batch_sharding, make_mesh, on_mesh, replicated
from crate_jax.tasks import Classify
from crate_jax.tasks.losses import cross_entropy
from crate_jax.training.state import TrainState, init_sharded, init_state, replace_params
from crate_jax.training.step import make_train_step, stream

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 4


MODEL = Crate(image_size=16, patch_size=4, num_classes=7, width=24, depth=2, num_heads=3)


def start(model, tx):
    return jax.jit(lambda key: init_state(Classify(model), tx, key))(jax.random.key(1))


def make_batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, 7, 16).astype(np.int32)}


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@functools.cache
def run(spec, *, accumulate_steps=1, ema_decay=0.0, mix=False, processes=1):
    """Losses, head kernels (one before the first step) and last state of sharded, donated steps."""
    devices = jax.devices()[:1] if spec == "data:1" else jax.devices()
    mesh, tx = make_mesh(spec, devices), optax.adamw(1e-3)
    mixing = dict(mixup_alpha=0.8, cutmix_alpha=1.0) if mix else {}
    task = Classify(MODEL, label_smoothing=0.1, **mixing)
    state, shardings = init_sharded(task, tx, jax.random.key(1), mesh, ema=ema_decay > 0)
    step = make_train_step(task, tx, accumulate_steps=accumulate_steps, ema_decay=ema_decay)
    step = jax.jit(
        on_mesh(mesh, step),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    # Of several processes each reads every so manieth row, and their rows follow one another.
    rows = np.arange(16).reshape(-1, processes).T.ravel()
    batch = {name: values[rows] for name, values in make_batch().items()}
    placed = jax.device_put(batch, batch_sharding(mesh))
    losses, kernels = [], [np.asarray(state.params["head"]["kernel"])]
    for _ in range(STEPS):
        state, metrics = step(state, placed, jax.random.key(3))
        losses.append(float(metrics["loss"]))
        kernels.append(np.asarray(state.params["head"]["kernel"]))
    return np.array(losses), kernels, state


def test_cross_entropy_is_that_of_smoothed_targets():
    logits = np.random.default_rng(0).normal(size=(5, 4)) * 3
    labels = np.array([0, 3, 1, 1, 2])
    for smoothing in (0.0, 0.1, 0.7):
        targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ours = cross_entropy(
            jnp.asarray(logits, jnp.float32),
            jnp.asarray(labels),
            label_smoothing=smoothing,
        )
        np.testing.assert_allclose(ours, -(targets * log_p).sum(1), rtol=2e-6)


def test_cross_entropy_of_bfloat16_logits_is_float32():
    loss = cross_entropy(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros(2, jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_streams_differ_by_name_and_step():
    key = jax.random.key(0)
    keys = [stream(key, name, step) for name in ("dropout", "mixup") for step in (0, 1)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 4


@pytest.mark.parametrize("spec", ["data:8", "data:2,fsdp:4", "data:1,fsdp:8"])
def test_eight_devices_train_as_one(spec):
    alone, kernels, _ = run("data:1")
    together, sharded, _ = run(spec)
    assert alone[-1] < alone[0]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(sharded[-1], kernels[-1], atol=1e-5)


def test_pmap_trains_as_one_device(batch):
    model, (alone, _, _) = MODEL, run("data:1")
    tx = optax.adamw(1e-3)
    state = start(model, tx)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    keys = jnp.stack([jax.random.key(3)] * 8)
    task = Classify(model, label_smoothing=0.1)
    step = jax.pmap(make_train_step(task, tx, axis_name="batch"), axis_name="batch")
    losses = []
    for _ in range(STEPS):
        copies, metrics = step(copies, shards, keys)
        losses.append(float(metrics["loss"][0]))
        assert np.ptp(np.asarray(metrics["loss"])) == 0
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


class Meaned(Regress):
    """Its loss is the mean over the devices already."""

    def loss(self, params, extra, batch, key):
        loss, others = super().loss(params, extra, batch, key)
        return jax.lax.pmean(loss, "data"), others


def regression(task, tx, wrap=lambda step: step, **options):
    """State and metrics after a step on sixteen rows; the state has an average and a teacher."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, width)).astype(np.float32) for width in (4, 2))
    state = jax.jit(lambda key: init_state(task, tx, key, ema=True))(jax.random.key(1))
    step = jax.jit(wrap(make_train_step(task, tx, ema_decay=0.5, **options)))
    state, metrics = step(state, {"x": x, "y": y}, jax.random.key(3))
    return state, {name: value for name, value in metrics.items() if name != "noise"}


def on_devices(axes, **options):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    specs = dict(in_specs=(whole, rows, whole), out_specs=whole)
    return lambda step: jax.shard_map(step, mesh=mesh, **specs, **options)


@pytest.mark.parametrize(
    ("tx", "axes", "micro_batches", "check_vma", "task"),
    [
        (optax.sgd(0.1), "data", 1, True, Regress),
        (optax.sgd(0.1), "data", 2, False, Regress),
        (optax.adam(0.1), ("data", "model"), 2, True, Regress),
        (optax.sgd(0.1), "data", 2, True, Meaned),
        (optax.sgd(0.1), "data", 1, False, Meaned),
    ],
)
def test_shard_map_takes_the_step_of_one_device(tx, axes, micro_batches, check_vma, task):
    wrap, options = on_devices(axes, check_vma=check_vma), dict(accumulate_steps=micro_batches)
    got = regression(task(nn.Dense(2)), tx, wrap, axis_name=axes, **options)
    expected = regression(Regress(nn.Dense(2)), tx)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


def test_dropout_and_mixing_keep_their_types_in_shard_map(batch):
    """What comes out is the same on all devices, as `jax.shard_map` checks."""
    task = Classify(MODEL.clone(dropout=0.1), mixup_alpha=0.8, cutmix_alpha=1.0)
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(1)))
    step = make_train_step(task, tx, axis_name="data", accumulate_steps=2)
    after, _ = jax.eval_shape(on_devices("data")(step), state, batch, jax.random.key(0))
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)


def test_an_axis_that_is_not_averaged_over_is_refused():
    tx, task = optax.sgd(0.1), Regress(nn.Dense(2))
    message = (
        r"axis_name must name the axes of jax\.shard_map along which the loss varies; got {}\."
    )
    with pytest.raises(ValueError, match=message.format("none") + " Add data, model."):
        regression(task, tx, on_devices(("data", "model")))
    with pytest.raises(ValueError, match=message.format("data") + " Add model."):
        regression(task, tx, on_devices(("data", "model")), axis_name="data")


def test_models_of_one_device_each_need_no_axis():
    """Parameters that differ from device to device are trained apart."""
    tx, task = optax.sgd(0.1), Regress(nn.Dense(2))

    def wrap(step):
        def each(state, batch, key):
            own = jax.lax.pcast(state, "data", to="varying")
            return jax.tree.map(lambda x: x[None], step(own, batch, key))

        each_has_its_own = PartitionSpec("data")
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = dict(in_specs=(PartitionSpec(),) * 3, out_specs=each_has_its_own)
        return jax.shard_map(each, mesh=mesh, **specs)

    (got, _), (expected, _) = regression(task, tx, wrap), regression(task, tx)
    for g, e in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(g, np.stack([e] * 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("micro_batches", "spec"), [(4, "data:1"), (2, "data:8"), (2, "data:2,fsdp:4")]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batches, spec):
    whole, kernels, _ = run("data:1")
    parts, accumulated, _ = run(spec, accumulate_steps=micro_batches)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(accumulated[-1], kernels[-1], atol=1e-5)


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 2), (4, 2)])
def test_mixed_images_do_not_depend_on_micro_batches_or_processes(micro_batches, processes):
    whole, kernels, _ = run("data:1", mix=True)
    assert abs(whole[0] - run("data:1")[0][0]) > 1e-3
    losses, parts, _ = run("data:1", mix=True, accumulate_steps=micro_batches, processes=processes)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    np.testing.assert_allclose(parts[-1], kernels[-1], atol=1e-5)


def test_ema_averages_the_parameters():
    decay = 0.75
    _, kernels, _ = run("data:1")
    expected = kernels[0]
    for kernel in kernels[1:]:
        expected = decay * expected + (1 - decay) * kernel
    _, _, state = run("data:1", ema_decay=decay)
    np.testing.assert_allclose(state.ema_params["head"]["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_dropout_draws_anew_each_step_and_repeats_from_the_same_key(batch):
    model = Crate(
        image_size=16, patch_size=4, num_classes=7, width=24, depth=2, num_heads=3, dropout=0.5
    )
    tx = optax.sgd(0.0)  # the parameters stay: only dropout can change the loss
    step = jax.jit(make_train_step(Classify(model), tx))

    first = start(model, tx)

    def losses(seed):
        state, out = first, []
        for _ in range(2):
            state, metrics = step(state, batch, jax.random.key(seed))
            out.append(float(metrics["loss"]))
        return out

    assert losses(0) == losses(0)
    assert losses(0)[0] != losses(0)[1]
    assert losses(0)[0] != losses(1)[0]


def test_metrics_by_value(batch):
    model = MODEL
    tx = optax.sgd(0.1)
    state = start(model, tx)
    step = jax.jit(make_train_step(Classify(model), tx, schedule=lambda count: 0.1 * (count + 1)))

    def loss_fn(params):
        logits = model.apply({"params": params}, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(state.params)
    after, metrics = step(state, batch, jax.random.key(0))
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))  # noqa: E731
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["top1"], np.mean(np.argmax(logits, 1) == batch["label"]))
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], norm(after.params), rtol=1e-5)
    np.testing.assert_allclose(metrics["lr"], 0.1, rtol=1e-6)
    assert int(after.step) == 1


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_stored_pixels_are_normalised_inside_the_step(batch, micro_batches):
    tx = optax.sgd(0.1)
    state, key = start(MODEL, tx), jax.random.key(0)
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 16, 3), np.uint8)
    scaled = ((pixels / 255 - 0.3) / 0.4).astype(np.float32)
    task = Classify(MODEL, mean=(0.3,), std=(0.4,))
    step = jax.jit(make_train_step(task, tx, accumulate_steps=micro_batches))
    _, ours = step(state, batch | {"image": pixels}, key)
    _, expected = step(state, batch | {"image": scaled}, key)
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-5)


def test_pixels_stay_bytes_until_their_micro_batch_is_due():
    """Normalised at once, the images of all micro-batches would be held as floats."""
    task, key = Classify(MODEL), jax.random.key(0)
    batch = task.blank()
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (1, 16, 16, 3))
    assert task.on_device(batch, key) is batch
    mixed = Classify(MODEL, mixup_alpha=0.8).on_device(batch, key)
    assert mixed["image"].dtype == jnp.float32 and mixed["label"].shape == (1, 7)


def test_replaced_parameters_reach_the_average():
    mesh = make_mesh("data:8")
    state, _ = init_sharded(Classify(MODEL), optax.adamw(1e-3), jax.random.key(1), mesh, ema=True)
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), state.params)
    replaced = replace_params(state, ones)
    for tree in (replaced.params, replaced.ema_params):
        assert all(bool((x == 1).all()) for x in jax.tree.leaves(tree))
    assert replaced.params["head"]["bias"].sharding == state.params["head"]["bias"].sharding


def test_replaced_parameters_reach_what_follows_them():
    """A branch that the file has not is kept, and the extra is made of all parameters."""
    mesh = make_mesh("data:2,fsdp:4")
    state, _ = init_sharded(Classify(MODEL), optax.adamw(1e-3), jax.random.key(1), mesh)
    teacher = jax.tree.map(jnp.zeros_like, state.params)
    state = dataclasses.replace(state, extra={"teacher": teacher, "count": jnp.zeros(())})
    given = jax.device_get({k: v for k, v in state.params.items() if k != "head"})
    given = jax.tree.map(np.ones_like, given)
    replaced = replace_params(state, given, lambda params, extra, _: extra | {"teacher": params})
    jax.tree.map(np.testing.assert_array_equal, replaced.extra["teacher"], replaced.params)
    head = replaced.extra["teacher"].pop("head")
    jax.tree.map(np.testing.assert_array_equal, head, state.params["head"])
    assert all(bool((x == 1).all()) for x in jax.tree.leaves(replaced.extra["teacher"]))
    assert replaced.extra["count"].sharding == state.extra["count"].sharding
    shardings = (x.params["blocks"]["mssa"]["U"].sharding for x in (state, replaced))
    assert len(set(shardings)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("case", ["crate_cls", "crate_mean_rect", "crate_single_head"])
def test_ten_steps_follow_the_official_trajectory(case, optimizer):
    case_config = json.loads((GOLDEN / f"{case}.json").read_text())
    golden = np.load(GOLDEN / f"{case}.npz")
    model = Crate(
        image_size=case_config["image_size"],
        patch_size=case_config["patch_size"],
        num_classes=case_config["num_classes"],
        width=case_config["dim"],
        depth=case_config["depth"],
        num_heads=case_config["heads"],
        head_dim=case_config["dim_head"],
        pool=case_config["pool"],
        in_channels=case_config["channels"],
        eta=case_config["ista"],
        lmbda=0.1,  # a constant of the official code
    )
    settings = case_config[optimizer]
    b1, b2 = settings["betas"]
    make = {"adamw": optax.adamw, "lion": optax.lion}[optimizer]
    tx = make(settings["lr"], b1=b1, b2=b2, weight_decay=settings["weight_decay"])
    pytest.importorskip("torch")  # the weights are a PyTorch file
    params = jax.tree.map(jnp.asarray, load_weights(GOLDEN / f"{case}.pth.tar", model))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    task = Classify(model, label_smoothing=case_config["label_smoothing"])
    step = jax.jit(make_train_step(task, tx))
    batch = {
        "image": golden["images_nchw"].transpose(0, 2, 3, 1),
        "label": golden["labels"].astype(np.int32),
    }
    losses = []
    for _ in range(case_config["steps"]):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, golden[f"traj_{optimizer}"], rtol=1e-4)
    ours = to_state_dict(state.params, model)
    close = [
        np.abs(ours[name] - golden[f"after_{optimizer}/{name}"]).ravel() < 1e-5 for name in ours
    ]
    # The first steps follow the sign of the gradient: where that is zero up to rounding it is a
    # coin toss, so single weights may part while the losses agree.
    assert np.concatenate(close).mean() >= 0.999
