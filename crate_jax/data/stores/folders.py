"""Image files in folders: one folder a class, or anywhere for tasks without labels."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.stores import storage
from crate_jax.data.stores.examples import (
    IMAGE_SUFFIXES,
    Example,
    Source,
    listing_of,
    pack_names,
    unpack_name,
)


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Image files with their labels.

    Attributes:
        root: a folder.
        names: (n,) paths below it, as bytes, of `pack_names`.
        labels: (n,) int32.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        path = storage.join(self.root, unpack_name(self.names[index]))
        return {"image": storage.read_bytes(path), "label": int(self.labels[index]), "name": path}

    @property
    def length(self) -> np.ndarray:
        """(n,) int64, of each file, in bytes."""
        with ThreadPoolExecutor(16) as pool:
            paths = (storage.join(self.root, unpack_name(name)) for name in self.names)
            return np.fromiter(pool.map(storage.file_size, paths), np.int64, len(self))


def folder_images(root: str, labels: Callable[[str], int]) -> FolderImages:
    """The image files anywhere below a folder, in the order of their paths.

    Args:
        root: the folder.
        labels: from a path below it to its label.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not storage.is_folder(root):
        raise FileNotFoundError(f"{root} must be a folder; there is none. Correct the path.")
    found = [p for p in storage.find_files(root) if p.lower().endswith(IMAGE_SUFFIXES)]
    return FolderImages(root, pack_names(found), np.array([labels(p) for p in found], np.int32))


def open_folder(data: DataConfig, split: str, *, labelled: bool = True, **_: object) -> Source:
    """``data_dir/split/class/…/image``; classes are numbered in the order of their names.

    Without labels ``data_dir/split/…/image``, wherever they lie, or ``data_dir/…/image`` as the
    split ``.``.
    """
    folder = storage.data_folder(data)
    if not labelled and split == ".":
        return _without_labels(folder)
    root = storage.join(folder, split)
    # '', '.' and '..' are folders too, whose folders are no classes.
    if not split.strip("./") or not storage.is_folder(root):
        have = storage.list_subfolders(folder)
        raise storage.unknown_split(f"a folder below {folder}", split, have)
    if not labelled:
        return _without_labels(root)
    classes = storage.list_subfolders(root)
    number = {name: label for label, name in enumerate(classes)}
    images = folder_images(root, lambda path: number.get(path.split("/")[0], -1))
    inside = images.labels >= 0  # what lies in no class's folder is no example
    if len(images) and not inside.any():
        raise ValueError(
            f"{root} must hold a folder of images for each class; got {len(images)} in no such "
            "folder. Move each image into the folder of its class, SPLIT/CLASS/image.jpg."
        )
    examples = FolderImages(root, images.names[inside], images.labels[inside])
    listing = listing_of("names and labels", examples.names, examples.labels)
    return Source(root, examples, len(classes), tuple(classes), listing)


def _without_labels(root: str) -> Source:
    """All images below a folder, as if of one class."""
    examples = folder_images(root, lambda path: 0)
    return Source(root, examples, 1, listing=listing_of("names", examples.names))
