"""`layerwise` on a small run, at its start and at its end, against the measures of its arrays."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from crate_jax.analysis import measure
from crate_jax.analysis.measured import Measured, measured_of
from crate_jax.checkpoint.reading import restore_trained
from crate_jax.cli.examples import first_examples, split_examples
from crate_jax.cli.layerwise import measure_split, table
from crate_jax.cli.looking import open_specimen
from crate_jax.cli.main import main
from crate_jax.cli.measuring import measured
from crate_jax.config import DataConfig, ModelConfig, TrainConfig
from crate_jax.data.rows import BadExampleError
from crate_jax.training import beginning
from crate_jax.training.loop import train
from crate_jax.training.run import set_up


def config(**model):
    return TrainConfig(
        batch_size=48,
        eval_batch_size=104,
        total_steps=2,
        model=ModelConfig(
            **{
                "name": "crate_tiny_patch16_224",
                **dict(image_size=(8, 8), patch_size=(4, 4), in_channels=1),
                **dict(width=12, depth=2, num_heads=2, num_classes=10),
            }
            | model
        ),
        data=DataConfig(dataset="digits", train_transforms="", eval_transforms="", num_threads=1),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config(), workdir)
    return workdir


def last(capsys):
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def test_a_run(run, capsys):
    assert main(["layerwise", "--workdir", str(run), "--images", "30", "--geometry"]) == 0
    lines, said = last(capsys)
    assert all(len(line) <= 80 for line in lines[:-1])
    opened = set_up(config(), "eval")
    params, extra = restore_trained(run, *_shapes(opened), 2)[:2]
    inside = opened.task.inside(params, extra, first_examples(opened, 30))
    model = inside.model
    expected = measure(model, {"params": params}, inside.inputs, measured_of(model))
    assert said["images"] == 30 and said["step"] == 2 and said["split"] == "test"
    assert set(said["layers"]) == set(expected) == set(said["deviations"])
    for name, values in expected.items():
        np.testing.assert_allclose(said["layers"][name], values.mean, rtol=1e-4)
        np.testing.assert_allclose(said["deviations"][name], values.std, rtol=1e-4)
    assert len(said["verdict"]) == 3 and said["verdict"][-1].startswith("Together: the attention")
    assert said["verdict"][0] in " ".join(" ".join(lines).split())  # over two lines


def _shapes(run):
    return jax.eval_shape(run.task.init, run.key)


def test_before_the_first_step(run, capsys):
    """The same parameters as a run that trains from the seed starts with; another split."""
    arguments = ["layerwise", "--workdir", str(run), "--images", "200", "--split", "train"]
    assert main([*arguments, "--initial"]) == 0
    _, initial = last(capsys)
    assert main(arguments) == 0
    _, trained = last(capsys)
    assert initial["step"] == "initial" and trained["step"] == 2
    assert initial["images"] == trained["images"] == 200  # of batches of 104
    assert not set(initial["layers"]) & {"effective_rank", "mean_angle"}
    from_train = config()
    from_train.data.eval_split = "train"
    opened = set_up(from_train, "eval")
    params, extra = opened.task.init(opened.key)
    inside = opened.task.inside(params, extra, first_examples(opened, 200))
    rate = measure(inside.model, {"params": params}, inside.inputs, ("rate",))["rate"]
    np.testing.assert_allclose(initial["layers"]["rate"], rate.mean, rtol=1e-4)
    assert not np.allclose(initial["layers"]["rate"], trained["layers"]["rate"], rtol=1e-6)


class Rows:
    """Of one number each, the odd ones unreadable, or all."""

    name = "numbers"

    def __init__(self, readable):
        self.readable = readable
        self.shapes = {"x": jax.ShapeDtypeStruct((), np.float32)}

    def __len__(self):
        return 7

    def row(self, index, rng):
        if index % 2 or not self.readable:
            raise BadExampleError(f"{index} is bad")
        return {"x": np.float32(index)}


def test_the_examples_of_a_split(caplog):
    """Those that can be read, no more than asked for; without one a line says so."""
    made = config()
    made.data.on_bad_example, made.data.max_bad_share = "skip", 1.0
    made.eval_batch_size = 3
    run: Any = SimpleNamespace(config=made, rows={"eval": Rows(readable=True)})
    assert [each["x"].tolist() for each in split_examples(run, 99)] == [[0, 2], [4], [6]]
    assert [each["x"].tolist() for each in split_examples(run, 3)] == [[0, 2], [4]]
    assert first_examples(run, 4)["x"].tolist() == [0, 2, 4, 6]
    run.rows["eval"] = Rows(readable=False)
    with pytest.raises(ValueError, match="must have an example that can be read; digits/test has"):
        first_examples(run, 4)
    with pytest.raises(ValueError, match="Choose another split"):
        measure_split(run, {}, (), images=4)


def test_official_definition(run, capsys):
    assert main(["layerwise", "--workdir", str(run), "--definition", "official_code"]) == 0
    _, said = last(capsys)
    assert set(said["layers"]) == {"subspace_rate", "zeros"}
    assert said["images"] == 256


def test_mistakes(run, tmp_path, capsys):
    assert main(["layerwise", "--workdir", str(run), "--images", "0"]) == 2
    assert "--images must be at least 1; got 0." in capsys.readouterr().err
    assert main(["layerwise", "--workdir", str(run), "--initial", "--step", "2"]) == 2
    assert "--initial must go with --workdir and without --step." in capsys.readouterr().err
    official = ["--definition", "official_code", "--geometry"]
    assert main(["layerwise", "--workdir", str(run), *official]) == 2
    assert "--geometry must go with --definition paper; official" in capsys.readouterr().err
    assert main(["layerwise", "--workdir", str(run), "--batch_size", "0"]) == 2
    assert "--batch_size must be >= 1; got 0. Leave it out." in capsys.readouterr().err


def test_a_run_that_began_from_weights(run, tmp_path, capsys):
    """Before its first step it is the other run; where that is gone a line says so."""
    begun, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    made = config()
    made.init_weights, made.seed = str(other), 5
    train(made, begun)
    arguments = ["layerwise", "--images", "40", "--workdir"]
    assert main([*arguments, str(run)]) == 0
    expected = last(capsys)[1]["layers"]
    assert main([*arguments, str(begun), "--initial"]) == 0
    _, said = last(capsys)
    assert said["step"] == "initial" and said["layers"] == expected
    found = measured([open_specimen(str(begun), examples=40)], ["rate"])
    np.testing.assert_allclose(found["before training"]["rate"].mean, expected["rate"], rtol=1e-4)
    assert not np.allclose(found["test"]["rate"].mean, expected["rate"], rtol=1e-4)
    shutil.rmtree(other)
    assert main([*arguments, str(begun), "--initial"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"init_weights must still be there to restore the start of the run; got {other}" in err
    assert set(measured([open_specimen(str(begun), examples=4)], ["rate"])) == {"test", "train"}


def test_a_bug_in_a_task_is_no_mistake(monkeypatch):
    run = set_up(config(), "eval")

    def fail(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(beginning, "first_state", fail)
    for weights in (None, "w.npz"):
        run.config.init_weights = weights
        with pytest.raises(ValueError, match=r"^a bug$"):
            beginning.before_training(run, {})


def test_a_decoder_that_is_not_there(run, capsys):
    assert main(["layerwise", "--workdir", str(run), "--decoder"]) == 2
    assert (
        "--decoder must go with a model that has a decoder; got a Crate" in capsys.readouterr().err
    )


def test_numbers_stand_below_their_names():
    values = Measured(np.array([1.0, 2000.0]), np.array([0.1, 0.2]), 3)
    assert table({"rate": values, "a_longer_name": values}) == (
        "  layer  rate  a_longer_name\n      1     1              1\n      2  2000           2000"
    )
    wide = table({f"measure_{i:02d}": values for i in range(12)})
    assert max(map(len, wide.splitlines())) <= 80
    assert sum("layer" in line for line in wide.splitlines()) == 2
