"""Where examples come from: TFDS data sets, image folders, tar files, synthetic images."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from crate_jax.config import DataConfig, did_you_mean
from crate_jax.data.stores import storage, tars
from crate_jax.data.stores.tfds import open_tfds

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"
)  # fmt: skip


class Examples(Protocol):
    """Random access to {"image": encoded bytes or pixels (H, W, c) uint8, "label": integer}.

    An example that comes from a file also has its "name".
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


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


def open_source(
    data: DataConfig, split: str, *, image_shape: Sequence[int], num_classes: int
) -> Source:
    """Open one split; nothing is read but what is needed to count and find its examples.

    Args:
        data: reads dataset, data_dir, download, on_bad_example, check_crc and index_dir.
        split: a TFDS split, such as ``train[:90%]``, or a folder or tar file below data_dir.
        image_shape: (H, W, c) of synthetic images; stored ones have their own.
        num_classes: of synthetic images, likewise.

    Raises:
        FileNotFoundError: the directory, split or prepared data set does not exist.
        KeyError: TFDS knows no such data set; the nearest name is suggested.
        ValueError: the data set is not one of images with labels, holds another number of examples
            than it says, is cut off (unless bad examples are skipped), or is empty.
    """
    if data.dataset == "synthetic":
        images = SyntheticImages(tuple(image_shape), num_classes)
        source = Source(f"synthetic/{split}", images, num_classes)
    elif data.data_dir is not None and not storage.is_folder(data.data_dir):
        raise FileNotFoundError(
            f"data.data_dir must be an existing directory; got {data.data_dir}. "
            "Set --config.data.data_dir."
        )
    elif data.dataset == "folder":
        source = _open_folder(data, split)
    elif data.dataset == "tar":
        source = _open_tar(data, split)
    else:
        source = Source(*open_tfds(data, split))
    if not len(source):
        raise ValueError(f"{source.name} must hold examples; it is empty. Choose another split.")
    return source


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


@dataclasses.dataclass(frozen=True)
class SyntheticImages:
    """Random pixels and labels, a function of the index alone."""

    image_shape: tuple[int, ...]
    num_classes: int
    length: int = 100_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, self.image_shape, np.uint8)
        return {"image": image, "label": int(rng.integers(self.num_classes))}


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Image files with their labels.

    Attributes:
        root: a folder.
        names: (n,) paths below it, as bytes: an array, since a million strings are slow to hand to
            workers.
        labels: (n,) int32.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = storage.join(self.root, os.fsdecode(self.names[index]))
        return {"image": storage.read_bytes(path), "label": int(self.labels[index]), "name": path}

    @property
    def length(self) -> np.ndarray:
        """(n,) int64, of each file, in bytes."""
        with ThreadPoolExecutor(16) as pool:
            paths = (storage.join(self.root, os.fsdecode(name)) for name in self.names)
            return np.fromiter(pool.map(storage.file_size, paths), np.int64, len(self))


def folder_images(root: str, labels: Callable[[str], int]) -> FolderImages:
    """The image files anywhere below a folder, in the order of their paths.

    Args:
        root: the folder.
        labels: from a path below it to its label.
    """
    found = [p for p in storage.find_files(root) if p.lower().endswith(IMAGE_SUFFIXES)]
    paths = np.array([os.fsencode(p) for p in found]) if found else np.zeros(0, "S1")
    return FolderImages(root, paths, np.array([labels(p) for p in found], np.int32))


def _open_folder(data: DataConfig, split: str) -> Source:
    """``data_dir/split/class/image``; classes are numbered in the order of their sorted names."""
    root = storage.join(_data_dir(data), split)
    # '', '.' and '..' are folders too, whose folders are no classes.
    if not split.strip("./") or not storage.is_folder(root):
        have = [name for name, is_dir in storage.list_folder(_data_dir(data)).items() if is_dir]
        raise FileNotFoundError(
            f"split must be a folder below {data.data_dir}; got {split}. "
            + did_you_mean(split, have)
        )
    classes = [name for name, is_dir in storage.list_folder(root).items() if is_dir]
    number = {name: label for label, name in enumerate(classes)}
    images = folder_images(root, lambda path: number.get(path.split("/")[0], -1))
    inside = images.labels >= 0  # what lies in no class's folder is no example
    examples = FolderImages(root, images.names[inside], images.labels[inside])
    return Source(root, examples, len(classes), tuple(classes))


def _open_tar(data: DataConfig, split: str) -> Source:
    """``data_dir/SPLIT.tar``, or one of ImageNet's own tar files."""
    folder = _data_dir(data)
    paths = tars.tar_splits(folder)
    if split not in paths:
        raise FileNotFoundError(
            f"split must be a tar file in {folder}; got {split}. " + did_you_mean(split, paths)
        )
    examples, classes, whole = tars.open_tar(
        paths[split], IMAGE_SUFFIXES, folder=folder, index_dir=data.index_dir
    )
    if not whole and data.on_bad_example == "raise":
        raise ValueError(
            f"{paths[split]} must be whole; it ends after {len(examples)} images. Restore it, or "
            "set data.on_bad_example=skip to go on with these."
        )
    return Source(f"{paths[split]}", examples, len(classes), tuple(classes))


def _data_dir(data: DataConfig) -> str:
    if data.data_dir is None:
        raise ValueError(
            f"data.data_dir must be set for a {data.dataset}. Set --config.data.data_dir=ROOT."
        )
    return data.data_dir
