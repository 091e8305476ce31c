"""The loader's worker processes: their needs, and their end."""

import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading

from crate_jax.files import check_open_files
from crate_jax.machine import check_shared_memory

_log = logging.getLogger("crate_jax")


def end_with_parent(worker_index: int, worker_count: int) -> None:
    """Let a worker end when its program is killed, and only then.

    It would wait for ever to hand over a batch. Ctrl-C, the SIGHUP of a terminal that goes, and the
    SIGTERM of many schedulers reach all processes; they are the program's to act on, which needs
    its workers to end the step.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has not all
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_ready(workers: int, need: int) -> None:
    """Do the work that Grain needs before a program starts workers.

    It reads an absl flag, also where a program uses none. And it leaves batches that workers have
    ready when they end to Python's resource tracker, which frees them, but says so.

    Args:
        workers: their number.
        need: bytes of shared memory that are filled at most.

    Raises:
        ValueError: less is free.
        OSError: too few files may be open.
    """
    check_shared_memory(need)
    check_open_files(64 + 32 * workers, f"with data.num_workers={workers}")
    warn_of_many(workers, _cores())
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    quiet = "ignore:resource_tracker:UserWarning"
    if quiet not in sys.warnoptions:  # which multiprocessing hands to the tracker
        sys.warnoptions.append(quiet)


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have it not
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache  # a run has a loader for training, and one for each evaluation
def warn_of_many(workers: int, cores: int) -> None:
    """Log, once, that workers are more than twice the cores: each takes seconds of one to start."""
    if workers > 2 * cores:
        _log.warning(
            "data.num_workers is %d, and this machine has %d core%s: the first batch will come "
            "late. Set --config.data.num_workers=%d.",
            workers,
            cores,
            "" if cores == 1 else "s",
            cores,
        )
