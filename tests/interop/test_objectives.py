"""A run of any objective is weights of its model: what lies behind the model is left aside."""

import numpy as np
import pytest
from objectives import RECIPES, small

from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli.main import main
from crate_jax.interop import load_fitted
from crate_jax.interop.tree import flatten
from crate_jax.training.loop import open_checkpoints, restore_or_init, train
from crate_jax.training.run import set_up


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_a_run_states_its_model(task, tmp_path):
    workdir = tmp_path / "run"
    train(small(task, total_steps=2, batch_size=16, checkpoint_every_steps=2), workdir)
    trained, extra, _ = read_trained(workdir, "latest")
    trees = {"": trained}
    if "teacher" in extra:
        trees = {"": extra["teacher"]["params"], "student": trained}
        trees["teacher"] = trees[""]
    for which, tree in trees.items():
        loaded = load_fitted(workdir, None, which=which)
        found, expected = flatten(loaded.params), flatten(tree)
        with_head = getattr(loaded.model, "num_classes", True)  # a model of text always has its own
        kept = {path for path in expected if with_head or path[:5] != "head/"}
        assert found.keys() == kept
        for path in kept:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
        aside = "head: left aside, for the model has none (num_classes=0)" in loaded.report
        assert aside == (kept != expected.keys())
    model = loaded.model
    out = model.apply({"params": loaded.params}, model.sample_input(), train=False)
    sizes = (getattr(model, name, 0) for name in ("num_classes", "vocab_size", "width"))
    assert out.shape[-1] == next(filter(None, sizes))
    with pytest.raises(ValueError, match="run must hold weights under pupil; it has none"):
        load_fitted(workdir, None, which="pupil")
    if len(trees) > 1:
        moved = flatten(trees[""]).values(), flatten(trees["student"]).values()
        assert any(np.any(a != b) for a, b in zip(*moved, strict=True))
        target = tmp_path / "student.npz"
        assert main(["convert", f"--from={workdir}", f"--to={target}", "--which=student"]) == 0
        with np.load(target) as file:
            np.testing.assert_array_equal(file["blocks/mssa/U"], trained["blocks"]["mssa"]["U"])


def test_a_teacher_begins_as_the_weights_that_its_student_begins_with(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    fields = dict(total_steps=1, batch_size=16, checkpoint_every_steps=1)
    train(small("simdino", **fields), first)
    config = small("simdino", **fields, init_weights=first, seed=1)
    run = set_up(config, "train", "eval", workdir=second)
    state, _, record = restore_or_init(run, open_checkpoints(run, second))
    taught = flatten(read_trained(first, "latest")[1]["teacher"]["params"])
    teacher, student = flatten(state.extra["teacher"]["params"]), flatten(state.params)
    assert "took teacher, averaged weights" in "".join(record["notes"])
    for path, array in teacher.items():
        np.testing.assert_array_equal(array, student[path], err_msg=path)
        assert (path[:5] == "head/") or np.array_equal(array, taught[path])
    assert not np.array_equal(teacher["head/linear0/kernel"], taught["head/linear0/kernel"])
