"""Predictions of a split on any mesh, ReaL labels, confusion and calibration against loops."""

from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import DataConfig, ModelConfig, TrainConfig
from crate_jax.evaluation.calibration import calibration
from crate_jax.evaluation.confusion import confusion_matrix, per_class_accuracy, write_confusion
from crate_jax.evaluation.predictions import Predictions, predictions, read_real, real_accuracy
from crate_jax.training.run import evaluate_split, evaluation_batches, set_up

SIZES = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)


@pytest.mark.parametrize(("mesh", "devices"), [("data:1", 1), ("data:2,fsdp:4", 8)])
def test_predictions_are_those_of_the_logits_on_any_mesh(mesh, devices):
    config = TrainConfig(
        eval_batch_size=16,
        model=ModelConfig(name="crate_tiny_patch16_224", **SIZES),
        data=DataConfig(eval_split="test[:42]", eval_transforms="resize(16)", num_threads=1),
    )
    config.parallel.mesh = mesh
    run = set_up(config, "eval", devices=jax.devices()[:devices])
    params, extra = run.task.init(run.key)
    with closing(evaluation_batches(run)) as batches:
        found = predictions(run.task, params, extra, batches, run.mesh)
    rows = [run.rows["eval"].row(i, np.random.default_rng(0)) for i in range(42)]
    images = jnp.asarray(np.stack([row["image"] for row in rows]))
    logits = np.asarray(run.task.logits(params, extra, {"image": images}), np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(found.classes, logits.argmax(axis=1))
    np.testing.assert_allclose(found.confidence, 1 / odds.sum(axis=1), atol=1e-6)
    assert found.labels.tolist() == [row["label"] for row in rows]
    assert found.places.tolist() == list(range(42))
    top1 = evaluate_split(run, params, extra)["top1"]
    assert top1 == pytest.approx(np.mean(found.classes == found.labels), abs=1e-12)


# --- ReaL -----------------------------------------------------------------------------------------


def test_a_prediction_is_right_if_it_is_one_of_the_labels_and_images_without_do_not_count():
    # Image 2 of the split could not be read.
    found = Predictions(np.array([1, 0, 2, 0]), *[np.zeros(4)] * 2, np.array([0, 1, 3, 4]))
    real = [[0, 1], [], [3], [3], [0]]
    assert real_accuracy(found, real) == {"real": 2 / 3, "real_examples": 3}
    with pytest.raises(ValueError, match="must hold a label of some image"):
        real_accuracy(found, [[]] * 5)


def test_a_file_of_labels_is_read(tmp_path):
    path = tmp_path / "real.json"
    path.write_text("[[0], [], [2, 1]]")
    assert read_real(path, images=3, classes=3) == [[0], [], [2, 1]]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[[0], [1]]", "labels of each of the 3 images of the split, in their order; .* holds 2"),
        ("[[0], [3], []]", r"must hold classes in 0 … 2, those of the model; .* holds 3\."),
        ("[[0], [-1], []]", r"must hold classes in 0 … 2, those of the model; .* holds -1\."),
        ("[0, 1, 2]", "must hold a list of lists of class numbers"),
        ('[["a"], [], []]', "must hold a list of lists of class numbers"),
        ("{}", "must hold a list of lists of class numbers"),
        ("no", "must name a JSON file; .* is none: Expecting value"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, line):
    path = tmp_path / "real.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=line):
        read_real(path, images=3, classes=3)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must name a JSON file; there is no"):
        read_real(tmp_path / "real.json", images=3, classes=3)


# --- confusion and calibration --------------------------------------------------------------------


def test_confusion_counts_pairs(tmp_path):
    rng = np.random.default_rng(0)
    labels, told = rng.integers(0, 3, 60), rng.integers(0, 4, 60)
    found = confusion_matrix(labels, told, 4)
    for i in range(4):
        for j in range(4):
            assert found[i, j] == sum(pair == (i, j) for pair in zip(labels, told, strict=True))
    accuracy = per_class_accuracy(found)
    assert accuracy[3] is None
    assert accuracy[:3] == [np.mean(told[labels == i] == i) for i in range(3)]
    write_confusion(tmp_path / "named.csv", found[:2, :2], ["a, b", "c"])
    lines = (tmp_path / "named.csv").read_text().splitlines()
    assert lines[0] == 'label,"a, b",c'
    assert lines[2] == f"c,{found[1, 0]},{found[1, 1]}"
    write_confusion(tmp_path / "numbers.csv", found, ())
    assert (tmp_path / "numbers.csv").read_text().splitlines()[0] == "label,0,1,2,3"


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 500).astype(np.float32)
    confidence[:3] = 0.0, 1.0, 0.5  # 0.5 is the upper edge of a bin of four
    hits = rng.uniform(size=500) < confidence**2
    found = calibration(confidence, hits, bins=4)
    ece = 0.0
    for b in range(4):
        inside = (confidence > b / 4) & (confidence <= (b + 1) / 4)
        inside |= (confidence == 0) & (b == 0)
        accuracy, mean = hits[inside].mean(), confidence[inside].astype(np.float64).mean()
        assert (found.count[b], found.accuracy[b]) == (inside.sum(), accuracy)
        assert found.confidence[b] == pytest.approx(mean)
        ece += inside.mean() * abs(accuracy - mean)
    assert found.ece == pytest.approx(ece)
    assert found.ece > 0.05


def test_whoever_is_always_sure_and_right_is_calibrated():
    assert calibration(np.ones(5, np.float32), np.ones(5)).ece == 0
    assert calibration(np.ones(4, np.float32), np.array([1, 0, 0, 0])).ece == 0.75
