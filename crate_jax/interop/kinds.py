"""Find the program that wrote a file, by its content, and the nature of a file without weights."""

import difflib
import re
import zipfile
from pathlib import Path

from crate_jax.buckets import is_remote
from crate_jax.errors import first_line, of_the_system

# Files of other kinds: their first bytes, their kind, the remedy.
_OTHERS = (
    (rb"version https://git-lfs", "a pointer of Git LFS", "Fetch the file itself: git lfs pull."),
    (rb"(?i)\s*(<!doctype|<html|<\?xml|<head)", "a web page", "Download the file itself."),
    (rb"\x1f\x8b", "compressed by gzip", "Decompress it: gunzip."),
    (rb"BZh", "compressed by bzip2", "Decompress it: bunzip2."),
    (rb"\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!", "a compressed archive", "Unpack it."),
    (rb"(?s).{257}ustar", "a tar archive", "Unpack it: tar xf."),
    (rb"\x89HDF", "an HDF5 file", "Save the weights as .safetensors or .npz."),
    (rb"GGUF", "a GGUF file", "Take the weights in another format."),
    (rb"\x93NUMPY", "one array of NumPy", "Save named arrays with numpy.savez."),
    (rb"\s*\{", "JSON text", "Name the file of weights."),
    (rb"\x89PNG|\xff\xd8\xff|%PDF", "a picture or a document", "Name the file of weights."),
)
_PARTIAL = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2", ".tmp")
_WHOLE = "a whole PyTorch, safetensors or .npz file, or Flax's msgpack, or the folder of a run"


def kind_of(path: Path) -> str:
    """Find the program that wrote a file: "torch", "npz", "safetensors", "msgpack", or "index".

    Raises:
        ValueError: it is of no kind that is known; what it seems to be is said.
        OSError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise unreadable(path, error) or error from None
    # Behind the length of a JSON header, which may begin like any other kind of file.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if head.startswith(b"PK"):
        names = _zip_names(path, head)
        if any(re.search(r"(^|/)(code/|constants\.pkl)", name) for name in names):
            raise ValueError(
                f"{path} must be a state dict; it is a TorchScript archive, which is a program. "
                "Save the state_dict() of what torch.jit.load gives."
            )
        if not names or any(name.endswith(".npy") for name in names):
            return "npz"
        if any(name.endswith("data.pkl") for name in names):
            return "torch"
        raise ValueError(
            f"{path} must be {_WHOLE}; it is a zip archive of {', '.join(names[:3])}. Unpack it."
        )
    if head[:1] == b"\x80":  # a pickle, as PyTorch wrote its files before they were zip archives
        return "torch"
    if path.name.endswith(".index.json"):
        return "index"
    for begins, what, remedy in _OTHERS:
        if re.match(begins, head):
            raise ValueError(f"{path} must be {_WHOLE}; it is {what}. {remedy}")
    if head and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):  # a map with something in it
        return "msgpack"
    what = f"its {path.stat().st_size} bytes are none of these" if head else "it is empty"
    raise ValueError(f"{path} must be {_WHOLE}; {what}. {_broken(path)}")


def _zip_names(path: Path, head: bytes) -> list[str]:
    """The names in a zip archive; of a truncated one the first."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        length = int.from_bytes(head[26:28], "little")
        return [head[30 : 30 + length].decode("utf-8", "replace")]


def unreadable(path: str | Path, error: Exception) -> OSError | None:
    """The error that says that the system could not read a file; None if it is about the file."""
    if not of_the_system(error):
        return None
    said = getattr(error, "strerror", None) or first_line(error)
    remedy = "Check who may read it, and the disk."
    return OSError(f"{path} must be readable; reading it ended in: {said}. {remedy}")


def not_whole(path: str | Path, what: str, ended: str, remedy: str = "") -> str:
    """The line about a file that cannot be read to its end."""
    return f"{path} must be {what}; reading it ended in {ended}. {remedy or _broken(path)}"


def _broken(path: str | Path) -> str:
    """The reason why a file is not whole, and the remedy."""
    path = Path(path)
    beside = [path.with_name(path.name + suffix) for suffix in _PARTIAL]
    if path.suffix.lower() in _PARTIAL or any(each.exists() for each in beside):
        return "It is still being downloaded: wait, or download it again."
    return "It may be truncated: copy it again."


def not_there(path: Path) -> str:
    """The line about a path at which there is nothing, with what lies near it."""
    said = f"weights must be a file or a run's folder; got {path}, not there."
    if is_remote(path):
        return f"{said} Check its name."
    if path.is_symlink():
        return f"{said} It is a link to {path.readlink()}, which is gone."
    if not path.parent.is_dir():
        return f"{said} There is no folder {path.parent}."
    names = [each.name for each in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    near += [name for name in names if name.split(".")[0] == path.stem and name not in near]
    return f"{said} Did you mean {' or '.join(near[:3])}?" if near else f"{said} Check the path."
