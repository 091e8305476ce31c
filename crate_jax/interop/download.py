"""Weights from the network: fetched once, continued after an interruption, checked, kept.

All of it goes through the client of the Hugging Face hub, which also fetches from other servers.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crate_jax.buckets import object_size, read_piece
from crate_jax.errors import first_line
from crate_jax.files import cache_folder
from crate_jax.models.released import Released

BAR_AFTER_S = 3  # Seconds after which a bar shows how far a download is.
AT_ONCE = 2**24  # bytes of a bucket's object that are kept, or lost by an interruption, at once
ANSWER_S = 10.0  # Seconds in which a server must say what it has.

LOGGER = logging.getLogger("crate_jax")


class CacheError(OSError):
    """A folder of the cache cannot be written."""


def client_for(what: str) -> None:
    """Refuse to go on where the hub's client is not installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{what} must have huggingface_hub, which is missing. Install it: pip install "
            "huggingface_hub"
        )


def shelf(*parts: str) -> Path:
    """The path below the cache where a file of the network may be put by hand, by its address.

    Files of the web are kept there too; those of the hub are in the hub's own cache.
    """
    return Path(cache_folder(), "weights", *parts)


def stream(
    url: str,
    place: Path,
    *,
    name: str,
    mark: str,
    size: int | None,
    digest: str = "",
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fetch a file of a server to a place, which it takes when it is whole.

    What an interrupted call has fetched stays beside it, and the next call fetches the rest.

    Args:
        url: the address of the file.
        place: where it goes, in an existing folder.
        name: before the bar that shows how far it is.
        mark: another one where the server's file has changed; "": not known, so that nothing is
            continued.
        size: in bytes; None: not known.
        digest: how the file's SHA-256 begins; "": not known.
        headers: the headers of the request.

    Raises:
        ValueError: the file has another digest; it is removed.
    """
    from huggingface_hub.file_download import http_get

    part = _part(place, mark, size)
    with part.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=dict(headers),
            expected_size=size,
            displayed_filename=name,
            tqdm_class=_bar,  # type: ignore[arg-type]
        )
        file.flush()
        os.fsync(file.fileno())
    if digest and not (found := digest_of(part)).startswith(digest):
        part.unlink()
        raise ValueError(
            f"{url} must have a SHA-256 that begins with {digest[:12]}; got {found[:12]}. What "
            "came was removed. Run again, or ask its owner."
        )
    os.replace(part, place)


def by_pieces(path: Path, place: Path, *, mark: str) -> None:
    """`stream` for an object of a bucket: a request for each `AT_ONCE` bytes.

    Args:
        path: the path of the object.
        place: where it goes, in an existing folder.
        mark: another one for each version of the object.

    Raises:
        OSError: the service fails, or has no such object.
    """
    size = object_size(path)
    part = _part(place, mark, size)
    with part.open("ab") as file:
        start = file.tell()
        with _bar(total=size, initial=start, desc=place.name, unit="B", unit_scale=True) as bar:
            while start < size:
                piece = read_piece(path, start, min(start + AT_ONCE, size))
                file.write(piece)
                file.flush()
                start += len(piece)
                bar.update(len(piece))
        os.fsync(file.fileno())
    os.replace(part, place)


def _part(place: Path, mark: str, size: int | None) -> Path:
    """The unfinished file beside a place; what can be no beginning of the file is removed."""
    part = place.with_name(f"{place.name}.{hashlib.sha256(mark.encode()).hexdigest()[:12]}.part")
    for other in place.parent.glob(f"{place.name}.*.part"):
        if other != part or not mark or (size is not None and other.stat().st_size > size):
            other.unlink()
    return part


def _bar(**told: Any) -> Any:
    """The progress bar of a download: on a terminal alone, and if it takes a while."""
    from tqdm import tqdm

    return tqdm(delay=BAR_AFTER_S, disable=None, file=sys.stderr, leave=False, **told)


def check_known(path: Path, row: Released | None, *, content: bool) -> None:
    """Refuse a file that is another than the table of released weights knows.

    Args:
        path: the path of the file.
        row: of the table; None: it has none, and every file passes.
        content: whether its digest is computed.

    Raises:
        ValueError: its size or its digest differs.
    """
    if row is None:
        return
    size, digest = path.stat().st_size, row.sha256
    if row.bytes not in (None, size):
        raise ValueError(
            f"{path} must be {row.file} of {row.bytes:,} bytes; got {size:,}. Remove it, and fetch "
            "it again."
        )
    if content and digest and not (found := digest_of(path)).startswith(digest):
        raise ValueError(
            f"{path} must be {row.file}, with a SHA-256 that begins with {digest}; got "
            f"{found[:8]}. Remove it, and fetch it again."
        )


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(8)  # the names of the classes are read apart from the weights
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """The same, once for each state of a file."""
    del size, changed_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def alone(place: Path, remedy: str) -> Iterator[None]:
    """Make the folder of a place, and let one process at a time write there.

    Raises:
        CacheError: the folder cannot be written; the remedy is added.
    """
    from filelock import FileLock

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise CacheError(
            f"the cache must be a folder that takes files; {place.parent} is not "
            f"({error.strerror or first_line(error)}). {remedy}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def asked(ask: Callable[[], Any]) -> Any:
    """What a server answers; asked again where it had ended an idle connection.

    The client keeps connections for later requests, and a server ends them when it wants.
    """
    try:
        return ask()
    except Exception as error:
        if type(error).__name__ != "RemoteProtocolError":  # of the library that the client sends by
            raise
        return ask()


@contextlib.contextmanager
def told(address: str, url: str, place: Path, *, put: str = "the file at") -> Iterator[None]:
    """Tell the errors of the network in one line, which says where the file may be put by hand.

    The hub's client says nothing on the terminal meanwhile: what it logs, it raises as well.

    Args:
        address: as the user wrote it.
        url: from which the file can be fetched elsewhere.
        place: where `fetched` looks for it.
        put: how what was fetched elsewhere comes there.

    Raises:
        FileNotFoundError: the server has no such file.
        ValueError: it lets nobody in without a token, or not this one.
        OSError: it cannot be reached, or the client may not try.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # of the client, of what it sends by, or of the system
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        by_hand = f"or fetch {url} elsewhere and put {put} {place}."
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise OSError(
                f"{address} must be in the cache while HF_HUB_OFFLINE is set; it is not. Unset it, "
                + by_hand
            ) from error
        if status == 404 and not isinstance(error, errors.RepositoryNotFoundError):
            raise FileNotFoundError(
                f"{address} must name a file that the server has; it has none. Check the name."
            ) from error
        if status in (401, 403, 404):
            raise ValueError(
                f"{address} must be open to you; the server answers {status}. Check its name; for "
                "what is private or asks for consent, log in by `hf auth login`."
            ) from error
        if isinstance(error, CacheError) or not (_of_network(error) or status):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise OSError(
            f"{address} must be reachable; it is not ({said}). "
            f"Check the network and run again, {by_hand}"
        ) from error
    finally:
        logger.setLevel(level)


def _of_network(error: Exception) -> bool:
    """True if an error is about the network, and not about this machine's files."""
    package = type(error).__module__.partition(".")[0]
    return package in ("huggingface_hub", "httpx", "httpx2") or (
        isinstance(error, OSError) and (error.errno is None or isinstance(error, ConnectionError))
    )
