"""Features of a split: every row once and in order on any mesh, and the file that keeps them."""

from collections import namedtuple
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import DataConfig, ModelConfig, TrainConfig
from crate_jax.evaluation.features import (
    Features,
    features_of,
    fingerprint,
    load_features,
    num_classes,
    of_pixels,
    of_task,
    renumbered,
    save_features,
    standardize,
    weights_fingerprint,
)
from crate_jax.evaluation.rows import by_row, order_of_split
from crate_jax.parallel import batch_sharding, make_mesh
from crate_jax.tasks.classify import Classify
from crate_jax.training.run import evaluation_batches, set_up

SIZES = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)


def config(mesh="data:-1"):
    made = TrainConfig(
        eval_batch_size=16,
        model=ModelConfig(name="crate_tiny_patch16_224", **SIZES),
        data=DataConfig(eval_split="test[:42]", eval_transforms="resize(16)", num_threads=1),
    )
    made.parallel.mesh = mesh
    return made


def features(run, function, params, extra=()):
    with closing(evaluation_batches(run)) as batches:
        return features_of(function, params, extra, batches, run.mesh)


@pytest.mark.parametrize(("mesh", "devices"), [("data:1", 1), ("data:8", 8), ("data:2,fsdp:4", 8)])
def test_every_row_once_and_in_order(mesh, devices):
    run = set_up(config(mesh), "eval", devices=jax.devices()[:devices])
    params, extra = run.task.init(run.key)
    found = features(run, of_task(run.task), params, extra)
    rows = [run.rows["eval"].row(i, np.random.default_rng(0)) for i in range(42)]
    images = np.stack([row["image"] for row in rows])
    expected = run.task.features(params, extra, {"image": jnp.asarray(images)})
    np.testing.assert_array_equal(found.labels, [row["label"] for row in rows])
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    pixels = features(run, of_pixels, ())
    np.testing.assert_allclose(pixels.values, images.reshape(42, -1) / 255, atol=1e-7)
    np.testing.assert_array_equal(pixels.labels, found.labels)


def test_floats_are_pixels_as_they_are():
    images = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 2, 2, 1)
    found = of_pixels((), (), {"image": jnp.asarray(images), "label": jnp.zeros(2, jnp.int32)})
    np.testing.assert_array_equal(found["values"], images.reshape(2, 4))


def batches_of(values, mask, mesh):
    sharding = batch_sharding(mesh)
    rows = {"x": values, "mask": mask}
    yield {name: jax.device_put(array, sharding) for name, array in rows.items()}


def test_rows_that_do_not_count_leave_a_gap_in_the_places():
    mesh = make_mesh()
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32)
    values = np.arange(8, dtype=np.float32)

    def double(params, extra, batch):
        return {"y": batch["x"] * params}

    found = by_row(double, np.float32(2), (), batches_of(values, mask, mesh), mesh)
    assert found.places.tolist() == [0, 2, 3, 6]
    assert found.arrays["y"].tolist() == [0, 4, 6, 12]
    with pytest.raises(ValueError, match="must hold at least one example; got none"):
        by_row(double, np.float32(2), (), batches_of(values, 0 * mask, mesh), mesh)
    with pytest.raises(ValueError, match="must hold at least one example; got none"):
        by_row(double, np.float32(2), (), [], mesh)


def test_rows_of_several_processes_are_put_in_order():
    Device = namedtuple("Device", "process_index id")
    # Four devices of two processes, not in their order; each has two of the eight rows.
    shares = [(1, slice(0, 2)), (0, slice(2, 4)), (0, slice(4, 6)), (1, slice(6, 8))]

    def devices_indices_map(shape):
        assert shape == (8,)
        return {Device(process, i): (share,) for i, (process, share) in enumerate(shares)}

    order = order_of_split(SimpleNamespace(devices_indices_map=devices_indices_map), 8)
    # The loader gives process p the rows p, p + 2, … of the split.
    batch = np.array([1, 3, 0, 2, 4, 6, 5, 7])
    assert batch[order].tolist() == list(range(8))


def test_features_that_are_no_numbers_are_refused():
    run = set_up(config(), "eval")

    def broken(params, extra, batch):
        found = of_pixels(params, extra, batch)
        return found | {"values": jnp.log(found["values"] - 0.5)}

    with pytest.raises(ValueError, match="those of 42 of 42 images are not, the first is number 0"):
        features(run, broken, ())


def test_standardized_by_the_training_rows():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 5, (50, 4)), rng.normal(3, 5, (7, 4))
    train[:, 1] = 2.0
    found, other = standardize(train.astype(np.float32), test.astype(np.float32))
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(axis=0), [1, 0, 1, 1], atol=1e-4)
    mean, std = train.mean(axis=0), train.std(axis=0)
    np.testing.assert_allclose(other, (test - mean) / (std + 1e-5), rtol=1e-3)


def test_labels_are_numbered_without_a_gap():
    values = np.zeros((3, 1), np.float32)
    train, test = renumbered(
        Features(values, np.array([7, 2, 7], np.int32)),
        Features(values, np.array([2, 9, 2**31 - 2], np.int32)),
    )
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 1], [0, 2, 3])
    assert num_classes(train, test) == 4


# --- the file that keeps them ---------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    rng = np.random.default_rng(0)
    splits = {
        name: Features(rng.normal(size=(n, 3)).astype(np.float32), np.arange(n, dtype=np.int32))
        for name, n in (("train", 5), ("test", 2))
    }
    path = tmp_path / "features.npz"
    save_features(path, splits, weights="w", data="d")
    return path, splits


def test_the_file_gives_back_what_it_got(kept):
    path, splits = kept
    found = load_features(path, weights="w", data="d")
    assert list(found) == ["train", "test"]
    for name, split in splits.items():
        np.testing.assert_array_equal(found[name].values, split.values)
        np.testing.assert_array_equal(found[name].labels, split.labels)
    assert num_classes(*found.values()) == 5


def test_features_of_another_model_or_data_are_refused(kept):
    path, _ = kept
    with pytest.raises(ValueError, match="holds features of another model"):
        load_features(path, weights="other", data="d")
    with pytest.raises(ValueError, match="holds features of other data"):
        load_features(path, weights="w", data="other")


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "features.npz"
    if content is None:
        np.savez(path, weights=np.array("w"), train=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a file that this command wrote"):
        load_features(path, weights="w", data="d")


def test_a_fingerprint_tells_weights_and_preparation_apart():
    tiny = TrainConfig(model=ModelConfig(name="crate_tiny_patch16_224", **SIZES))
    task = Classify.from_config(tiny, 3)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    own = weights_fingerprint(task, params, extra)
    assert own == weights_fingerprint(task, jax.device_get(params), extra)
    others = {
        "weights": weights_fingerprint(task, jax.tree.map(lambda x: x + 1, params), extra),
        "mean": weights_fingerprint(Classify(task.model, mean=(0.4,)), params, extra),
        "model": weights_fingerprint(Classify(task.model.clone(eta=0.3)), params, extra),
    }
    assert own not in others.values()
    assert len(set(others.values())) == 3
    assert fingerprint({"a": 1, "b": (2,)}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
