"""A run in a bucket has one owner at a time, and none for much longer than it lives."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from command import environment

from crate_jax.buckets import create
from crate_jax.checkpoint import lease
from crate_jax.checkpoint.lease import Lease
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.files import located

OWN = """
import sys, time
from crate_jax.checkpoint.lease import Lease
from crate_jax.files import located
lease = Lease(located(sys.argv[1], "workdir"))
print("owner", flush=True)
time.sleep(100)
"""


@pytest.fixture
def workdir(bucket):
    return located(bucket, "workdir")


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    for name, seconds in {"BEAT_S": 0.2, "STALE_S": 4.0, "LOOK_S": 0.1, "WAIT_S": 0.5}.items():
        monkeypatch.setattr(lease, name, seconds)


def note(workdir, number):
    return json.loads((workdir / ".owner" / f"{number}.json").read_text())


def numbers(workdir):
    return sorted(path.name for path in (workdir / ".owner").iterdir())


def test_the_second_is_refused_by_name_and_the_third_is_not(workdir):
    first = Lease(workdir)
    message = (
        rf"^workdir must have one owner at a time; {workdir} belongs to process {os.getpid()} on "
        rf"{socket.gethostname()} since 20.*\. Stop that process or wait for its end, or choose"
    )
    with pytest.raises(OSError, match=message):
        Lease(workdir)
    first.check()
    first.release()
    first.release()
    start = time.monotonic()
    second = Lease(workdir)
    assert time.monotonic() - start < lease.STALE_S
    assert numbers(workdir) == ["2.json"]
    second.release()


def test_an_owner_that_is_about_to_end_is_waited_for(workdir, monkeypatch):
    monkeypatch.setattr(lease, "WAIT_S", 20)
    first = Lease(workdir)
    threading.Timer(0.3, first.release).start()
    start = time.monotonic()
    Lease(workdir).release()
    assert time.monotonic() - start < 15


def test_a_killed_owner_of_this_machine_is_followed_at_once(workdir, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 200)
    command = [sys.executable, "-c", OWN, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout.readline() == "owner\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    start = time.monotonic()
    Lease(workdir).release()
    assert time.monotonic() - start < 20


def test_an_owner_elsewhere_is_followed_once_it_is_silent_and_then_saves_no_more(
    workdir, monkeypatch
):
    """As a machine that is gone, and one that was only asleep."""
    monkeypatch.setattr(lease, "_place", lambda: {"where": "elsewhere", "started": "1"})
    monkeypatch.setattr(lease, "BEAT_S", 1000)
    first = Checkpointer(workdir)
    monkeypatch.undo()
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    start = time.monotonic()
    second = Lease(workdir)
    assert time.monotonic() - start >= 1
    message = rf"^workdir must have one owner at a time; {workdir} belongs to process {os.getpid()}"
    with pytest.raises(ValueError, match=message):
        first.save(1, {}, {})
    second.check()
    second.release()
    first.close()


def test_a_bucket_that_lets_nobody_write(workdir, monkeypatch):
    def refuse(path, data):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(lease, "create", refuse)
    message = rf"^workdir must be writable; {workdir} is not \(PermissionError: Access Denied\)\. "
    with pytest.raises(OSError, match=message):
        Lease(workdir)


def test_an_owner_whose_bucket_does_not_answer_saves_nothing(workdir, monkeypatch):
    def fail(folder):
        raise TimeoutError

    owner = Lease(workdir)
    monkeypatch.setattr(lease, "_newest", fail)
    with pytest.raises(OSError, match=r"\.owner must be reachable; it is not \(TimeoutError: "):
        owner.check()
    owner.release()


def test_of_many_at_once_one_gets_a_number(workdir):
    path = workdir / "one"
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: create(path, b"%d" % i), range(8)))
    assert written.count(True) == 1
    assert path.read_text() == str(written.index(True))


def test_a_note_that_is_damaged_is_waited_for_and_followed(workdir, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    (workdir / ".owner" / "7.json").write_text("{")
    (workdir / ".owner" / "what.txt").write_text("")
    Lease(workdir).release()
    assert numbers(workdir) == ["8.json", "what.txt"]
    assert note(workdir, 8)["ended"] is True
