"""Images in tar files, by random access: ImageNet's own, or any of ``class/…/image`` members."""

import contextlib
import dataclasses
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from crate_jax.data import storage

# What the files of ILSVRC 2012 are called, and what TFDS calls their splits.
IMAGENET_SPLITS = {"ILSVRC2012_img_train": "train", "ILSVRC2012_img_val": "validation"}


@dataclasses.dataclass(frozen=True)
class TarImages:
    """Image files within a tar file, with their labels.

    Attributes:
        path: of the tar file.
        names: (n,) of the members, as bytes; what is in a tar of the tar is below its name.
        offset: (n,) int64, where a member's bytes begin.
        length: (n,) int64.
        labels: (n,) int32.
    """

    path: str
    names: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = int(self.length[index])
        data = storage.read_bytes(self.path, int(self.offset[index]), length)
        name = self.names[index].decode(errors="surrogateescape")
        if len(data) < length:
            raise ValueError(f"{self.path} ends in the middle of {name}")
        return {"image": data, "label": int(self.labels[index]), "name": name}


def tar_splits(folder: str) -> dict[str, str]:
    """The splits that the tar files of a folder are, and their paths."""
    stems = [name[:-4] for name, is_dir in storage.list_folder(folder).items()
             if name.endswith(".tar") and not is_dir]  # fmt: skip
    return {IMAGENET_SPLITS.get(s, s): storage.join(folder, f"{s}.tar") for s in stems}


def open_tar(
    path: str, suffixes: tuple[str, ...], *, folder: str, index_dir: str | None
) -> tuple[TarImages, list[str], bool]:
    """Index the images of a tar file and number their classes.

    Classes are the first folders (or tar files) within, in the order of their sorted names; a
    single folder around them all does not count. In ImageNet's own files they are the thousand of
    ILSVRC 2012 whatever is there, and validation images, which lie in no folder, have the labels
    that TFDS lists.

    Args:
        path: of the tar file.
        suffixes: of the names of images, lower-case.
        folder: where the index is kept if it can.
        index_dir: where it is kept instead.

    Returns:
        The images, the names of the classes, and whether the file is whole.

    Raises:
        ValueError: it is no tar file, or an image lies in no folder.
    """

    def build() -> dict[str, np.ndarray]:
        found, whole = [], True
        with storage.open_binary(path) as file:
            try:
                for name, offset, length in _members(file, 0, ""):
                    if name.lower().endswith(suffixes):
                        found.append((name, offset, length))
            except tarfile.ReadError as error:
                if not found:
                    raise ValueError(
                        f"{path} must be an uncompressed tar file; {error}. Unpack or restore it."
                    ) from error
                whole = False  # what comes before the damage is there still
        found.sort(key=lambda item: item[0].split("/"))
        return {
            "names": np.array([n.encode(errors="surrogateescape") for n, _, _ in found] or [b""]),
            "places": np.array([item[1:] for item in found], np.int64).reshape(-1, 2),
            "whole": np.array(whole),
        }

    arrays = storage.cached_index({path: storage.file_size(path)}, folder, index_dir, build)
    places = arrays["places"]
    names = arrays["names"][: len(places)]
    labels, classes = _label(path, [n.decode(errors="surrogateescape") for n in names])
    images = TarImages(path, names, places[:, 0], places[:, 1], np.array(labels, np.int32))
    return images, classes, bool(arrays["whole"])


def _members(file: BinaryIO, start: int, folder: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of each file in a tar, and in the tars within it."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = folder + member.name.removeprefix("./")
            if member.isfile() and name.endswith(".tar"):
                with contextlib.closing(tar.extractfile(member)) as inner:  # type: ignore[type-var]
                    place = start + member.offset_data
                    yield from _members(inner, place, name[:-4] + "/")  # type: ignore[arg-type]
            elif member.isfile():
                yield name, start + member.offset_data, member.size


def _label(path: str, names: list[str]) -> tuple[list[int], list[str]]:
    """A label for each member, and the names of the classes."""
    parts = [name.split("/") for name in names]
    if names and all(len(p) > 2 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    imagenet = PurePosixPath(path).stem in IMAGENET_SPLITS
    if imagenet:
        classes = imagenet_classes()
        if all(len(p) == 1 for p in parts):
            synsets = _tfds_lines("validation_labels.txt")
            parts = [[synsets[int(p[0].split("_")[-1].split(".")[0]) - 1], p[0]] for p in parts]
    else:
        classes = sorted({p[0] for p in parts if len(p) > 1})
    numbers = {name: i for i, name in enumerate(classes)}
    for name, part in zip(names, parts, strict=True):
        if len(part) < 2 or part[0] not in numbers:
            raise ValueError(
                f"{path} must hold class/image files; got {name}. Put it into a class's folder."
            )
    return [numbers[p[0]] for p in parts], classes


def imagenet_classes() -> list[str]:
    """The thousand synsets of ILSVRC 2012, in the order of their labels."""
    return _tfds_lines("labels.txt")


def _tfds_lines(name: str) -> list[str]:
    """A list that TFDS ships for ImageNet."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()
