"""What the machine does not give is named in one line, with what to do about it."""

import contextlib
import os
import types

import jax
import numpy as np
import pytest

from crate_jax import machine
from crate_jax.config import DataConfig
from crate_jax.data.loader import Batches, eval_batches, train_batches
from crate_jax.machine import check_memory, check_settings, check_shared_memory, explained

XLA = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError("std::bad_alloc"), True),
        (MemoryError(), True),
        (XLA("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), True),
        (XLA("INTERNAL: Failed to compile: std::bad_alloc"), True),
        (XLA("UNKNOWN: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (XLA("INTERNAL: Check failed"), False),
        (ValueError("Out of memory"), False),
        (ImportError("cv2.abi3.so: failed to map segment from shared object"), True),
        (ImportError("cannot import name 'x'"), False),
        (IndexError(), False),
    ],
    ids=repr,
)
def test_too_little_memory(error, lacking):
    line = explained(error)
    if not lacking:
        assert line is None
    else:
        assert line.startswith("the program must fit into memory; it does not (")
        assert "Lower the batch size" in line and "\n" not in line


@pytest.mark.parametrize(
    ("code", "start"),
    [
        (-7, "/dev/shm must hold the batches of data.num_workers"),
        (-9, "memory must hold the workers of the loader"),
        (-11, None),
        (1, None),
    ],
)
def test_a_worker_that_the_system_ended(code, start):
    line = explained(
        RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search")
    )
    assert (line is None) if start is None else line.startswith(start)


def test_a_thread_that_cannot_be_started():
    assert "Raise ulimit -u and -v" in explained(RuntimeError("can't start new thread"))
    assert explained(RuntimeError("another")) is None


def test_a_device_that_is_not_there(monkeypatch):
    def backends():
        raise AssertionError  # so does JAX for JAX_PLATFORMS=cuda without a GPU

    assert explained(AssertionError()) is None  # a bug, since there are devices
    monkeypatch.setattr(jax, "devices", backends)
    line = explained(AssertionError())
    assert line.startswith("JAX_PLATFORMS must name devices that this machine has; ")
    assert "JAX finds none with cpu" in line and "Set JAX_PLATFORMS=cpu" in line
    words = "Unable to initialize backend 'tpu': no libtpu.so. (set JAX_PLATFORMS='' to choose)"
    line = explained(RuntimeError(words))
    assert "(Unable to initialize backend 'tpu': no libtpu.so.)" in line
    assert explained(KeyError("x")) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (jax.transfer_guard("disallow"), "JAX_TRANSFER_GUARD must be allow or log; got disallow"),
        (jax.transfer_guard_host_to_device("disallow_explicit"), "_TO_DEVICE must be allow or log"),
        (jax.disable_jit(), "JAX_DISABLE_JIT must be unset"),
    ],
)
def test_settings_that_nothing_works_under(setting, message):
    check_settings()
    with setting, pytest.raises(ValueError, match=message):
        check_settings()


def test_a_transfer_that_the_user_forbids_is_no_bug():
    error = XLA("INVALID_ARGUMENT: Disallowed host-to-device transfer: x")
    assert explained(error) is None
    with jax.transfer_guard("disallow"):
        assert "JAX_TRANSFER_GUARD must be allow or log" in explained(error)


@pytest.fixture
def small_shared_memory(monkeypatch):
    """Docker's 64 MiB, of which 60 are free."""
    found = types.SimpleNamespace(f_bavail=15360, f_frsize=4096)
    monkeypatch.setattr(machine.os, "statvfs", lambda path: found)


def test_shared_memory_must_hold_what_workers_hand_over(small_shared_memory, monkeypatch):
    check_shared_memory(60 * 2**20)
    message = (
        r"/dev/shm must have 61 MiB free for data\.num_workers; it has 60 MiB\. Start the "
        r"container with --shm-size=1g, lower --config\.data\.prefetch_mib, or set "
        r"--config\.data\.num_workers=0\."
    )
    with pytest.raises(ValueError, match=message):
        check_shared_memory(60 * 2**20 + 1)

    def nothing_there(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", nothing_there)
    check_shared_memory(2**60)


def test_what_no_memory_here_can_hold(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.get)
    check_memory(4 * 2**30, "a graph", "Take less.")
    message = r"^a graph must fit into memory, 4 GiB here; it takes 5 GiB\. Take less\.$"
    with pytest.raises(ValueError, match=message):
        check_memory(5 * 2**30, "a graph", "Take less.")


class Large:
    """Rows of 4 MiB."""

    name = "large/train"

    @property
    def shapes(self):
        return {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}

    def __len__(self):
        return 64

    def row(self, index, rng):
        return {"x": np.zeros(2**20, np.float32)}


def test_the_loader_asks_before_it_starts_workers(small_shared_memory):
    """Two workers hand over four batches of 8 rows each, 256 MiB; so do those of an evaluation."""
    options = dict(batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"/dev/shm must have 512 MiB free .* it has 60 MiB"):
        train_batches(Large(), DataConfig(num_workers=2, prefetch_mib=4096), **options)
    train_batches(Large(), DataConfig(num_workers=1, prefetch_mib=16), **options).close()
    with contextlib.closing(train_batches(Large(), DataConfig(prefetch_mib=1), **options)) as found:
        assert next(found)["x"].shape == (8, 2**20)  # of pieces of one row


def test_an_evaluation_is_not_refused_in_the_midst_of_a_run(small_shared_memory):
    """Training has asked for its room, of which its own loader may hold the half by then."""
    data = DataConfig(num_workers=2, prefetch_mib=4096)
    with pytest.raises(ValueError, match="/dev/shm must have 512 MiB free"):
        train_batches(Large(), data, batch_size=8, seed=0)
    with contextlib.closing(eval_batches(Large(), data, batch_size=8)) as found:
        assert isinstance(found, Batches) and found.skipped == 0


def test_a_bucket_that_does_not_answer_is_no_bug():
    from botocore.exceptions import NoCredentialsError

    said = machine.explained(NoCredentialsError())
    assert said == (
        "the bucket must answer; it did not (NoCredentialsError: Unable to locate credentials). "
        "Check the network and the credentials, and run again."
    )
