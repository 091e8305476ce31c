"""The content of a store: a split's examples, and the known facts about its classes."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from crate_jax.options import difference, listed

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
)  # fmt: skip

# Beside the files that `crate_jax.data.stores.prepare` writes: a digest of what they are made of.
FINGERPRINT = ".crate_jax_source_sha256"


class Example(TypedDict):
    """An image, as encoded bytes or as an array (H, W, c), its label, and its file's name."""

    image: bytes | np.ndarray
    label: int
    name: NotRequired[str]


class Examples(Protocol):
    """Random access to the examples of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of one data set.

    Attributes:
        name: its name in errors and logs, such as ``digits/train``.
        examples: random access to the examples.
        num_classes: labels are in [0, num_classes).
        class_names: the names of every class, where they are known.
        listing: of `listing_of`, another one where other examples lie, or in another order; "" if
            the store has none.
    """

    name: str
    examples: Examples
    num_classes: int
    class_names: tuple[str, ...] = ()
    listing: str = ""

    def __len__(self) -> int:
        return len(self.examples)


def check_same_classes(source: Source, other: Source) -> None:
    """Check that a label means the same in two splits.

    Raises:
        ValueError: the classes differ, in number or, where they are known, in name.
    """
    if (source.num_classes, source.class_names) != (other.num_classes, other.class_names):
        odd = sorted(set(source.class_names) ^ set(other.class_names))[:3]
        order = difference(source.class_names, other.class_names) or "their numbers differ"
        missing = f"{', '.join(odd)} … are not in both" if odd else order
        raise ValueError(
            f"{other.name} must have the {source.num_classes} classes of {source.name}; it has "
            f"{other.num_classes}, {missing}. Add an empty folder for a class without images, or "
            "choose another split."
        )


def check_known_classes(source: Source, classes: Sequence[str]) -> None:
    """Check that the classes of a split are among those of a model.

    Args:
        source: of the split; where its classes have no names, they must be as many.
        classes: names of the model's outputs, in their order.

    Raises:
        ValueError: they are not; the names that the model does not know are in it.
    """
    known = set(classes)
    if strange := [name for name in source.class_names if name not in known]:
        raise ValueError(
            f"{source.name} must have classes that the model knows; {listed(strange)} "
            f"{'is' if len(strange) == 1 else 'are'} not among {listed(classes)}. "
            "Rename them, or choose another split."
        )
    if not source.class_names and source.num_classes != len(classes):
        raise ValueError(
            f"{source.name} must have the {len(classes)} classes of the model; it has "
            f"{source.num_classes}, without names. Choose another split."
        )


def listing_of(what: str, *parts: np.ndarray | str) -> str:
    """A short digest of the names, labels or files of the examples, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return f"{digest.hexdigest()[:16]} of {what}"


def pack_names(names: Sequence[str]) -> np.ndarray:
    """Names as one array of bytes: a million strings are slow to hand to workers."""
    packed = [name.encode(errors="surrogateescape") for name in names]
    return np.array(packed) if packed else np.zeros(0, "S1")


def unpack_name(name: bytes) -> str:
    """One of the names that were packed."""
    return name.decode(errors="surrogateescape")
