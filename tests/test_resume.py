"""A run killed at a random step and started again ends with the bits of one that was not."""

import json
import random

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import TINY, run, start, wait_for

STEPS = 40
ARGUMENTS = [*TINY, f"--config.total_steps={STEPS}", "--config.checkpoint_every_steps=5"]
ARGUMENTS += ["--config.eval_every_steps=10"]  # an evaluation starts workers of its own

pytestmark = pytest.mark.slow


def arrays(workdir):
    """All arrays of the last checkpoint by path: parameters, moments, step."""
    with pytest.warns(UserWarning, match="Sharding info"):
        tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(STEPS) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


CLOCK = ("examples_per_s", "data_wait_share")


def lines(workdir):
    """The metrics file, without the values that depend on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def kill_at(step, workdir, *arguments):
    """Start a run and send it SIGKILL as soon as it has logged a step."""
    process = start("train.py", f"--workdir={workdir}", *ARGUMENTS, *arguments)
    wait_for(step, '"train/loss"', workdir, process)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    status, out, err = run("train.py", f"--workdir={workdir}", *ARGUMENTS)
    assert status == 0, err
    return workdir, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 0)])
def test_killed_and_resumed_run_is_bit_identical(uninterrupted, tmp_path, workers, workers_after):
    workdir, summary = uninterrupted
    # By step 11 the save of step 10 has waited for that of step 5: there is one to resume from.
    step = random.randint(12, STEPS - 10)
    kill_at(step, tmp_path, f"--config.data.num_workers={workers}")
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert str(STEPS) not in left, "killed too late to show anything"
    status, out, err = run(
        "train.py",
        f"--workdir={tmp_path}",
        *ARGUMENTS,
        f"--config.data.num_workers={workers_after}",
    )
    assert status == 0, err
    assert "resuming" in err, f"killed at step {step} with {left}"
    resumed = json.loads(out.splitlines()[-1])
    ignore = ("seconds", "workdir")
    assert {k: v for k, v in resumed.items() if k not in ignore} == {
        k: v for k, v in summary.items() if k not in ignore
    }
    whole, again = arrays(workdir), arrays(tmp_path)
    assert whole.keys() == again.keys() and len(whole) > 20
    for path in whole:
        np.testing.assert_array_equal(again[path], whole[path], err_msg=f"{path}, killed at {step}")
    assert lines(tmp_path) == lines(workdir)
