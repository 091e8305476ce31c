"""What a store gives: a split's examples, and what is known of its classes."""

import dataclasses
from collections.abc import Sequence
from typing import NotRequired, Protocol, TypedDict

import numpy as np

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
)  # fmt: skip


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
        name: what errors and logs call it, such as ``digits/train``.
        examples: random access to the examples.
        num_classes: labels are in [0, num_classes).
        class_names: of every class, where they are known.
    """

    name: str
    examples: Examples
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


def check_same_classes(source: Source, other: Source) -> None:
    """A label must mean the same in two splits.

    Raises:
        ValueError: the classes differ, in number or, where they are known, in name.
    """
    if (source.num_classes, source.class_names) != (other.num_classes, other.class_names):
        odd = sorted(set(source.class_names) ^ set(other.class_names))[:3]
        missing = f"{', '.join(odd)} … are not in both" if odd else "their numbers differ"
        raise ValueError(
            f"{other.name} must have the {source.num_classes} classes of {source.name}; it has "
            f"{other.num_classes}, {missing}. Add an empty folder for a class without images, or "
            "choose another split."
        )


def pack_names(names: Sequence[str]) -> np.ndarray:
    """Names as one array of bytes: a million strings are slow to hand to workers."""
    packed = [name.encode(errors="surrogateescape") for name in names]
    return np.array(packed) if packed else np.zeros(0, "S1")


def unpack_name(name: bytes) -> str:
    """One of the names that were packed."""
    return name.decode(errors="surrogateescape")
