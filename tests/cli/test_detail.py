"""`evaluate` by class, by confidence and by ReaL labels, and what it refuses."""

import csv
import json

import numpy as np
import pytest

from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)


def config(**changes):
    made = dict(
        batch_size=48,
        eval_batch_size=40,
        total_steps=12,
        model=ModelConfig(name="crate_tiny_patch16_224", **FIELDS),
        data=DataConfig(
            eval_split="test[:90]", train_transforms="resize(16)", eval_transforms="resize(16)"
        ),
        optim=OptimConfig(lr=3e-3, warmup_epochs=0),
    )
    return TrainConfig(**made | changes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train(config(), folder)
    return folder


def evaluate(capsys, *arguments):
    """The JSON of `evaluate`, or its one line."""
    capsys.readouterr()
    status = main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    if status == 0:
        return json.loads(out.splitlines()[-1])
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    return err


def test_nothing_more_is_said_unless_asked(workdir, capsys):
    found = evaluate(capsys, "--workdir", workdir)
    assert not {"ece", "calibration", "by_class", "confusion", "real"} & set(found)


def test_by_class_and_confidence_agree_with_the_metrics(workdir, capsys, tmp_path):
    table = tmp_path / "confusion.csv"
    found = evaluate(capsys, "--workdir", workdir, "--detail", "--confusion", table)
    by_class, bins = found["by_class"], found["calibration"]
    assert by_class["classes"] == [str(digit) for digit in range(10)]
    assert sum(by_class["examples"]) == sum(bins["examples"]) == found["examples"] == 90
    hits = np.dot(by_class["accuracy"], by_class["examples"])
    assert hits == pytest.approx(90 * found["top1"])
    assert np.dot(bins["accuracy"], bins["examples"]) == pytest.approx(90 * found["top1"])
    gaps = np.abs(np.subtract(bins["accuracy"], bins["confidence"]))
    assert found["ece"] == pytest.approx(np.dot(gaps, bins["examples"]) / 90)
    assert found["confusion"] == str(table)
    head, *lines = csv.reader(table.read_text("utf-8").splitlines())
    matrix = np.array([line[1:] for line in lines], int)
    assert head[1:] == [line[0] for line in lines] == by_class["classes"]
    assert matrix.sum(axis=1).tolist() == by_class["examples"]
    assert matrix.trace() == pytest.approx(90 * found["top1"])


def test_real_labels(workdir, capsys, tmp_path):
    path = tmp_path / "real.json"
    any_class = [list(range(10))] * 40 + [[]] * 50
    path.write_text(json.dumps(any_class))
    found = evaluate(capsys, "--workdir", workdir, "--real", path)
    assert (found["real"], found["real_examples"]) == (1.0, 40)
    path.write_text(json.dumps(any_class[:-1]))
    line = evaluate(capsys, "--workdir", workdir, "--real", path)
    assert "labels of each of the 90 images of the split" in line


def test_a_classifier_reads_no_tokenizer(workdir, capsys):
    line = evaluate(capsys, "--workdir", workdir, "--tokenizer=bytes")
    assert line == (
        "error: --tokenizer must go with a model of text; got one of the task classify. "
        "Leave it out.\n"
    )


def test_what_has_no_classes_has_no_detail(capsys, tmp_path):
    name = "crate_mae_tiny_patch16_224"
    model = ModelConfig(name=name, **FIELDS, decoder_depth=1)
    train(config(model=model, task="masked_autoencoding", total_steps=1), tmp_path / "mae")
    line = evaluate(capsys, "--workdir", tmp_path / "mae", "--detail")
    assert "evaluate must get a run of the task classify" in line
