"""Weights on the Hugging Face hub: its addresses, its cache, whole repositories."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from crate_jax.interop.download import (
    ANSWER_S,
    LOGGER,
    alone,
    asked,
    check_known,
    shelf,
    stream,
    told,
)
from crate_jax.interop.folders import CONFIG, KNOWN_NAMES, piece_names
from crate_jax.models.released import HUB, of_address
from crate_jax.options import listed

_ADDRESS = re.compile(r"hf://([\w.-]+)/([\w.-]+)(?:@([^/@]+))?(?:/([^@]*))?(?:@([^@]+))?")
_MINE = "Set HF_HOME to a folder that you may write to."


class Address(NamedTuple):
    """The parts of an address.

    Attributes:
        text: as it was written.
        repository: OWNER/NAME.
        file: its path in the repository; "": the repository as a whole.
        revision: a branch, a tag or a commit.
    """

    text: str
    repository: str
    file: str
    revision: str

    @property
    def by_hand(self) -> Path:
        """The path at which it may be put by hand."""
        at = "" if self.revision == "main" else "@" + self.revision.replace("/", "_")
        return shelf("hf", self.repository + at, *filter(None, self.file.split("/")))

    @property
    def url(self) -> str:
        """For a browser."""
        from huggingface_hub import constants, hf_hub_url

        if self.file:
            return hf_hub_url(
                self.repository, self.file, revision=self.revision, endpoint=_endpoint()
            )
        return f"{_endpoint() or constants.ENDPOINT}/{self.repository}/tree/{self.revision}"

    def of(self, file: str) -> "Address":
        """The address of a file of the same repository and revision."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        return Address(f"{HUB}{self.repository}/{file}{at}", self.repository, file, self.revision)


def parse(text: str) -> Address:
    """The parts of an address.

    Raises:
        ValueError: it is malformed.
    """
    found = _ADDRESS.fullmatch(text)
    if not found or {"..", "."} & {*text.split("/")} or (found[3] and found[5]):
        raise ValueError(
            f"weights must be hf://OWNER/REPOSITORY, with /PATH and @REVISION if need be; got "
            f"{text}. Correct the address."
        )
    file = (found[4] or "").rstrip("/")
    return Address(text, f"{found[1]}/{found[2]}", file, found[3] or found[5] or "main")


def fetched(text: str) -> Path:
    """The file or folder of an address on the hub, as `crate_jax.interop.addresses.fetched`."""
    address = parse(text)
    return _file(address) if address.file else _folder(address)


def _endpoint() -> str | None:
    """The server that the environment names, as it is now."""
    return os.environ.get("HF_ENDPOINT") or None


def _cached(address: Address, file: str) -> Path | None:
    """A file of a repository in the hub's own cache; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(address.repository, file, revision=address.revision)
    return Path(found) if isinstance(found, str) else None


def _file(address: Address, *, say: bool = True) -> Path:
    """The file of an address: put there by hand, in the hub's cache, or fetched into it."""
    row = of_address(address.text)
    if address.by_hand.is_file():
        check_known(address.by_hand, row, content=True)
        return address.by_hand
    if found := _cached(address, address.file):
        check_known(found, row, content=False)  # it was when it was fetched
        return found
    with told(address.text, address.url, address.by_hand):
        found = _fetch(address, row.sha256 if row else "", row.bytes if row else None)
    if say:
        _say(address, row.licence if row else "stated there")
    return found


def _say(address: Address, licence: str) -> None:
    """Print the source of a file, and its licence."""
    LOGGER.warning("fetched %s from %s; licence: %s", address.text, address.url, licence)


def _fetch(address: Address, known_digest: str, known_size: int | None) -> Path:
    """Fetch a file into the hub's cache, where its client finds it too."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    where = {"revision": address.revision, "endpoint": _endpoint()}
    url = hf_hub_url(address.repository, address.file, **where)
    about = asked(lambda: get_hf_file_metadata(url, timeout=ANSWER_S, endpoint=_endpoint()))
    etag, size = about.etag or "", about.size
    # The tag of a large file is the whole digest.
    digest = etag if re.fullmatch("[0-9a-f]{64}", etag) else known_digest
    if known_size not in (None, size) or not digest.startswith(known_digest):
        raise ValueError(
            f"{address.text} must have {known_size:,} bytes and a SHA-256 that begins with "
            f"{known_digest}; the server has {size} bytes with {digest[:8]}. Its owner has changed "
            "it: name a @REVISION."
        )
    folder = repo_folder_name(repo_id=address.repository, repo_type="model")
    place = Path(constants.HF_HUB_CACHE, folder, "blobs", etag)
    with alone(place, _MINE):
        if not place.is_file():
            stream(
                url,
                place,
                name=address.file.rpartition("/")[2],
                mark=etag,
                size=size,
                digest=digest,
                headers=build_hf_headers(),
            )
    return Path(asked(lambda: hf_hub_download(address.repository, address.file, **where)))


def _folder(address: Address) -> Path:
    """A repository's weights and their configuration, in one folder."""
    if any((address.by_hand / name).is_file() for name in KNOWN_NAMES):
        return address.by_hand
    for name in KNOWN_NAMES:
        found = _cached(address, name)
        if found and _whole(found):
            return found.parent
    from huggingface_hub import HfApi

    with told(address.text, address.url, address.by_hand, put="its files into"):
        api = HfApi(endpoint=_endpoint())
        about = {"revision": address.revision, "timeout": ANSWER_S}
        info = asked(lambda: api.model_info(address.repository, **about))
    names = [each.rfilename for each in info.siblings or ()]
    weights = next((name for name in KNOWN_NAMES if name in names), None)
    if weights is None:
        raise ValueError(
            f"{address.text} must hold {KNOWN_NAMES[0]}, or another file of a known name; it holds "
            f"{listed(names) or 'nothing'}. Name one: {HUB}{address.repository}/FILE."
        )
    if CONFIG in names:
        _file(address.of(CONFIG), say=False)
    found = _file(address.of(weights), say=False)
    for name in piece_names(found) if found.suffix == ".json" else ():
        _file(address.of(name), say=False)
    _say(address, "stated there")
    return found.parent


def _whole(first: Path) -> bool:
    """True if the pieces that a file names, if it is an index, are there."""
    names = piece_names(first) if first.suffix == ".json" else ()
    return all((first.parent / name).is_file() for name in names)
