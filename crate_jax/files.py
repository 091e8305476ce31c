"""Paths as a person writes them, files that are written whole or not at all, and open files."""

import contextlib
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crate_jax.buckets import bucket_path, is_remote, store
from crate_jax.interrupts import ASIDE

# The number of open files that a process asks for if the system allows any number.
MOST_OPEN_FILES = 65_536

# Values that JSON can hold, by name: the record of a checkpoint, the result of a command.
Json = dict[str, Any]


def expanded(path: str | os.PathLike[str], name: str) -> str:
    """A path in which ``~`` or ``~USER`` at the start has become that home directory.

    Everything else stays as it is: ``gs://…``, and ``$VARIABLES``, which are the shell's.

    Args:
        path: the path of a flag, of a field of a config, or of a call.
        name: of that flag, field or argument, for the error.

    Raises:
        ValueError: there is no such user.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        # pathlib makes ~ of ./~, which would become the home directory when it is read again.
        return os.path.abspath(text) if str(Path(text)).startswith("~") else text
    found = os.path.expanduser(text)
    if found == text:
        raise ValueError(
            f"{name} must name a user's home after ~; got {text}. Correct the user's name, or "
            "give an absolute path."
        )
    return found


def located(path: str | os.PathLike[str], name: str, *, absolute: bool = False) -> Path:
    """A path as a person writes it, as pathlib's; a bucket's as epath's, with the same methods.

    Args:
        path: local, ``gs://…`` or ``s3://…``; ``~`` is the home directory.
        name: of the flag, field or argument, for the error.
        absolute: whether a local path is made absolute.

    Raises:
        ValueError: there is no such user, no such kind of bucket, or its package is missing.
    """
    text = expanded(path, name)
    if is_remote(text):
        return bucket_path(text, name)
    if kind := re.match(r"(gs|gcs|s3|hf|https?):/", text):
        raise ValueError(
            f"{name} must have two slashes after {kind[1]}:; got {text}, as pathlib makes of it. "
            "Give the address as text."
        )
    return Path(text).absolute() if absolute else Path(text)


def cache_folder() -> str:
    """The folder for files that can be made or fetched again.

    The folder is CRATE_JAX_CACHE, or ``crate_jax`` below XDG_CACHE_HOME, which is ~/.cache unless
    it is set.
    """
    if own := os.environ.get("CRATE_JAX_CACHE"):
        return expanded(own, "CRATE_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(expanded(base, "XDG_CACHE_HOME"), "crate_jax")


def check_writable(path: str | Path) -> None:
    """Refuse a path at which no file can be written, before there is anything to write.

    Args:
        path: the file to be; one that is there stays as it is. Of a bucket nothing is asked.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: the path itself is one.
        OSError: the folder takes no file.
    """
    path = located(path, "the file")
    if is_remote(path):
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} must lie in an existing folder; there is no {path.parent}. Make it first."
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file; it is a folder. Name a file in it.")
    aside = _aside(path)
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise OSError(
            f"{path.parent} must take files; it does not ({error.strerror}). Choose another path."
        ) from error


def check_folder(path: str | Path, name: str) -> None:
    """Refuse a folder in which no file can be written; it need not be there yet.

    Args:
        path: the folder; of a bucket nothing is asked.
        name: of the flag or argument, for the error.

    Raises:
        NotADirectoryError: a file is in its place, or in that of a folder above it.
        OSError: nothing can be written to it, or made where it is to be.
    """
    path = located(path, name, absolute=True)
    if is_remote(path):
        return
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} must be a folder; {there} is a file. Choose another.")
    check_writable(there / "any")


def _aside(path: Path) -> Path:
    """The path at which a local file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place if the block ends without an error.

    What was at ``path`` is untouched until then, and stays if the block fails. The file of a bucket
    is written on this machine and then stored, for a bucket has no file that grows.

    Args:
        path: the file to be; its folder exists, or is in a bucket, which needs none.

    Yields:
        The local path to write to; of a local file in the same folder.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: the path itself is one.
        OSError: the disk or the bucket does not take the file.
    """
    path = located(path, "the file")
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="crate_jax_") as folder:
            aside = Path(folder) / path.name
            yield aside
            store(aside, path)
        return
    check_writable(path)
    aside = _aside(path)
    ASIDE.add(str(aside))
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        ASIDE.discard(str(aside))


def raise_open_files() -> int:
    """Raise this process's limit of open files as far as it may, and return it.

    The soft limit, often 1,024, guards programs that `select` on files. Processes that are started
    afterwards inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_OPEN_FILES
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if most > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError):  # macOS allows fewer than it says
            return soft
    return max(soft, most)


def check_open_files(needed: int, why: str) -> None:
    """Refuse a limit of open files that is too low even when it is raised.

    Raises:
        OSError: fewer than `needed` files may be open.
    """
    if (limit := raise_open_files()) < needed:
        raise OSError(
            f"ulimit -n must be at least {needed} {why}; got {limit}. Raise it by ulimit -n "
            f"{needed}; only an administrator raises the hard limit."
        )
