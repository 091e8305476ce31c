"""`layerwise` on a small run, at its start and at its end, against the measures of its arrays."""

import json

import numpy as np
import pytest

from crate_jax.analysis import measure
from crate_jax.analysis.measured import Measured, measured_of
from crate_jax.checkpoint.reading import restore_trained
from crate_jax.cli.layerwise import looked_into, table
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, TrainConfig
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
    assert all(len(line) <= 80 for line in lines[:-1] if not line.startswith(("Layer", "Together")))
    opened = set_up(config(), "eval")
    params, extra = restore_trained(run, *_shapes(opened), 2)[:2]
    inside = [*looked_into(opened, params, extra, 30)]
    assert [len(each.inputs) for each in inside] == [30]
    model = inside[0].model
    expected = measure(model, {"params": params}, inside[0].inputs, measured_of(model))
    assert said["images"] == 30 and said["step"] == 2 and said["split"] == "test"
    assert set(said["layers"]) == set(expected) == set(said["deviations"])
    for name, values in expected.items():
        np.testing.assert_allclose(said["layers"][name], values.mean, rtol=1e-4)
        np.testing.assert_allclose(said["deviations"][name], values.std, rtol=1e-4)
    assert len(said["verdict"]) == 3 and said["verdict"][-1].startswith("Together: the attention")
    assert said["verdict"][0] in lines


def _shapes(run):
    import jax

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
    opened = set_up(config(), "eval")
    params, extra = opened.task.init(opened.key)
    inside = [*looked_into(opened, params, extra, 104)]
    rate = measure(inside[0].model, {"params": params}, inside[0].inputs, ("rate",))["rate"]
    assert not np.allclose(initial["layers"]["rate"], trained["layers"]["rate"], rtol=1e-6)
    assert rate.count == 104


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
