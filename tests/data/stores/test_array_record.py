"""array_record files: how many are open at once, and what their errors mean."""

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest
from stored import write_folder

from crate_jax.config import DataConfig
from crate_jax.data.stores import array_record
from crate_jax.data.stores.array_record import Readers
from crate_jax.data.stores.prepare import prepare
from crate_jax.data.stores.sources import open_source

FILES = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of forty files of two examples."""
    root = tmp_path_factory.mktemp("many")
    files = {f"{'ab'[i % 2]}/{i:02d}.png": b"%d" % i for i in range(2 * FILES)}
    write_folder(root / "from", "train", files)
    prepare(str(root / "from"), str(root), name="many", shard_examples=2)
    return root


def examples(root, split="train"):
    data = DataConfig(dataset="many", data_dir=str(root))
    return open_source(data, split, image_shape=(1, 1, 3), num_classes=None).examples


def open_files():
    """How many files of such data sets this process has open."""
    links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
    return sum("array_record" in os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="a folder of Linux")
def test_open_files_are_bounded(root):
    gc.collect()
    found, before = examples(root), open_files()
    found.examples.readers._most = 5
    order = np.random.default_rng(0).permutation(len(found)).tolist() * 2
    read = [found[i]["image"] for i in order]
    assert before < open_files() <= before + 5
    whole = {i: found[i]["image"] for i in range(len(found))}
    assert sorted(whole.values()) == sorted(b"%d" % i for i in range(2 * FILES))
    assert read == [whole[i] for i in order]
    found = None  # with the examples go the files
    gc.collect()
    assert open_files() == before


def test_a_part_of_a_split(root):
    whole, part = examples(root), examples(root, "train[31:58]")
    assert len(part) == 27
    assert [part[i] for i in range(27)] == [whole[i] for i in range(31, 58)]
    assert [e["image"] for e in part] == [part[i]["image"] for i in range(27)]


def test_readers_know_the_limit_of_their_process(monkeypatch):
    monkeypatch.setattr(array_record, "raise_open_files", lambda: 1024)
    assert Readers()._most == 341


def test_a_limit_that_is_too_low_is_named(root, monkeypatch):
    monkeypatch.setattr(array_record, "raise_open_files", lambda: 100)
    monkeypatch.setattr("crate_jax.files.raise_open_files", lambda: 100)
    message = r"ulimit -n must be at least 160 to read the 40 files of many/train; got 100\. Raise"
    with pytest.raises(OSError, match=message):
        examples(root)
    assert len(examples(root, "train[:50%]")) == FILES  # a third may be open


@pytest.mark.parametrize(
    "text, code",
    [
        ("open() failed: Too many open files; opening x", errno.EMFILE),
        ("pread() failed: Stale file handle; reading x; at byte 7", errno.ESTALE),
        ("read() failed: Input/output error; reading x", errno.EIO),
        ("open() failed: Permission denied; opening x", errno.EACCES),
        ("pread() failed: Something new; reading x", errno.EIO),
    ],
)
def test_errors_of_the_system_by_their_text(text, code):
    found = array_record._explained(RuntimeError(text), "x")
    assert (type(found), found.errno, found.filename) == (type(OSError(code, "")), code, "x")


def test_what_the_library_says_of_files_that_it_cannot_read(root, tmp_path):
    """Of real files, so that other texts of a newer array_record are seen."""
    path = sorted((root / "many/1.0.0").glob("*array_record*"))[0]
    readers = Readers()
    with pytest.raises(FileNotFoundError):
        readers.read(str(tmp_path / "none"), 0)
    with pytest.raises(IsADirectoryError):
        readers.read(str(tmp_path), 0)
    with pytest.raises(ValueError, match=r"is damaged: index 2 out of bound 2"):
        readers.read(str(path), 2)
    damaged = tmp_path / "damaged"
    data = bytearray(path.read_bytes())
    damaged.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=f"{damaged} is damaged: "):
        readers.read(str(damaged), 0)
    damaged.write_bytes(data)  # restored: it is opened anew
    assert readers.read(str(damaged), 0) == readers.read(str(path), 0)


def test_a_descriptor_that_is_lost_is_the_systems(root):
    found = examples(root)
    first = found[0]
    (own,) = [
        fd
        for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}") == os.path.realpath(found.examples.paths[0])
    ]
    os.close(int(own))
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        found[1]
    assert caught.value.errno == errno.EBADF
    assert found[0] == first  # the next attempt opens the file again
