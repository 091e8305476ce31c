"""Buckets: paths ``gs://…`` and ``s3://…``, by fsspec and by epath, and their services' errors.

pathlib knows no bucket. epath's paths have its methods (``exists``, ``iterdir``, ``read_text``, …),
so that a run's folder is one kind of path for all code that uses it. Orbax takes them too.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from crate_jax.errors import first_line

# Needed besides fsspec for each kind of bucket, and the extra of this project that brings it.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "s3": "s3"}
# The authentication of each kind of bucket.
_CREDENTIALS = {
    "gs": "gcloud auth application-default login, or the service account of the machine",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine",
}
ANSWER_S = 30  # Seconds in which a service must say whether there is a bucket.

# Whose errors are about a service, never about what an object holds.
_SERVICES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google.api_core", "google.auth")
# tensorstore's words for the same.
_STATUS = re.compile(
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED)\b"
    r"|HTTP response code: (401|403|408|429|5\d\d)"
)


class ServiceError(OSError):
    """The failure or refusal of a bucket's service. It says nothing about the bucket's content.

    Args:
        path: what it was asked for.
        said: its words.
    """

    def __init__(self, path: object, said: str):
        self.said = said
        super().__init__(
            f"{path} must be reachable; it is not ({said}). Check the network and the credentials, "
            "and run again."
        )


def is_remote(path: str | os.PathLike[str]) -> bool:
    """True if a path is in a bucket."""
    return "://" in os.fspath(path)


@functools.cache
def filesystem(protocol: str, *, cached: bool = False) -> Any:
    """The fsspec file system of a protocol.

    Args:
        protocol: such as ``gs``.
        cached: whether listings are remembered: faster, where nobody writes meanwhile.

    Raises:
        ValueError: its package is not installed, or there is no such protocol.
    """
    import fsspec
    import fsspec.config

    # For epath, which passes no options: what Orbax has just written must be seen.
    for name in PACKAGES:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(protocol, use_listings_cache=cached)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}." if package else "Use gs://, s3:// or a local path."
        raise ValueError(f"{protocol}:// must be reachable; {error}. {remedy}") from error


def _of(path: Path) -> Any:
    """The file system that a path is of."""
    return filesystem(os.fspath(path).partition("://")[0])


def bucket_path(text: str, name: str) -> Path:
    """A path in a bucket. It has pathlib's methods, except those for links.

    Args:
        text: ``gs://BUCKET/…`` or ``s3://BUCKET/…``.
        name: of the flag, field or argument, for the error.

    Raises:
        ValueError: it is another kind of address, names no bucket, or a package is missing.
    """
    kind, _, rest = text.partition("://")
    if kind not in EXTRAS or not rest.strip("/"):
        raise ValueError(
            f"{name} must be a local path, gs://BUCKET/PATH or s3://BUCKET/PATH; got {text}. "
            "Addresses of other kinds are not read: download or mount what is there."
        )
    try:
        filesystem(kind)
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise ValueError(
            f"{name} must be reachable; {kind}:// needs {PACKAGES[kind]}, which is missing. "
            f"Install it: pip install 'crate-jax[{EXTRAS[kind]}]'"
        ) from error
    # Where TensorFlow is installed, epath would leave buckets to it, which may know none of S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    return cast(Path, epath.Path(text.rstrip("/")))


def check_reachable(path: Path, name: str) -> None:
    """Ask for the bucket of a path, with a time limit; local paths pass.

    Raises:
        ValueError: there is no such bucket, it lets nobody in, or its service does not answer.
    """
    if not is_remote(path):
        return
    from fsspec.asyn import sync

    kind, _, rest = os.fspath(path).partition("://")
    bucket = rest.partition("/")[0]
    remedy = f"Check its name, and the credentials: {_CREDENTIALS[kind]}."
    try:
        fs = filesystem(kind)
        sync(fs.loop, fs._info, bucket, timeout=ANSWER_S)
        return
    except FileNotFoundError:
        reason = "there is no such bucket"
    except TimeoutError:
        reason = f"no answer within {ANSWER_S} s"
    except Exception as error:  # of a dozen packages, none of which is about what a path holds
        reason = first_line(error)
    raise ValueError(f"{name} must be reachable; {kind}://{bucket} is not ({reason}). {remedy}")


def complaint(error: BaseException) -> str | None:
    """A service's message about a failure or refusal; None if the error is about something else."""
    if isinstance(error, FileNotFoundError | FileExistsError | ServiceError):
        return None
    network = isinstance(error, ConnectionError | PermissionError | TimeoutError)
    said = _STATUS.search(str(error)) and not type(error).__module__.startswith("jax")
    if is_of_service(error) or network or said:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def is_of_service(error: BaseException) -> bool:
    """True if a package that speaks with a bucket's service made an error."""
    return type(error).__module__.startswith(_SERVICES)


