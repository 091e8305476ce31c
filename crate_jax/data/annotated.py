"""Pictures with masks of their objects: a plain folder, and a folder as VOC's.

A folder as VOC's has ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png`` with a class for each
pixel, and the names of a split in ``ImageSets/Segmentation/SPLIT.txt``.
"""

import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np

from crate_jax.data.images.decode import EncodedImage
from crate_jax.data.rows import BadExampleError
from crate_jax.data.stores import storage
from crate_jax.data.stores.examples import IMAGE_SUFFIXES

VOC_IMAGES, VOC_LABELS, VOC_SPLITS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
GREY, PALETTE = 0, 3  # colour types of a PNG


class Picture(NamedTuple):
    """An image that has not been read yet.

    Attributes:
        path: the path of its file.
        name: below its folder, without the suffix.
        number: COCO's id; of other folders its place, from 1 on.
        labels: the file with a class for each pixel, if there is one.
        size: (height, width) by its annotations, if they say.
    """

    path: str
    name: str
    number: int
    labels: str | None = None
    size: tuple[int, int] | None = None

    def pixels(self, channels: int) -> np.ndarray:
        """(H, W, channels), uint8.

        Raises:
            BadExampleError: the file is no image, or of another size than its annotations say.
        """
        data = storage.read_bytes(self.path)
        found = EncodedImage(data, channels=channels, name=self.path).pixels()
        if self.size not in (None, found.shape[:2]):
            raise BadExampleError(
                f"{self.path} must be {self.size[0]} x {self.size[1]}, as its annotations say; it "
                f"is {found.shape[0]} x {found.shape[1]}. Give the images that were annotated."
            )
        return found


def is_voc(folder: str) -> bool:
    """True if a folder is laid out as VOC's."""
    return storage.is_folder(storage.join(folder, VOC_LABELS))


def folder_pictures(folder: str) -> list[Picture]:
    """The images anywhere below a folder, in the order of their paths.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    names = images_below(folder)
    if not names:
        raise FileNotFoundError(
            f"the folder must hold images ({', '.join(IMAGE_SUFFIXES)}); {folder} has none. Name "
            "another."
        )
    return [
        Picture(storage.join(folder, name), stem(name), number)
        for number, name in enumerate(names, start=1)
    ]


def voc_pictures(folder: str, split: str = "val") -> list[Picture]:
    """The images of a split of a folder as VOC's, with the files of their classes.

    Raises:
        FileNotFoundError: there is no such split, or it names what is not there.
        ValueError: it names nothing.
    """
    listing = storage.join(folder, VOC_SPLITS, f"{split}.txt")
    _check_split(folder, split)
    lines = storage.read_bytes(listing).decode("utf-8-sig", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{listing} must name images, one a line; it is empty. Fill it.")
    images = {stem(name): name for name in images_below(storage.join(folder, VOC_IMAGES))}
    labels = {stem(name): name for name in images_below(storage.join(folder, VOC_LABELS))}
    for kind, known in ((VOC_IMAGES, images), (VOC_LABELS, labels)):
        check_all_there(names, known, listing, storage.join(folder, kind))
    return [
        Picture(
            storage.join(folder, VOC_IMAGES, images[name]),
            name,
            number,
            storage.join(folder, VOC_LABELS, labels[name]),
        )
        for number, name in enumerate(names, start=1)
    ]


def _check_split(folder: str, split: str) -> None:
    """Refuse a split that a folder as VOC's does not list.

    Raises:
        FileNotFoundError: it does not; those that it lists are named.
    """
    listings = storage.join(folder, VOC_SPLITS)
    names = storage.list_folder(listings) if storage.is_folder(listings) else {}
    known = [stem(name) for name in names if name.endswith(".txt")]
    if split not in known:
        raise FileNotFoundError(
            f"the split must be one that {listings} lists in a file NAME.txt, "
            f"{', '.join(known) or 'of which there is none'}; got {split}. Name another, or write "
            "the file."
        )


def read_labels(path: str) -> np.ndarray:
    """The class of each pixel (H, W), uint8, of a PNG: the index into its palette, or its grey.

    Raises:
        BadExampleError: the file is no PNG of a palette or of grey, or is damaged.
    """
    data = storage.read_bytes(path)
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33 or data[25] not in (GREY, PALETTE):
        raise BadExampleError(
            f"{path} must be a PNG with a palette or of grey, a class for each pixel; it is not. "
            "Save it so."
        )
    depth = data[24]
    # OpenCV gives the colours of a palette. Told that the indices are grey, it gives these, those
    # of fewer than 8 bits spread over 0 … 255.
    header = data[12:25] + bytes([GREY]) + data[26:29]
    grey = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + _without(data[33:])
    try:
        found = cv2.imdecode(np.frombuffer(grey, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        found = None
    if found is None or depth > 8:
        raise BadExampleError(
            f"{path} must be a PNG of 8 bits or fewer a pixel that decodes; it has {depth} bits, "
            f"{len(data)} bytes. Replace it."
        )
    return found // np.uint8(255 // (2**depth - 1))


def _without(chunks: bytes) -> bytes:
    """The chunks of a PNG but its palette and transparency, which grey has not."""
    kept, place = b"", 0
    while place + 8 <= len(chunks):
        end = place + 12 + int.from_bytes(chunks[place : place + 4], "big")
        if chunks[place + 4 : place + 8] not in (b"PLTE", b"tRNS"):
            kept += chunks[place:end]
        place = end
    return kept


def images_below(folder: str) -> list[str]:
    """Paths of the image files below a folder, relative to it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not storage.is_folder(folder):
        raise FileNotFoundError(f"{folder} must be a folder; there is none. Correct the path.")
    return [name for name in storage.find_files(folder) if name.lower().endswith(IMAGE_SUFFIXES)]


def check_all_there(names: list[str], known: dict[str, str], listing: str, folder: str) -> None:
    """Refuse a list that does not match the files.

    Raises:
        FileNotFoundError: it names what is not there.
    """
    if missing := [name for name in names if name not in known]:
        raise FileNotFoundError(
            f"{listing} must name files of {folder}; {len(missing)} of {len(names)} are not there, "
            f"such as {missing[0]}. Give the folder that goes with it."
        )


def stem(name: str) -> str:
    """A name without its suffix."""
    return name.rpartition(".")[0] or name
