"""Files here or in a bucket: paths may be local, ``gs://…`` or ``s3://…`` (by fsspec).

fsspec reads local files too, but slowly. It takes 58 instead of 29 µs for a file of 110 kB, and
490 instead of 110 ms to list 20,000 files (one core, from memory). It passes over folders that
cannot be read, and does not follow links. Hence `os` serves local paths.
"""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crate_jax.buckets import filesystem, is_remote
from crate_jax.config import DataConfig, did_you_mean
from crate_jax.files import cache_folder, expanded, written_aside

# The version of an index's arrays; another number makes them all anew.
INDEX_VERSION = 2


def _remote(path: str) -> Any:
    return filesystem(path.partition("://")[0], cached=True)


def is_folder(path: str) -> bool:
    """True if there is a folder at a path."""
    return _remote(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def data_folder(data: DataConfig) -> str:
    """``data.data_dir``, which exists.

    Raises:
        ValueError: it is not set.
        FileNotFoundError: it does not exist.
    """
    if data.data_dir is None:
        raise ValueError(
            f"data.data_dir must be set for a {data.dataset}. Set --config.data.data_dir=ROOT."
        )
    folder = expanded(data.data_dir, "data.data_dir")
    if not is_folder(folder):
        raise FileNotFoundError(
            f"data.data_dir must be an existing directory; got {folder}. "
            "Set --config.data.data_dir, or --data_dir beside --dataset."
        )
    return folder


def unknown_split(rule: str, split: str, known: Iterable[str]) -> FileNotFoundError:
    """The error of a split that is not there. It names the splits that are, and the flags."""
    names = list(known)
    near = did_you_mean(split, names) if names else "There is none."
    return FileNotFoundError(
        f"split must be {rule}; got {split}. {near} "
        "Set --config.data.train_split and --config.data.eval_split, or --split."
    )


def join(folder: str, *parts: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *parts])


def list_folder(path: str) -> dict[str, bool]:
    """Names in a folder that are not hidden (``.name``), sorted, and whether each is a folder.

    Raises:
        FileNotFoundError: a symbolic link leads nowhere.
    """
    if is_remote(path):
        entries = _remote(path).ls(path, detail=True)
        names = {
            e["name"].rstrip("/").rpartition("/")[2]: e["type"] == "directory" for e in entries
        }
    else:
        with os.scandir(path) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        names = {entry.name: _is_dir(entry) for entry in visible}
    return {name: names[name] for name in sorted(names) if not name.startswith(".")}


def list_subfolders(path: str) -> list[str]:
    """Names of the folders in a folder, as `list_folder` has them."""
    return [name for name, is_dir in list_folder(path).items() if is_dir]


