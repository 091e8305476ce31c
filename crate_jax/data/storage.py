"""Files here or in a bucket: paths may be local, ``gs://…`` or ``s3://…`` (by fsspec)."""

import contextlib
import functools
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crate_jax.files import written_aside

# Needed besides fsspec for each kind of bucket.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def is_remote(path: str) -> bool:
    """Whether a path is a bucket's."""
    return "://" in path


@functools.lru_cache
def filesystem(protocol: str) -> Any:
    """The fsspec file system of a protocol.

    Raises:
        ValueError: its package is not installed, or there is no such protocol.
    """
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}." if package else "Use gs://, s3:// or a local path."
        raise ValueError(f"{protocol}:// must be reachable; {error}. {remedy}") from error


def _remote(path: str) -> Any:
    return filesystem(path.partition("://")[0])


def is_folder(path: str) -> bool:
    """Whether there is a folder at a path."""
    return _remote(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def join(folder: str, *parts: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *parts])


def list_folder(path: str) -> dict[str, bool]:
    """Names in a folder, sorted, and whether each is a folder itself."""
    if is_remote(path):
        entries = _remote(path).ls(path, detail=True)
        names = {
            e["name"].rstrip("/").rpartition("/")[2]: e["type"] == "directory" for e in entries
        }
    else:
        names = {entry.name: entry.is_dir() for entry in os.scandir(path)}
    return dict(sorted(names.items()))


def find_files(folder: str) -> list[str]:
    """Paths of all files anywhere below a folder, relative to it, sorted by their parts."""
    if is_remote(folder):
        fs = _remote(folder)
        root = fs._strip_protocol(folder).rstrip("/") + "/"
        found = [name.removeprefix(root) for name in fs.find(folder)]
    else:
        found = [
            os.path.relpath(os.path.join(place, name), folder)
            for place, _, names in os.walk(folder, followlinks=True)
            for name in names
        ]
    return sorted(found, key=lambda name: name.split("/"))


def file_size(path: str) -> int:
    """Bytes of a file."""
    return _remote(path).size(path) if is_remote(path) else os.path.getsize(path)


def open_binary(path: str) -> BinaryIO:
    """A file opened for reading in order."""
    if is_remote(path):
        return _remote(path).open(path, "rb", block_size=8 * 2**20, cache_type="readahead")
    return open(path, "rb")


def read_bytes(path: str, start: int = 0, length: int | None = None) -> bytes:
    """Part of a file, or all of it; shorter where the file ends.

    The file is opened for each read: a data set of a thousand shards would else reach the limit of
    open files, and copies in worker processes have no file to share.
    """
    if is_remote(path):
        end = None if length is None else start + length
        return _remote(path).cat_file(path, start=start, end=end)
    with open(path, "rb", buffering=0) as file:
        if start:
            file.seek(start)
        return file.read(-1 if length is None else length) or b""


def cached_index(
    files: Mapping[str, int],
    beside: str,
    index_dir: str | None,
    build: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Arrays that are costly to find out, kept in a file for the next time.

    The file lies in `index_dir`; else beside the data; else, where that is read-only or a bucket,
    in the user's cache folder. It is used as long as the data files have the sizes they had.

    Args:
        files: the data files that the arrays describe, and their sizes in bytes.
        beside: the folder of the data.
        index_dir: a folder of the user's choice, or None.
        build: finds the arrays out.

    Returns:
        The arrays.
    """
    described = repr(sorted(files.items())).encode()
    name = f".crate_jax_index_{zlib.crc32(described):08x}_{zlib.adler32(described):08x}.npz"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = [index_dir] if index_dir else [beside, os.path.join(home, "crate_jax", "indices")]
    folders = [Path(folder) for folder in chosen if not is_remote(folder)]
    for folder in folders:
        # A damaged index is found out again.
        with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile):
            data = (folder / name).read_bytes()
            if data:
                with np.load(io.BytesIO(data)) as arrays:
                    return {key: arrays[key] for key in arrays.files}
    arrays = build()
    for folder in folders:
        with contextlib.suppress(OSError):
            if folder != Path(beside):
                folder.mkdir(parents=True, exist_ok=True)
            with written_aside(folder / name) as aside, aside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            break
    return arrays
