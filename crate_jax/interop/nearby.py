"""Weights in a bucket, copied to this machine; runs and trees of Orbax are read where they are."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from crate_jax.buckets import fetch, is_remote, version
from crate_jax.interop.folders import pieces, weights_file


@contextlib.contextmanager
def nearby(path: Path) -> Iterator[Path]:
    """A file of weights on this machine, its pieces beside it; what is local stays as it is.

    Errors about the copy name the path that was asked for.

    Args:
        path: of a file, or of a folder with one; no run, and no tree of Orbax.

    Raises:
        OSError: the bucket's service fails.
        ValueError: a folder has no weights.
    """
    if not is_remote(path):
        yield path
        return
    first = weights_file(path) if path.is_dir() else path
    files = (first, *(pieces(first) if first.name.endswith(".index.json") else ()))
    here = _copy(files, tuple(map(version, files)))
    try:
        yield here
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(str(error).replace(os.fspath(here.parent), os.fspath(first.parent))) from error


@functools.lru_cache(1)  # the names of the classes are read apart from the weights
def _copy(files: tuple[Path, ...], versions: tuple[str, ...]) -> Path:
    """The copy of the first of some files; it lasts as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="crate_jax_")
    _FOLDERS.append(folder)
    for file in files:
        fetch(file, Path(folder.name) / file.name)
    return Path(folder.name) / files[0].name


_FOLDERS: list["tempfile.TemporaryDirectory[str]"] = []  # each is removed with its object
