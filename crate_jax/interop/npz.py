"""NumPy's archive of named arrays: one entry a parameter, by its path in the tree."""

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crate_jax.interop.kinds import not_whole, unreadable

NAMES = "class_names"  # the entry of text that names the classes


def read_names(path: Path) -> list[str]:
    """The names of classes that `write` put into an archive; [] if there are none.

    Raises:
        ValueError: see `read`.
    """
    found, _ = read(path, leave=rf"(?!{NAMES}$).*")
    return found[NAMES].tolist() if NAMES in found and found[NAMES].dtype.kind == "U" else []


def read(path: str | Path, leave: str = "") -> tuple[dict[str, np.ndarray], list[str]]:
    """All arrays by name.

    Args:
        path: the archive.
        leave: pattern of names that are not read.

    Returns:
        The arrays, and the names of those that were left.

    Raises:
        ValueError: the file is no such archive, is damaged, or holds a pickle, which is refused.
    """
    try:
        # Opened here: NumPy leaves a damaged archive open.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is one array")
            left = [name for name in archive.files if leave and re.fullmatch(leave, name)]
            return {name: archive[name] for name in archive.files if name not in left}, left
    except ValueError as error:
        pickled = "pickle" in str(error) or "Object arrays" in str(error)
        reason = "it holds a pickle, which could run code" if pickled else str(error)
        raise ValueError(
            f"{path} must hold named arrays of numbers; {reason}. Save it with numpy.savez."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError) as error:
        ended = f"a {type(error).__name__}"
        whole = "a whole .npz file"
        raise unreadable(path, error) or ValueError(not_whole(path, whole, ended)) from None


def write(path: Path, arrays: Mapping[str, np.ndarray], class_names: Sequence[str] = ()) -> None:
    """Write arrays by name, uncompressed: random weights do not shrink; and names of classes."""
    names = {NAMES: np.array(list(class_names), np.str_)} if class_names else {}
    with path.open("wb") as file:  # given a name, NumPy would append .npz to it
        np.savez(file, allow_pickle=False, **arrays, **names)