def find_files(folder: str) -> list[str]:
    """Paths of all files anywhere below a folder, relative to it, sorted by their parts.

    Hidden files and folders (``.name``) are left out, symbolic links followed.

    Raises:
        OSError: a folder cannot be read, or a symbolic link leads nowhere.
        ValueError: a symbolic link leads back to a folder that it is in.
    """
    if is_remote(folder):
        fs = _remote(folder)
        root = fs._strip_protocol(folder).rstrip("/") + "/"
        found = [name.removeprefix(root) for name in fs.find(folder)]
        found = [name for name in found if not any(p.startswith(".") for p in name.split("/"))]
    else:
        found = list(_walk(folder, "", (os.path.realpath(folder),)))
    return sorted(found, key=lambda name: name.split("/"))


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder; ``above`` are the real paths of the folders that it is in."""
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    for entry in entries:
        if not _is_dir(entry):
            yield prefix + entry.name
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
        if real in above:
            raise ValueError(f"{entry.path} must not lead back to {real}. Remove the link.")
        yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """True for a folder, or a link that leads nowhere.

    Such a link may have led to a folder, whose files would be lost.
    """
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise FileNotFoundError(
            f"{entry.path} must lead somewhere; {os.readlink(entry.path)} is not there. Mend or "
            "remove the link."
        )
    return entry.is_dir()


def file_size(path: str) -> int:
    """Bytes of a file."""
    return _remote(path).size(path) if is_remote(path) else os.path.getsize(path)


def file_state(path: str) -> tuple[int, str]:
    """The bytes of a file, and a mark that changes whenever it is written again."""
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
    info = _remote(path).info(path)
    # By what each kind of bucket calls it.
    versions = ("generation", "ETag", "etag", "mtime", "LastModified", "created")
    return info["size"], str(next((info[key] for key in versions if key in info), ""))


def open_binary(path: str) -> BinaryIO:
    """A file opened for reading in order."""
    if is_remote(path):
        return _remote(path).open(path, "rb", block_size=8 * 2**20, cache_type="readahead")
    return open(path, "rb")


def read_bytes(path: str, start: int = 0, length: int | None = None) -> bytes:
    """Read part of a file, or all of it; the result is shorter if the file ends.

    The file is opened for each read: a data set of a thousand shards would else reach the limit of
    open files, and copies in worker processes have no file to share.

    Raises:
        FileNotFoundError: the file is missing from its folder.
        OSError: the disk or the network fails, whatever the kind of bucket calls that; or the
            folder is gone too, as that of a disk that is no longer mounted. It names the path.
    """
    try:
        return _read_remote(path, start, length) if is_remote(path) else _read(path, start, length)
    except FileNotFoundError as error:
        folder = path.rpartition("/")[0] or "."
        if is_folder(folder):
            raise
        raise OSError(errno.ENODEV, "its folder is gone", folder) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error  # of `read`, say


def _read(path: str, start: int, length: int | None) -> bytes:
    """`read_bytes` of a local file."""
    with open(path, "rb", buffering=0) as file:
        if start:
            file.seek(start)
        if length is None:
            return file.readall()
        data = file.read(length)
        while len(data) < length and (more := file.read(length - len(data))):
            data += more  # a network disk may give less than was asked for
        return data


def _read_remote(path: str, start: int, length: int | None) -> bytes:
    """`read_bytes` of a bucket."""
    try:
        end = None if length is None else start + length
        return _remote(path).cat_file(path, start=start, end=end)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of aiohttp, gcsfs, google.auth, botocore: none is about contents
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def cached_index(
    files: Sequence[str],
    beside: str,
    index_dir: str | None,
    build: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Arrays that take long to compute, saved in a file for the next time.

    The file lies in `index_dir`; else beside the data; else, where that is read-only or a bucket,
    in the user's cache folder. It is used as long as the data files are as they were.

    Args:
        files: the data files that the arrays describe.
        beside: the folder of the data.
        index_dir: a local folder of the user's choice, or None.
        build: finds the arrays out.

    Returns:
        The arrays.

    Raises:
        ValueError: `index_dir` is a bucket.
        OSError: `index_dir` cannot be written to.
    """
    if index_dir and is_remote(index_dir):
        raise ValueError(
            f"data.index_dir must be a local folder; got {index_dir}. Leave it out: what describes "
            "a bucket is kept in the user's cache folder."
        )
    files = sorted(file if is_remote(file) else os.path.abspath(file) for file in files)
    with ThreadPoolExecutor(16) as pool:  # a bucket takes its time for each
        states = list(pool.map(file_state, files))
    described = np.array(f"{INDEX_VERSION} {list(zip(files, states, strict=True))}")
    name = f".crate_jax_index_{hashlib.sha256(repr(files).encode()).hexdigest()[:16]}.npz"
    if index_dir:
        chosen = [expanded(index_dir, "data.index_dir")]
    else:
        chosen = [beside, f"{cache_folder()}/indices"]
    folders = [Path(folder) for folder in chosen if not is_remote(folder)]
    for folder in folders:
        arrays = _read_index(folder / name)
        if np.array_equal(arrays.pop("described", ""), described):
            return arrays
    arrays = build()
    for folder in folders:
        try:
            if folder != Path(beside):
                folder.mkdir(parents=True, exist_ok=True)
            with written_aside(folder / name) as aside, aside.open("wb") as file:
                np.savez(file, described=described, **arrays)  # type: ignore[arg-type]
            break
        except OSError:
            if index_dir:
                raise
    return arrays


def _read_index(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `cached_index` wrote; none if it is not there, or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception:  # damage comes out of zipfile and NumPy as nearly anything
        return {}
