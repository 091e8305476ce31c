"""Weights in a bucket, copied into the cache; runs and trees of Orbax are read where they are."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crate_jax.buckets import is_remote, version
from crate_jax.interop.download import alone, by_pieces, shelf
from crate_jax.interop.folders import pieces, weights_file


@contextlib.contextmanager
def nearby(path: Path) -> Iterator[Path]:
    """A file of weights on this machine, its pieces beside it; what is local stays as it is.

    Errors about the copy name the path that was asked for.

    Args:
        path: the path of a file, or of a folder with one; no run, and no tree of Orbax.

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


def _copy(files: tuple[Path, ...], versions: tuple[str, ...]) -> Path:
    """The copy of the first of some files in the cache; an older version of them is removed."""
    first = files[0]
    kind, _, rest = os.fspath(first.parent).partition("://")
    digest = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12]
    shelf_of_all = shelf(kind, *rest.split("/"))
    folder = shelf_of_all / f"{first.name}.{digest}"
    for file, version_ in zip(files[::-1], versions[::-1], strict=True):
        place = folder / file.name
        with alone(place, "Set CRATE_JAX_CACHE to a folder that you may write to."):
            if not place.is_file():
                by_pieces(file, place, mark=version_)
    for other in shelf_of_all.glob(f"{first.name}.*"):
        if other != folder and other.stem == first.name:
            shutil.rmtree(other, ignore_errors=True)
    return folder / first.name
