"""The needs of a run: devices, memory, shared memory; and the settings of JAX to run under.

Libraries say a lack of these by errors of many kinds; here they become one sentence with a remedy.
"""

import os
import re

import jax

from crate_jax.buckets import is_of_service
from crate_jax.errors import first_line

SHARED_MEMORY = "/dev/shm"  # through which the loader's workers hand over batches, on Linux

# Messages of XLA, CUDA and C++ for short memory.
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|bad_alloc|[Oo]ut of memory")
# The same message of the loader of shared libraries.
_NO_ROOM = re.compile(r"failed to map segment|[Cc]annot allocate memory")
# Grain's message that the system ended a worker, with the signal.
_DEAD_WORKER = re.compile(r"Worker process was terminated unexpectedly with exit code -(\d+)")


def explained(error: Exception) -> str | None:
    """The meaning of a library's error for the machine, with a remedy; None if it is a bug."""
    if lacks_memory(error):
        return (
            f"the program must fit into memory; it does not ({first_line(error)}). Lower the batch "
            "size, end other programs, or take a machine with more."
        )
    if is_of_service(error):
        return (
            f"the bucket must answer; it did not ({type(error).__name__}: {first_line(error)}). "
            "Check the network and the credentials, and run again."
        )
    if not isinstance(error, RuntimeError | AssertionError):
        return None
    if found := _DEAD_WORKER.search(str(error)):
        return _worker_ended(int(found[1]))
    if "can't start new thread" in str(error):
        return (
            "the system must let this program start threads; it refused one. Raise ulimit -u and "
            "-v, or the container's --pids-limit, or lower --config.data.num_threads."
        )
    if "Disallowed " in str(error):
        return _forbidden_transfers()
    return _no_device(error)


def lacks_memory(error: Exception) -> bool:
    """True if this process or a device is short of memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return bool(_NO_MEMORY.search(str(error)))
    if isinstance(error, ImportError):
        return bool(_NO_ROOM.search(str(error)))
    return isinstance(error, MemoryError)


def check_settings() -> None:
    """Refuse settings of JAX under which no run and no command can work.

    Raises:
        ValueError: a setting forbids what every set-up does.
    """
    if guarded := _forbidden_transfers():
        raise ValueError(guarded)
    if jax.config.values["jax_disable_jit"]:
        raise ValueError(
            "JAX_DISABLE_JIT must be unset; a step that is not compiled takes minutes. "
            "Unset it, and look inside with jax.debug.print or JAX_DEBUG_NANS=1."
        )


def check_shared_memory(need: int) -> None:
    """Refuse to start workers that would be killed for want of shared memory.

    Args:
        need: bytes of all that workers and this process hold there together.

    Raises:
        ValueError: less is free; the remedies are named.
    """
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system without it keeps such memory elsewhere, without a limit
        return
    free = found.f_bavail * found.f_frsize
    if free < need:
        mib = -(-need // 2**20)
        raise ValueError(
            f"{SHARED_MEMORY} must have {mib} MiB free for data.num_workers; it has "
            f"{free // 2**20} MiB. Start the container with --shm-size={-(-2 * mib // 1024)}g, "
            "lower --config.data.prefetch_mib, or set --config.data.num_workers=0."
        )


def check_memory(need: int, what: str, remedy: str) -> None:
    """Refuse arrays that this machine cannot hold; the system would end the process without a word.

    Args:
        need: bytes.
        what: they are for.
        remedy: a sentence.

    Raises:
        ValueError: the machine has less memory, used or free.
    """
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > has:
        raise ValueError(
            f"{what} must fit into memory, {has / 2**30:.0f} GiB here; it takes "
            f"{need / 2**30:.0f} GiB. {remedy}"
        )


def _worker_ended(signal: int) -> str | None:
    """The reason why the system ended a worker of the loader; None if it was not memory."""
    if signal == 7:  # SIGBUS: a page of shared memory that cannot be had
        return (
            f"{SHARED_MEMORY} must hold the batches of data.num_workers; a worker was ended for "
            "want of room. Start the container with a larger --shm-size, lower "
            "--config.data.prefetch_mib, or set --config.data.num_workers=0."
        )
    if signal == 9:
        return (
            "memory must hold the workers of the loader; the system killed one. Lower "
            "--config.data.num_workers or --config.data.prefetch_mib, or raise the job's limit."
        )
    return None


def _forbidden_transfers() -> str | None:
    """The setting that forbids the transfers with which every program starts; None if none does."""
    for ending in ("", "_host_to_device", "_device_to_device", "_device_to_host"):
        name = f"jax_transfer_guard{ending}"
        value = jax.config.values.get(name)
        if value in ("disallow", "disallow_explicit"):
            return (
                f"{name.upper()} must be allow or log; got {value}, and every program starts with "
                "transfers. Unset it: the training loop is always under disallow."
            )
    return None


def _no_device(error: Exception) -> str | None:
    """The reason for which JAX finds no device; None if it finds one, and the error is another."""
    if "Unable to initialize backend" not in (reason := str(error)):
        try:
            jax.devices()
            return None
        except Exception as again:
            reason = str(again)  # nothing, of an AssertionError
    asked = jax.config.values["jax_platforms"] or "nothing set"
    said = first_line(error).partition(" (set JAX_PLATFORMS")[0]  # whose remedy is another
    detail = f" ({said})" if reason else ""
    return (
        f"JAX_PLATFORMS must name devices that this machine has; JAX finds none with {asked}"
        f"{detail}. Set JAX_PLATFORMS=cpu to run on the CPU, or unset it. A GPU needs its driver "
        "and pip install 'crate-jax[cuda]', a TPU pip install 'crate-jax[tpu]'."
    )
