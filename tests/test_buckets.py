"""A run in a bucket: killed, resumed, evaluated, drawn; a mistake about a bucket is one line."""

import json
import os
import random
import re
import time

import jax
import numpy as np
import pytest
from command import TINY, run, start

from crate_jax.checkpoint.reading import inspect, read_params
from crate_jax.files import located

STEPS = 24
ARGUMENTS = [*TINY, f"--config.total_steps={STEPS}", "--config.checkpoint_every_steps=3"]
ARGUMENTS += ["--config.eval_every_steps=12"]
CLOCK = ("examples_per_s", "data_wait_share")

pytestmark = pytest.mark.slow


def lines(workdir):
    """The metrics file, without the values that depend on the clock."""
    text = (located(workdir, "workdir") / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def summary(out):
    found = json.loads(out.splitlines()[-1])
    return {k: v for k, v in found.items() if k not in ("seconds", "workdir")}


def kill_at(step, workdir):
    """Start a run and send it SIGKILL as soon as it has said that a step is done."""
    process = start("train.py", f"--workdir={workdir}", *ARGUMENTS)
    deadline = time.monotonic() + 250
    for line in process.stderr:
        assert time.monotonic() < deadline
        if line.startswith(f"step {step}/"):
            break
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run on disk, to its end."""
    workdir = tmp_path_factory.mktemp("whole")
    status, out, err = run("train.py", f"--workdir={workdir}", *ARGUMENTS)
    assert status == 0, err
    return workdir, summary(out)


def test_a_killed_run_goes_on_and_is_what_one_on_disk_is(uninterrupted, bucket):
    workdir, expected = uninterrupted
    # By step 10 the save of step 6 has waited for that of step 3.
    step = random.randint(10, STEPS - 6)
    kill_at(step, bucket)
    status, out, err = run("train.py", f"--workdir={bucket}", *ARGUMENTS)
    assert status == 0, err
    resumed = re.search(rf"^resuming {bucket} after step (\d+) of {STEPS}$", err, re.M)
    assert resumed and 3 <= int(resumed[1]) <= step, err
    assert summary(out) == expected
    whole, again = (jax.tree.leaves_with_path(read_params(x, STEPS)[0]) for x in (workdir, bucket))
    assert len(whole) > 10 and len(whole) == len(again)
    for (path, a), (_, b) in zip(whole, again, strict=True):
        np.testing.assert_array_equal(b, a, err_msg=f"{path}, killed at {step}")
    assert lines(bucket) == lines(workdir)
    assert [row["intact"] for row in inspect(bucket)] == [True] * len(inspect(workdir))
    config = json.loads((located(bucket, "workdir") / "config.json").read_text())
    assert config == json.loads((workdir / "config.json").read_text())

    status, out, err = run("-m", "crate_jax", "evaluate", f"--workdir={bucket}", "--step=best")
    assert status == 0, err
    assert json.loads(out)["top1"] == pytest.approx(expected["test/top1"])
    status, out, err = run("-m", "crate_jax", "report", f"--workdir={bucket}")
    assert status == 0, err
    assert json.loads(out)["output"] == f"{bucket}/report/index.html"
    written = located(bucket, "workdir") / "report"
    assert (written / "index.html").read_text().startswith("<!doctype html>")
    assert (written / "data" / "tokens.csv").read_text().startswith("layer,")


@pytest.mark.parametrize("kind", ["gs", "s3"])
@pytest.mark.parametrize("flag", ["--workdir", "--config.init_weights"])
def test_a_wrong_bucket_is_one_line(services, kind, flag, tmp_path):
    where = [] if flag == "--workdir" else [f"--workdir={tmp_path / 'run'}"]
    status, out, err = run("train.py", *where, f"{flag}={kind}://no-such-bucket/x", *ARGUMENTS)
    assert (status, out) == (2, "")
    name = "workdir" if flag == "--workdir" else "weights"
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        f"error: {name} must be reachable; {kind}://no-such-bucket is not (there"
    )
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_missing_credentials_are_one_line_and_soon(services, kind, monkeypatch, tmp_path):
    """Nothing says who asks, and nobody answers who could."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # of a machine without a network
    begin = time.monotonic()
    status, out, err = run("-m", "crate_jax", "evaluate", f"--workdir={kind}://some-bucket/run")
    assert (status, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: workdir must be reachable; {kind}://some-bucket is not (")
    assert "credentials: " in line and "Traceback" not in err
    assert time.monotonic() - begin < 120
