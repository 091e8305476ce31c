"""Ctrl-C: one line and status 130 from every command, at once, with nothing half written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command import LIMIT_S, ROOT, TINY, environment

from crate_jax.cli import main as cli

LINE = "error: interrupted; what was saved before is intact"
# `python -m crate_jax`, with SIGINT from the process itself where it calls a function first; and a
# process whose parent ignores the signal heeds it, as one of a terminal does.
DRIVER = """
import importlib, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
place = sys.argv.pop(1)
if place:
    import crate_jax.interrupts
    module, _, path = place.partition(":")
    crate_jax.interrupts.heed()  # before the imports of this driver, too
    owner, names = importlib.import_module(module), path.split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    function = getattr(owner, names[-1])
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)
    setattr(owner, names[-1], interrupted)
runpy.run_module("crate_jax", run_name="__main__", alter_sys=True)
"""
# By command: its flags, and a function in the middle of its work. run is a run, images a folder of
# splits; what is written goes to out.
COMMANDS = {
    "train": (
        ["--config=digits", *TINY, "--config.total_steps=400", "--workdir=out/run"],
        "crate_jax.training.loop:compile_programs",
    ),
    "evaluate": (["--workdir=run"], "crate_jax.training.run:make_evaluate"),
    "evaluate --detail": (["--workdir=run"], "crate_jax.evaluation.predictions:predictions"),
    "knn": (["--workdir=run"], "crate_jax.evaluation.knn:knn"),
    "probe": (["--workdir=run"], "crate_jax.evaluation.linear:linear_probe"),
    "report": (["--workdir=run", "--output=out/report"], "crate_jax.cli.page:Page.draw"),
    "figure": (["curves", "--workdir=run", "--output=out/a.svg"], "os:fsync"),
    "layerwise": (["--workdir=run"], "crate_jax.analysis.measure:measure"),
    "segment": (
        ["--workdir=run", "--images=images/train/a", "--output=out/masks", "--size=16"],
        "crate_jax.cli.segmenting:results_of",
    ),
    "reconstruct": (["--workdir=run"], "crate_jax.checkpoint.manager:Checkpointer.resolve"),
    "generate": (["--workdir=run"], "crate_jax.checkpoint.manager:Checkpointer.resolve"),
    "convert": (["--from=run", "--to=out/a.safetensors"], "os:fsync"),
    "export": (["--workdir=run", "--output=out/a.stablehlo"], "os:fsync"),
    "compare": (
        ["--weights=run", "--train-steps=0", "--html=out/a.html"],
        "crate_jax.parity.compare:compare",
    ),
    "prepare": (["--from=images", "--to=out", "--name=two"], "os:fsync"),
    "checkpoints": (["run"], "crate_jax.checkpoint.reading:inspect"),
    "plan": (["--config=digits", "--mesh=data:2"], "crate_jax.planning.plan:plan"),
    "doctor": ([], "crate_jax.training.loop:train"),
}


@pytest.fixture
def here(tiny_run, tmp_path):
    """A folder with what the commands read, and `out` for what they write."""
    shutil.copytree(tiny_run, tmp_path / "run")
    png = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    for name in ("train/a/1.png", "train/b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(png)
    (tmp_path / "out").mkdir()
    return tmp_path


def start(here, place, name, flags=()):
    """A command as a program, which interrupts itself at a place."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, place, *name.split(), *flags],
        cwd=here,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check(process, here):
    """One line, and no file that is not whole."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err.splitlines()) == (130, [LINE]), (out, err)
    assert not [line for line in out.splitlines() if line.startswith("{")]
    files = {p.relative_to(here / "out").as_posix() for p in (here / "out").rglob("*")}
    whole = {name for name in files if name.startswith("run/") or "fingerprint" in name}
    assert not [name for name in files - whole if (here / "out" / name).is_file()]
    assert not [name for name in files if "tmp" in name]


def test_every_long_command_is_among_them():
    quick = {"config", "summary"}
    names = {add.__name__.removeprefix("add_") for add in cli.COMMANDS}
    assert {name.split()[0] for name in COMMANDS} == names - quick


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_in_the_middle(name, here):
    flags, place = COMMANDS[name]
    check(start(here, place, name, flags), here)


@pytest.mark.parametrize("name", list(COMMANDS)[::3])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc says what is imported")
def test_while_libraries_are_imported(name, here):
    """At a random moment, once NumPy is there: a second or two before all are."""
    process = start(here, "", name, COMMANDS[name][0])
    maps = Path(f"/proc/{process.pid}/maps")
    await_(lambda: "_multiarray_umath" in maps.read_text(), process)
    time.sleep(random.uniform(0, 1))
    os.killpg(process.pid, signal.SIGINT)
    check(process, here)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc says what has started")
def test_while_workers_of_the_loader_start(here):
    """A terminal sends the signal to them, too, while they import."""
    flags = [*COMMANDS["train"][0], "--config.data.num_workers=1"]
    process = start(here, "", "train", flags)
    children = Path(f"/proc/{process.pid}/task")

    def started():
        found = [n for p in children.glob("*/children") for n in p.read_text().split()]
        return any("spawn_main" in Path(f"/proc/{n}/cmdline").read_text() for n in found)

    await_(started, process)
    time.sleep(random.uniform(0, 0.5))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    *before, last = err.splitlines()
    assert (process.returncode, last) == (130, LINE) or (
        process.returncode == 75 and last.startswith("error: SIGINT at step ")
    ), err
    assert all(line.startswith("step ") for line in before), err


def await_(condition, process):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What a library does while the signal comes, and how soon the process ends.
LIBRARIES = {
    "does not return": "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)",
    "swallows it": """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass""",
    "has a callback": """
class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**6):
            pass
Collected()
time.sleep(60)""",
}


@pytest.mark.parametrize("what", LIBRARIES)
def test_a_library_that(what, tmp_path):
    aside = tmp_path / ".a.json.1.tmp"
    aside.write_text("half")
    program = f"""
import hashlib, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from crate_jax import interrupts
from crate_jax.cli.running import run_command
interrupts.PATIENCE_S = 0.2
interrupts.ASIDE.add({str(aside)!r})
interrupts.heed()
def command():
    if {what != "has a callback"}:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    exec({LIBRARIES[what]!r}, globals())
try:
    status = run_command(command)
finally:
    os.path.exists({str(aside)!r}) and os.unlink({str(aside)!r})
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr.strip().splitlines()) == (130, [LINE])
    assert not aside.exists()


def test_a_second_one_ends_at_once_and_an_order_to_finish_has_time():
    program = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from crate_jax import interrupts
interrupts.PATIENCE_S = 0.1
interrupts.heed()
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
with interrupts.raising():
    try:
        interrupt()
    except KeyboardInterrupt:
        interrupts.answered()
        time.sleep(0.5)
        print("finished")
    interrupts.PATIENCE_S = 60
    try:
        interrupt()
    except KeyboardInterrupt:
        sys.stdout.flush()
        interrupt()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "finished\n", LINE + "\n")


def test_a_program_that_is_to_ignore_it_does():
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from crate_jax import interrupts
interrupts.heed()
os.kill(os.getpid(), signal.SIGINT)
print("goes on")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
