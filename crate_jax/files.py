"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Values that JSON can hold, by name: the record of a checkpoint, the result of a command.
Json = dict[str, Any]


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place if the block ends without an error.

    What was at ``path`` is untouched until then, and stays if the block fails.

    Args:
        path: the file to be; its folder exists.

    Yields:
        The path to write to, in the same folder.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: the path itself is one.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} must lie in an existing folder; there is no {path.parent}. Make it first."
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file; it is a folder. Name a file in it.")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
