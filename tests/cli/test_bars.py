"""Bars of long work: in a terminal and nowhere else, with count and time left, and of what."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from command import LIMIT_S, ROOT, environment

from crate_jax.cli import main as cli
from crate_jax.cli.bars import _clock
from crate_jax.waiting import counted, counting, shown_by

# Work in a command: some that is counted, and some that nobody can count.
PROGRAM = """
import sys, time
from crate_jax.cli import bars
from crate_jax.cli.running import run_command
from crate_jax.waiting import counted, counting
bars.LINE_EVERY_S = float(sys.argv[1])
def command():
    for i in counted(range(12), "work", 12, "things"):
        time.sleep(0.05)
        if len(sys.argv) > 2 and i == 6:
            raise KeyboardInterrupt
    with counting("compile"):
        time.sleep(1.2)
    return {"done": True}
sys.exit(run_command(command))
"""


def in_terminal(*arguments, **variables):
    """A program whose stderr is a terminal of 80 columns: (status, stdout, what the screen got)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment() | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    got = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while more := os.read(ours, 4096):
            got += more
    os.close(ours)
    out, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, got.decode()


def screens(got):
    """What stood on the line, one after the other."""
    return [text for text in re.split(r"[\r\n]+", got) if text.strip()]


def test_a_bar_says_how_far_it_is_and_how_long_it_takes():
    status, out, got = in_terminal("-c", PROGRAM, "60", TQDM_DELAY="0")
    assert (status, out) == (0, '{"done": true}\n')
    seen = screens(got)
    assert max(map(len, seen)) < 80
    assert [text for text in seen if re.search(r"work: +\d+%\|.*\| \d+/12 \[00:0\d<00:0\d, ", text)]
    # Nobody counts what a compiler does; the clock goes on.
    assert [text for text in seen if text.strip() == "compile 00:01"]
    assert got.endswith("\r") and "\x1b[3" not in got  # the line is clean at the end; no colour


def test_short_work_has_no_bar():
    status, _, got = in_terminal("-c", PROGRAM, "60", TQDM_DELAY="30")
    assert (status, got) == (0, "")


def test_an_interruption_stands_on_a_line_of_its_own():
    status, out, got = in_terminal("-c", PROGRAM, "60", "interrupt", TQDM_DELAY="0")
    assert (status, out) == (130, "")
    assert screens(got)[-1] == "error: interrupted; what was saved before is intact"


@pytest.mark.parametrize("every", [60, 0.1])
def test_a_pipe_gets_a_line_now_and_then(every):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(every)],
        env=environment() | {"PYTHONPATH": str(ROOT), "TQDM_DELAY": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n')
    lines = done.stderr.splitlines()
    if every == 60:
        assert lines == []
    else:
        assert re.fullmatch(r"work: 0:0\d, \d+ of 12 things, 0:0\d left", lines[0]), lines
        assert lines[-1].startswith("compile: 0:0")


def test_a_command_has_a_bar_in_a_terminal_and_none_in_a_pipe(tiny_run):
    command = ["-m", "crate_jax", "evaluate", f"--workdir={tiny_run}", "--batch_size=24"]
    status, out, got = in_terminal(*command, TQDM_DELAY="0")
    assert status == 0 and out.startswith("{") and out.count("\n") == 1
    assert re.search(r"evaluate: .*\d+/297 \[", got)
    done = subprocess.run(
        [sys.executable, *command],
        env=environment() | {"PYTHONPATH": str(ROOT), "TQDM_DELAY": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def seen(monkeypatch):
    """What a command counts in this process: {what: [total, done]}."""
    found = {}

    @contextlib.contextmanager
    def show(what, total, unit):
        row = found[what] = [total, 0]

        def add(more):
            row[1] += more

        yield add

    monkeypatch.setattr("crate_jax.cli.running.shown", lambda: shown_by(show))
    return found


@pytest.fixture
def images(tmp_path):
    """Three images in two classes."""
    png = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    for name in ("train/a/1.png", "train/a/2.png", "train/b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png)
    return tmp_path / "images"


# The flags of a command, and what it counts: of how many it has done how many.
COUNTS = {
    "evaluate --detail": ({}, {"evaluate": (297, 304), "detail": (297, 304)}),
    "knn": (["--k=5", "--batch_size=304"], {"features": (297, 304), "knn": (1, 1)}),
    "layerwise": (["--images=100"], {"layerwise": (100, 100)}),
    "report": (["--output=out", "--examples=8"], {"report": (None, None)}),
    "figure": (["curves", "--output=a.svg"], {"figure curves": (None, 0)}),
    "segment": (
        ["--images=images/train/a", "--size=16", "--output=out"],
        {"segment": (2, 2)},
    ),
    "prepare": (["--from=images", "--to=out", "--name=two"], {"prepare train": (3, 3)}),
    "convert": (
        ["--to=a.safetensors"],
        {"read the weights": (None, 0), "write the weights": (None, 0)},
    ),
    "checkpoints": ([], {"read and check": (None, 0)}),
    "export": (["--output=a.stablehlo"], {"export": (None, 0)}),
    "compare": (["--train-steps=0"], {"compare": (None, 0)}),
    "plan": (
        ["--config=digits", "--mesh=data:8", "--config.batch_size=96"],
        {"plan: lower and compile": (None, 0)},
    ),
}
RUN_FLAG = {"convert": "--from=", "checkpoints": "", "compare": "--weights=", "prepare": None}
RUN_FLAG["plan"] = None


@pytest.mark.parametrize("name", COUNTS)
def test_what_a_command_counts(name, seen, images, tiny_run, monkeypatch, capsys):
    if name == "compare":
        pytest.importorskip("torch")
    monkeypatch.chdir(images.parent)
    flags, expected = COUNTS[name]
    prefix = RUN_FLAG.get(name, "--workdir=")
    of_run = [] if prefix is None else [f"{prefix}{tiny_run}"]
    assert cli.main([*name.split(), *of_run, *flags]) == 0, capsys.readouterr()
    for what, (total, done) in expected.items():
        assert what in seen, seen
        if (total, done) == (None, None):  # all, however many there are
            total = done = seen[what][0]
            assert total > 2
        assert seen[what] == [total, done]
    assert capsys.readouterr().err == ""


def test_a_tar_file_and_records_are_counted_while_they_are_indexed(tmp_path, images):
    import tarfile

    from crate_jax.data.stores.tars import _index

    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(images / "train", "train")
    found = {}

    @contextlib.contextmanager
    def show(what, total, unit):
        found[what] = row = [total, 0, unit]

        def add(more):
            row[1] += more

        yield add

    with shown_by(show):
        _index(str(tmp_path / "train.tar"))
    (row,) = found.values()
    assert list(found) == ["index train.tar"] and row[2] == "bytes"
    assert row[0] == (tmp_path / "train.tar").stat().st_size and row[0] / 4 < row[1] <= row[0]


def test_counting_costs_nothing_where_nobody_looks():
    assert list(counted([1, 2], "x")) == [1, 2]
    with counting("x", 3, "y") as add:
        add(2)


def test_a_clock():
    assert [_clock(s) for s in (0.4, 61, 3599.6, 3661)] == ["0:00", "1:01", "1:00:00", "1:01:01"]
