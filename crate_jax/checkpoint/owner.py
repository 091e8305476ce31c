"""The owner of a run's directory: one process at a time, or all processes of one run.

The lock is the operating system's (flock), which frees it when its process ends, however that ends.
Where a file system has none, a file that names its process stands in: on the same host it counts
only as long as that process lives, and on another host until somebody removes it. Readers take no
lock. What a dead owner leaves behind harms nobody. In a bucket a `Lease` takes the lock's place.
"""

import contextlib
import errno
import json
import logging
from pathlib import Path

import jax
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from crate_jax.buckets import is_remote
from crate_jax.checkpoint.folder import check_path
from crate_jax.checkpoint.lease import Lease, described, introduction, taken
from crate_jax.parallel import all_agree

LOCK, MARKER, NOTE = ".owner.lock", ".owner.marker", ".owner.json"
# Seconds: for an owner that may be about to end; for the other processes of the run.
WAIT_S, TOGETHER_S, GOODBYE_S = 5.0, 3600, 10
# The errors of a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

_log = logging.getLogger("crate_jax")


class Owner:
    """The ownership of a workdir by this process, until `release` or its end.

    Args:
        workdir: the run's directory, made if need be.

    Raises:
        OSError: another process owns it, and goes on to; or it cannot be written to.
    """

    def __init__(self, workdir: Path):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = _lock(workdir)
        except OSError as error:
            raise OSError(
                f"workdir must be writable; {workdir} is not ({error.strerror or error}). "
                "Mount or mend it, or choose another --workdir."
            ) from error
        if lock is None:
            raise _taken(workdir)
        self._lock, self._note = lock, workdir / NOTE
        with contextlib.suppress(OSError):  # where the disk is full, the lock holds without it
            self._note.write_text(json.dumps(introduction()) + "\n")

    def check(self) -> None:
        """Do nothing: the system's lock stays until it is released. A `Lease` may be lost."""

    def release(self) -> None:
        """Let others in."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # a note without a lock harms nobody
                self._note.unlink(missing_ok=True)
            self._lock.release()


def own_together(workdir: Path) -> Owner | Lease | None:
    """Make all processes of this run owners: process 0 takes the lock, or all of them stop.

    Returns:
        The owner on process 0, which releases it; None on the others.

    Raises:
        OSError: see `Owner`, on every process.
        ValueError: see `check_path`, likewise.
    """
    check_path(workdir)
    owner = failure = None
    if jax.process_index() == 0:
        try:
            owner = (Lease if is_remote(workdir) else Owner)(workdir)
        except OSError as error:
            failure = error
    if all_agree(failure is None, wait_s=TOGETHER_S):
        return owner
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        all_agree(True, wait_s=GOODBYE_S)  # process 0 ends last: without it nobody hears why
    raise failure or OSError(
        f"workdir must be free for all processes; {workdir} is not for process 0. See its error."
    )


def _lock(workdir: Path) -> BaseFileLock | None:
    """A lock that is held: the system's, or where it has none a marker; None if others hold it."""
    try:
        return _held(FileLock(workdir / LOCK, thread_local=False, fallback_to_soft=False), workdir)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return _held(SoftFileLock(workdir / MARKER, thread_local=False), workdir)


def _held(lock: BaseFileLock, workdir: Path) -> BaseFileLock | None:
    """The lock once it is held; None if it is not to be had within `WAIT_S`."""
    try:
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        _log.warning("%s belongs to %s; waiting %g s for its end", workdir, _who(workdir), WAIT_S)
    try:
        lock.acquire(timeout=WAIT_S)
        return lock
    except Timeout:
        return None


def _who(workdir: Path) -> str:
    """The owner in words."""
    return described(_note(workdir))


def _note(workdir: Path) -> object:
    """The note that the owner has left of itself; None if it had no time to write one."""
    try:
        return json.loads((workdir / NOTE).read_text())
    except (OSError, ValueError):
        return None


def _taken(workdir: Path) -> OSError:
    marker = workdir / MARKER
    gone = f" If that has ended on another host, remove {marker}." if marker.exists() else ""
    return taken(workdir, _note(workdir), gone)
