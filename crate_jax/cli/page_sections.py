"""The sections of pictures on the page of `report`, in order, and what they say."""

from typing import NamedTuple


class Of(NamedTuple):
    """A section of pictures, for each run its own.

    Attributes:
        id: of the section.
        title: of it.
        text: what one sees.
        figures: names out of `FIGURES`, in order.
    """

    id: str
    title: str
    text: str
    figures: tuple[str, ...]


PICTURES = (
    Of(
        "tokens",
        "Tokens",
        "Each panel has the entries of a token down and the tokens across. Blue is above zero, "
        "orange below, and nothing stands where an entry is zero.",
        ("tokens",),
    ),
    Of(
        "subspaces",
        "Subspaces",
        "Cosines between the columns of all bases of a layer. A diagonal alone would say that the "
        "bases are orthonormal and that the subspaces share no direction.",
        ("subspaces",),
    ),
    Of(
        "atoms",
        "Dictionary",
        "The atoms that tokens are written in: those of the first layer as patches, and the "
        "cosines between the atoms of every layer.",
        ("atoms", "dictionary"),
    ),
    Of(
        "saliency",
        "Where the class token looks",
        "Yellow is where a head looks most. Each map goes from zero to its own largest value.",
        ("saliency",),
    ),
    Of(
        "heads",
        "What each head responds to",
        "The mean map of each head over all images, and over those of each class or folder. A "
        "number above 0 says how far the head's look goes beyond its mean somewhere, in even "
        "shares of a patch.",
        ("heads",),
    ),
    Of(
        "pca",
        "Shared components",
        "Patches of the same colour have the same components, in whichever image they are.",
        ("pca",),
    ),
    Of(
        "segmentation",
        "Segmentation",
        "Nothing was trained to segment. Each object of MaskCut has a colour.",
        ("segmentation",),
    ),
    Of(
        "confusion",
        "Confusion",
        "Rows are classes, columns what they were taken for.",
        ("confusion",),
    ),
)
