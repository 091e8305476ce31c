"""Two processes of four devices: the same training, stopped and resumed together, none left alone.

Gloo joins them over localhost. Every process ends by SIGKILL at its time limit, whatever happens.
How soon it must end by itself is said for a quiet machine.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command import LIMIT_S, ROOT, TINY, environment, wait_for
from stored import write_folder

pytestmark = pytest.mark.slow
QUIET_S = 20  # more than a run of one process takes where nothing else runs
STEPS = 60
LOSS = '"train/loss"'  # of a step, in the log
ARGUMENTS = [*TINY, f"--config.total_steps={STEPS}", f"--config.eval_every_steps={STEPS}"]
# Told only to those of which one dies: a busy machine may keep a healthy one silent as long.
QUICK = ["--config.parallel.heartbeat_timeout_seconds=10"]


def start_all(workdir, count, *arguments, own=((), ()), program=("train.py",)):
    """All processes of a run, each with four devices; a single one is started as always.

    With arguments of their `own`, each also has its own workdir.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for i in range(count):
        addressed = [
            f"--config.parallel.coordinator=localhost:{port}",
            f"--config.parallel.num_processes={count}",
            f"--config.parallel.process_id={i}",
        ]
        processes.append(
            subprocess.Popen(
                ["timeout", "--signal=KILL", str(LIMIT_S), sys.executable, *program]
                + [f"--workdir={workdir}{f'/{i}' if own[i] else ''}", *ARGUMENTS]
                + [*addressed[: 3 * (count > 1)], *arguments, *own[i]],
                cwd=ROOT,
                env=environment(devices=4),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    """[(status, last line of stdout, last line of stderr)] of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=LIMIT_S + 20)
        found.append((process.returncode, (out.splitlines() or [""])[-1], err))
    return found


def child_of(process):
    """The number of the Python process below `timeout`."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir, start = tmp_path_factory.mktemp("one"), time.monotonic()
    ((status, out, err),) = finish(start_all(workdir, 1))
    assert status == 0, err
    return json.loads(out), losses(workdir), workdir, time.monotonic() - start


@pytest.fixture(scope="module")
def slower(one_process):
    """How many times as long as a quiet machine this one may take: as it did for one process."""
    return max(1, one_process[3] / QUIET_S)


def test_two_are_one_stopped_and_resumed_by_two_one_and_two(one_process, tmp_path):
    expected, expected_losses, *_ = one_process
    steps = []
    for count, step in ((2, 6), (1, 40)):
        processes = start_all(tmp_path, count)
        wait_for(step, LOSS, tmp_path, *processes)
        # One process is told, the last; both stop, at the same step, with the status to try again.
        os.kill(child_of(processes[-1]), signal.SIGTERM)
        found = finish(processes)
        for status, out, err in found:
            assert status == 75 and "{" not in out, (status, out, err)
            last = err.splitlines()[-1]
            assert last.startswith("error: SIGTERM at step ") and "is saved" in last
        stopped = {int(err.split("at step ")[-1].split()[0]) for _, _, err in found}
        assert len(stopped) == 1
        steps += stopped
        assert (tmp_path / "checkpoints" / str(steps[-1])).is_dir()
    assert steps == sorted(steps) and steps[-1] < STEPS
    results = finish(start_all(tmp_path, 2))
    assert [status for status, _, _ in results] == [0, 0], results
    assert f"resuming {tmp_path} after step {steps[-1]} of {STEPS}" in results[0][2]
    assert results[1][2] == "" and "step" in results[0][2]  # only the first writes
    for _, out, _ in results:
        found = json.loads(out)
        assert found["step"] == STEPS and found["test/examples"] == 297
        assert found["test/loss"] == pytest.approx(expected["test/loss"], abs=1e-5)
        assert found["test/top1"] == expected["test/top1"]
    found = losses(tmp_path)
    assert found.keys() == expected_losses.keys() == set(range(1, STEPS + 1))
    for step, loss in expected_losses.items():  # another order of examples is far further off
        assert found[step] == pytest.approx(loss, abs=1e-5), step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_within_a_minute(slower, tmp_path, victim):
    processes = start_all(tmp_path, 2, "--config.total_steps=4000", *QUICK)
    wait_for(5, LOSS, tmp_path, *processes)
    os.kill(child_of(processes[victim]), signal.SIGKILL)
    start = time.monotonic()
    found = finish(processes)
    assert time.monotonic() - start < 60 * slower
    status, out, err = found[1 - victim]
    assert status not in (0, 2) and "{" not in out
    # Ours, or, where they were quicker, JAX's own word or Gloo's.
    words = ("processes must stay; one was lost", "another task died", "gloo::")
    assert any(word in err for word in words), err


def test_a_process_that_fails_says_why_and_ends_the_other_within_a_minute(slower, tmp_path):
    """One of two cannot read its images: a mistake there, a lost process to the other."""
    png = cv2.imencode(".png", np.zeros((16, 16), np.uint8))[1].tobytes()
    for i in range(2):
        files = {f"{c}/{n:02d}.png": png for c in "ab" for n in range(24)}
        if i:
            files |= dict.fromkeys(list(files)[1:], b"no image")
        write_folder(tmp_path / f"data{i}", "train", files)
    flags = ["--config.data.dataset=folder", "--config.data.eval_split=train"]
    own = [[*flags, f"--config.data.data_dir={tmp_path}/data{i}"] for i in range(2)]
    start = time.monotonic()
    processes = start_all(tmp_path, 2, *QUICK, own=own)
    (other, _, other_err), (status, out, err) = finish(processes)
    assert time.monotonic() - start < 90 * slower  # both have to be started first
    assert status == 2 and "{" not in out, (status, out, err)
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "must be an image; its 8 bytes do not decode" in last
    assert other not in (0, 2), other_err


# Started in place of train.py: the last process cannot read the newest checkpoint, and it alone.
ONE_CANNOT_READ = """
import runpy, sys
import jax
from crate_jax.checkpoint import manager

manager.AGREEMENT_S = 5
read = manager.Checkpointer._read

def broken(self, step, items):
    if jax.process_index() == 1 and step == self.steps[-1]:
        raise self._unreadable(step, OSError("Input/output error"))
    return read(self, step, items)

manager.Checkpointer._read = broken
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_checkpoint_that_one_process_cannot_read_hangs_nobody(one_process, slower, tmp_path):
    shutil.copytree(one_process[2], tmp_path / "run")
    start = time.monotonic()
    flags = ["--config.total_steps=90", "--config.eval_every_steps=90", *QUICK]
    program = ("-c", ONE_CANNOT_READ)
    (other, _, other_err), (status, out, err) = finish(
        start_all(tmp_path / "run", 2, *flags, program=program)
    )
    assert time.monotonic() - start < 90 * slower
    assert status == 75 and "{" not in out, (status, out, err)
    assert "processes must stay; one was lost" in err.splitlines()[-1]
    assert other not in (0, 2), other_err
    assert (tmp_path / "run/checkpoints" / str(STEPS)).is_dir()  # nothing is renamed by one alone
