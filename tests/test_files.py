"""Files written whole or not at all."""

import os
import resource
from pathlib import Path

import pytest

from crate_jax.files import check_open_files, check_writable, raise_open_files, written_aside


def test_the_new_takes_the_place_of_the_old_at_the_end(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert aside.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_a_failure_leaves_the_old_and_nothing_else(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), written_aside(path) as aside:
        aside.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_a_folder_in_its_place(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="must be a file; it is a folder"),
        written_aside(tmp_path),
    ):
        raise AssertionError("nothing to write to")


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="must lie in an existing folder; there is no"),
        written_aside(tmp_path / "no" / "weights.npz"),
    ):
        raise AssertionError("nothing to write to")


@pytest.fixture
def limits(monkeypatch):
    """The limits of open files of a process of which all else is this one."""
    found = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: found["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: found.update(now=pair))
    return found


@pytest.mark.parametrize(
    "before, after, limit",
    [
        ((1024, 4096), (4096, 4096), 4096),
        ((4096, 4096), (4096, 4096), 4096),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY), 65_536),
        ((256, 2**20), (65_536, 2**20), 65_536),
        ((2**20, 2**20), (2**20, 2**20), 2**20),
        ((resource.RLIM_INFINITY,) * 2, (resource.RLIM_INFINITY,) * 2, 65_536),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(limits, before, after, limit):
    limits["now"] = before
    assert (raise_open_files(), limits["now"]) == (limit, after)


def test_a_system_that_does_not_raise_the_limit(limits, monkeypatch):
    def refuse(kind, pair):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_open_files() == 1024


def test_a_limit_of_open_files_that_is_too_low(limits):
    check_open_files(4096, "for nothing")
    message = r"ulimit -n must be at least 4097 with two workers; got 4096\. Raise it by ulimit -n"
    with pytest.raises(OSError, match=message):
        check_open_files(4097, "with two workers")


def test_what_may_be_written_is_known_before_there_is_anything_to_write(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    line = rf"^{tmp_path} must take files; it does not \(No such file or dir.*\)\. Choose another"
    with monkeypatch.context() as patched, pytest.raises(OSError, match=line):
        patched.setattr(Path, "touch", lambda path: os.stat(path.parent / "nothing"))
        check_writable(path)
    began = False
    with (
        pytest.raises(OSError, match="File name too long"),
        written_aside(tmp_path / ("a" * 250)),
    ):
        began = True
    assert not began
