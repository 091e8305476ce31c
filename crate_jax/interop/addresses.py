"""The addresses of weights: on this machine, in a bucket, on the hub, on the web."""

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from crate_jax.files import located
from crate_jax.interop import hub
from crate_jax.interop.download import (
    ANSWER_S,
    LOGGER,
    alone,
    asked,
    client_for,
    shelf,
    stream,
    told,
)
from crate_jax.models.released import HUB

WEB = ("https://", "http://")

_REMEDY = "Set CRATE_JAX_CACHE to a folder that you may write to."


def fetched(path: str | os.PathLike[str], name: str = "weights") -> Path:
    """A path to read weights from: what lies on the network is fetched, or found in a cache.

    Args:
        path: ``hf://OWNER/REPOSITORY[/PATH][@REVISION]``, ``https://…``; or any that `located`
            takes, which is returned as it returns it.
        name: of the flag, field or argument, for the error.

    Returns:
        A file on this machine; a folder, of a repository that is named whole.

    Raises:
        FileNotFoundError: the server has no such file.
        ValueError: the address is malformed, a package is missing, or the file is another than
            the table of released weights knows.
        OSError: the server cannot be reached, or the cache cannot be written.
    """
    text = os.fspath(path)
    if not is_address(text):
        return located(path, name)
    client_for(text)
    return hub.fetched(text) if text.startswith(HUB) else _of_web(text)


def is_address(path: str | os.PathLike[str]) -> bool:
    """True if `fetched` asks the network for a path that is in no cache."""
    return os.fspath(path).startswith((HUB, *WEB))


def _of_web(url: str) -> Path:
    """The file of a web address: in the cache, or fetched into it."""
    from huggingface_hub import get_session

    parts = urlsplit(url)
    names = [each for each in unquote(parts.path).split("/") if each]
    if not (parts.hostname and names) or {"..", "."} & {*names}:
        raise ValueError(
            f"weights must be https://HOST/PATH of a file; got {url}. Correct the address."
        )
    if parts.query:  # another query may give another file
        names.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:8])
    place = shelf("https", parts.netloc.replace(":", "_"), *names)
    if place.is_file():
        return place
    with alone(place, _REMEDY), told(url, url, place):
        if not place.is_file():  # another process has fetched it meanwhile
            how = {"timeout": ANSWER_S, "follow_redirects": True}
            answer = asked(lambda: get_session().head(url, **how))
            heads = answer.headers if answer.is_success else {}  # some servers know no HEAD
            size = heads.get("Content-Length")
            mark = heads.get("ETag", "")
            stream(url, place, name=names[-1], mark=mark, size=int(size) if size else None)
    LOGGER.warning("fetched %s; its owner states its licence there", url)
    return place