@contextlib.contextmanager
def answered(path: Path) -> Iterator[None]:
    """Turn a service's errors into one that names a path; others stay as they are.

    Raises:
        ServiceError: the service fails or refuses.
    """
    try:
        yield
    except Exception as error:
        if (said := complaint(error)) is None:
            raise
        raise ServiceError(path, said) from error


def read(path: Path) -> bytes:
    """Read an object as it is at one moment, even if another process writes it again meanwhile.

    epath reads in two steps, and fails where the object has changed between them.
    """
    return _of(path).cat_file(os.fspath(path))


def create(path: Path, data: bytes) -> bool:
    """Write an object only if there is none; return whether it was written.

    Of several that try at once one succeeds, for the service decides: ``if-none-match`` of S3,
    generation 0 of Google.
    """
    fs = _of(path)
    try:
        fs.pipe_file(os.fspath(path), data, mode="create")
    except FileExistsError:
        return False
    except Exception as error:
        if str(getattr(error, "code", "")) == "412":  # gcsfs: precondition failed
            return False
        raise
    return True


def rename_tree(folder: Path, target: Path) -> None:
    """Rename all objects below a path, by copies: no service renames a folder, nor does s3fs.

    Args:
        folder: below which they are.
        target: below which there is nothing yet.

    Raises:
        OSError: the service fails or refuses; what was there is there still.
    """
    fs = _of(folder)
    source, sink = (fs._strip_protocol(os.fspath(path)) for path in (folder, target))
    with answered(folder):
        paths = fs.find(source)
        for path in paths:
            fs.cp_file(path, sink + path.removeprefix(source))
        fs.rm(paths)


def remove_tree(folder: Path) -> None:
    """Remove all objects below a path, as far as that can be done."""
    fs = _of(folder)
    with contextlib.suppress(Exception):
        fs.rm(os.fspath(folder), recursive=True)


def sizes(folder: Path) -> int:
    """Bytes of all files below a folder, here or in a bucket."""
    if is_remote(folder):
        return _of(folder).du(os.fspath(folder))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def version(path: Path) -> str:
    """The mark that changes whenever an object is written again, by the name that its service uses.

    Raises:
        OSError: there is none, or the service fails.
    """
    with answered(path):
        info = _of(path).info(os.fspath(path))
    return next((str(info[key]) for key in ("generation", "ETag", "etag") if key in info), "")


def fetch(path: Path, here: Path) -> None:
    """Copy an object to a local file.

    Raises:
        OSError: there is none, or the service fails.
    """
    fs = _of(path)
    with answered(path):
        fs.get_file(os.fspath(path), os.fspath(here))


def object_size(path: Path) -> int:
    """Bytes of an object.

    Raises:
        OSError: there is none, or the service fails.
    """
    with answered(path):
        return int(_of(path).info(os.fspath(path))["size"])


def read_piece(path: Path, start: int, end: int) -> bytes:
    """The bytes of an object from `start` to before `end`.

    Raises:
        OSError: there is none, or the service fails.
    """
    with answered(path):
        return _of(path).cat_file(os.fspath(path), start=start, end=end)


def store(here: Path, path: Path) -> None:
    """Copy a local file to an object, which appears whole or not at all.

    Raises:
        OSError: the service fails or refuses.
    """
    fs = _of(path)
    with answered(path):
        fs.put_file(os.fspath(here), os.fspath(path))
