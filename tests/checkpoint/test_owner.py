"""A run's directory has one owner at a time, who is named, and none for longer than it lives."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from command import environment

from crate_jax.checkpoint import owner
from crate_jax.checkpoint.folder import FOLDER
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.owner import LOCK, MARKER, NOTE, Owner, own_together
from crate_jax.checkpoint.reading import inspect
from crate_jax.config import TrainConfig
from crate_jax.training.workdir import check_workdir

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# As another process takes the lock, without this project.
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(owner, "WAIT_S", 0.2)


@pytest.fixture(params=["locks", *NO_LOCKS])
def disk(request, monkeypatch):
    """A file system with locks, or the error of one without."""
    if request.param != "locks":

        def flock(fd, operation):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def refused(workdir):
    """The line of a start that is refused."""
    with pytest.raises(OSError, match=r"^workdir must have one owner at a time; ") as caught:
        Owner(workdir)
    return str(caught.value)


def test_the_second_is_refused_by_name_and_the_third_is_not(tmp_path, disk):
    workdir = tmp_path / "runs" / "x"
    first = Owner(workdir)
    line = refused(workdir)
    assert f"{workdir} belongs to process {os.getpid()} on {socket.gethostname()} since 20" in line
    assert ". Stop that process or wait for its end, or choose another --workdir." in line
    assert ("remove" in line) == (disk != "locks")
    first.release()
    first.release()
    assert not (workdir / NOTE).exists() and not (workdir / MARKER).exists()
    second = Owner(workdir)
    refused(workdir)
    second.release()


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(owner, "WAIT_S", 20)
    first = Owner(tmp_path)
    start = time.monotonic()
    threading.Timer(0.3, first.release).start()
    with caplog.at_level(logging.WARNING, "crate_jax"):
        Owner(tmp_path).release()
    assert 0.2 < time.monotonic() - start < 10
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.search(rf"belongs to process {os.getpid()} on .*; waiting 20 s for its end$", line)


def test_a_killed_owner_is_followed_at_once(tmp_path):
    holder = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        note = {"process": process.pid, "host": "here", "since": "today"}
        (tmp_path / NOTE).write_text(json.dumps(note))
        process.send_signal(signal.SIGSTOP)  # it lives
        assert f"belongs to process {process.pid} on here since today. " in refused(tmp_path)
        (tmp_path / NOTE).write_text("{")
        assert f"{tmp_path} belongs to another process. " in refused(tmp_path)
        process.kill()
        process.wait()
    start = time.monotonic()
    Owner(tmp_path).release()
    assert time.monotonic() - start < 0.2


def test_a_forked_child_does_not_own_what_its_parent_did(tmp_path):
    """As a worker that outlives a killed program."""
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from crate_jax.checkpoint.owner import Owner\n"
        "owner = Owner(Path(sys.argv[1]))\n"
        "if child := os.fork():\n"
        "    print(child, flush=True)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(100)\n"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(done.stdout.readline())
    try:
        assert done.wait() == -signal.SIGKILL
        os.kill(child, 0)  # it lives
        assert (tmp_path / NOTE).exists()
        Owner(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        done.stdout.close()


@pytest.mark.parametrize("disk", [errno.ENOLCK], indirect=True)
def test_without_locks_a_marker_counts_while_its_process_may_live(tmp_path, disk):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first = Owner(tmp_path)
    marker = tmp_path / MARKER
    pid, host, *rest = marker.read_text().splitlines()
    first.release()
    marker.write_text("\n".join([str(gone.pid), host]) + "\n")
    Owner(tmp_path).release()  # of this host, and dead
    marker.write_text("\n".join([pid, "elsewhere", *rest]) + "\n")
    assert f" If that has ended on another host, remove {marker}." in refused(tmp_path)
    marker.unlink()
    Owner(tmp_path).release()


def test_a_workdir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"^workdir must be writable; {tmp_path}/file/run is not \(Not a directory\)\. Mount"
    with pytest.raises(OSError, match=message):
        Owner(tmp_path / "file" / "run")


def test_a_full_disk_leaves_an_owner_without_a_name(tmp_path, monkeypatch):
    (tmp_path / NOTE).mkdir()  # as good as any reason why it cannot be written
    first = Owner(tmp_path)
    assert "belongs to another process" in refused(tmp_path)
    (tmp_path / NOTE).rmdir()
    first.release()


@pytest.mark.parametrize("agreed", [True, False])
def test_process_0_owns_for_all(tmp_path, monkeypatch, agreed):
    asked = []

    def all_agree(ok, *, wait_s):
        asked.append(ok)
        return ok and agreed

    monkeypatch.setattr(owner, "all_agree", all_agree)
    monkeypatch.setattr(owner.jax, "process_index", lambda: 1)
    if agreed:
        assert own_together(tmp_path) is None
    else:
        with pytest.raises(OSError, match=r"^workdir must be free for all processes; "):
            own_together(tmp_path)
    assert asked[0] is True and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(owner.jax, "process_index", lambda: 0)
    first, asked[:] = Owner(tmp_path), []
    with pytest.raises(OSError, match=r"^workdir must have one owner at a time; "):
        own_together(tmp_path)
    assert asked[0] is False
    first.release()


def test_a_checkpointer_that_writes_owns_and_one_that_reads_does_not(tmp_path):
    first = Checkpointer(tmp_path)
    first.save(1, {"step": jnp.int32(1)}, {})
    first.wait()
    under_way = tmp_path / FOLDER / "2.orbax-checkpoint-tmp"
    under_way.mkdir()
    with pytest.raises(OSError, match=rf"belongs to process {os.getpid()} on "):
        Checkpointer(tmp_path)
    assert under_way.is_dir()  # it is not for others to sweep
    assert [row["step"] for row in inspect(tmp_path)] == [1]
    first.close()
    assert [row["step"] for row in inspect(tmp_path)] == [1]
    assert not (tmp_path / NOTE).exists()
    again = Checkpointer(tmp_path)
    assert not under_way.exists()
    again.close()


@pytest.mark.parametrize(("name", "odd"), [("r[1]", "["), ("r*", "*"), ("r?", "?"), ("a\\b", "\\")])
def test_a_path_that_is_a_pattern_is_refused(tmp_path, name, odd):
    """Orbax would save there, find nothing of it, and say that all is well."""
    rule = f"workdir must have no {re.escape(odd)} in its path"
    for begin in (Checkpointer, lambda path: check_workdir(TrainConfig(), path)):
        with pytest.raises(ValueError, match=rule):
            begin(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["lr=0.1,0.2", "a b", "50%", "é", "#1", "a{b}", "a]b"])
def test_other_names_hold_what_is_saved(tmp_path, name):
    state = {"params": {"w": jnp.arange(3.0)}}
    with contextlib.closing(Checkpointer(tmp_path / name)) as writer:
        writer.save(1, state, {"step": 1})
    with contextlib.closing(Checkpointer(tmp_path / name, read_only=True)) as reader:
        found, _ = reader.restore(1, jax.eval_shape(lambda: state))
    assert found["params"]["w"].tolist() == [0, 1, 2]
