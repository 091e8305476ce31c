"""Images in tar files, by random access: ImageNet's own, or any of ``class/…/image`` members."""

import dataclasses
import functools
import posixpath
import re
import tarfile
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.rows import patiently
from crate_jax.data.stores import storage
from crate_jax.data.stores.examples import (
    IMAGE_SUFFIXES,
    Example,
    Source,
    listing_of,
    pack_names,
    unpack_name,
)
from crate_jax.waiting import Add, counting

_SHORTEST_END, _LONGEST_END = 1024, 2**20  # bytes of zeros
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

# The names of ILSVRC 2012's files, and TFDS's names of their splits.
IMAGENET_SPLITS = {"ILSVRC2012_img_train": "train", "ILSVRC2012_img_val": "validation"}


@dataclasses.dataclass(frozen=True)
class TarImages:
    """Image files within a tar file, with their labels.

    Attributes:
        path: the path of the tar file.
        names: (n,) of the members, of `pack_names`; what is in a tar of the tar is below its name.
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

    def __getitem__(self, index: int) -> Example:
        length = int(self.length[index])
        data = storage.read_bytes(self.path, int(self.offset[index]), length)
        name = unpack_name(self.names[index])
        if len(data) < length:
            raise ValueError(f"{self.path} ends in the middle of {name}")
        return {"image": data, "label": int(self.labels[index]), "name": name}


def tar_splits(folder: str) -> dict[str, str]:
    """The splits of a folder of tar files, and their paths.

    Raises:
        ValueError: two files are the same split.
    """
    splits: dict[str, str] = {}
    for name, is_dir in storage.list_folder(folder).items():
        split = IMAGENET_SPLITS.get(name[:-4], name[:-4])
        if not name.endswith(".tar") or is_dir:
            continue
        if split in splits:
            raise ValueError(
                f"{folder} must hold one tar file for {split}; got {splits[split]} and {name}. "
                "Move one away."
            )
        splits[split] = storage.join(folder, name)
    return splits


def open_tar(data: DataConfig, split: str, **_: object) -> Source:
    """The images of ``data_dir/SPLIT.tar``, or of one of ImageNet's own tar files.

    Classes are the first folders (or tar files) within, in the order of their sorted names, empty
    ones too; a single folder around them all does not count. In ImageNet's own files they are the
    thousand of ILSVRC 2012 whatever is there, and validation images, which lie in no folder, have
    the labels that TFDS lists. Links are followed within the file; of a name that is there twice,
    the last counts, as when it is unpacked; hidden files and folders (``.name``) do not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tar file or is cut off, an image lies in no folder, a link leads
            nowhere.
    """
    folder = storage.data_folder(data)
    paths = tar_splits(folder)
    if split not in paths:
        raise storage.unknown_split(f"a tar file in {folder}", split, paths)
    path = paths[split]
    # Random access needs to know where each member begins, which only the headers before it tell.
    build = functools.partial(patiently, functools.partial(_index, path), path)
    arrays = storage.cached_index([path], folder, data.index_dir, build)
    if not arrays["whole"] and data.on_bad_example == "raise":
        raise ValueError(
            f"{path} must be whole; it ends after {len(arrays['names'])} images. Restore it, or "
            "set data.on_bad_example=skip to go on with these."
        )
    names, folders = (list(map(unpack_name, arrays[k].tolist())) for k in ("names", "folders"))
    if PurePosixPath(path).stem in IMAGENET_SPLITS:
        labels, classes = _imagenet_labels(path, names)
    else:
        labels, classes = _folder_labels(path, names, folders)
    offset, length = arrays["places"].T
    images = TarImages(path, arrays["names"], offset, length, np.array(labels, np.int32))
    listing = listing_of("names and labels", images.names, images.labels)
    return Source(path, images, len(classes), tuple(classes), listing)


def _index(path: str) -> dict[str, np.ndarray]:
    """Names and places of the images in a tar file, its folders, and whether it is whole."""
    contents = _Contents()
    with storage.open_binary(path) as file:
        try:
            with counting(
                f"index {posixpath.basename(path)}", storage.file_size(path), "bytes"
            ) as add:
                contents.read(file, 0, "", add)
        except tarfile.ReadError as error:
            if not contents.files:
                raise ValueError(
                    f"{path} must be an uncompressed tar file; {error}. Unpack or restore it."
                ) from error
            contents.whole = False  # what comes before the damage is there still
    for name, target in contents.follow_links().items():
        if contents.whole and not _is_hidden(name):  # it may have been a whole class
            raise ValueError(
                f"{path} must hold the files that its links lead to; {name} leads to {target}. "
                "Pack it with --dereference."
            )
    images = [n for n in contents.files if n.lower().endswith(IMAGE_SUFFIXES)]
    names = sorted((n for n in images if not _is_hidden(n)), key=lambda name: name.split("/"))
    places = np.array([contents.files[n] for n in names], np.int64)
    return {
        "names": pack_names(names),
        "places": places.reshape(-1, 2),
        "folders": pack_names(sorted(n for n in contents.folders if not _is_hidden(n))),
        "whole": np.array(contents.whole),
    }


class _Contents:
    """The members of a tar file, and of the tar files within it.

    Attributes:
        files: name to (first byte, length).
        folders: names.
        links: name to the name that it stands for.
        inner: what lies below the tar files within it begins with one of these.
        whole: whether it ends as tar files do, and those within it.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.folders: set[str] = set()
        self.links: dict[str, str] = {}
        self.inner: set[str] = set()
        self.whole = True

    def read(self, file: IO[bytes], start: int, folder: str, add: Add = lambda more: None) -> None:
        """Take in the members of a tar that begins at a byte of the outermost, below a folder."""
        with tarfile.open(fileobj=file, mode="r:") as tar:
            before = 0
            for member in tar:
                add(member.offset - before)
                before = member.offset
                name = posixpath.normpath(folder + member.name.lstrip("/"))
                if name.startswith("../"):
                    raise ValueError(f"{member.name} must lie within the tar file. Pack it again.")
                if member.isdir():
                    self.folders.add(name)
                elif member.islnk():  # a hard link names its file from the top, a symbolic one …
                    target = folder + member.linkname.lstrip("/")
                    self.links[name] = posixpath.normpath(target)
                elif member.issym():  # … from where it lies
                    target = posixpath.join(posixpath.dirname(name), member.linkname)
                    self.links[name] = posixpath.normpath(target)
                elif member.isfile():
                    self._add(tar, member, name, start + member.offset_data)
            # A damaged or missing header ends the loop as the end does, but nothing but zeros, two
            # blocks at least and at most a record, comes after the end.
            file.seek(tar.offset)
            rest = file.read(_LONGEST_END + 1)
            self.whole &= _SHORTEST_END <= len(rest) <= _LONGEST_END and not any(rest)

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, place: int) -> None:
        """Take in a file whose bytes begin at a place, and what is in it if it is a tar."""
        if member.issparse():
            raise ValueError(
                f"{name} must be stored as it is; it is sparse. Pack without --sparse."
            )
        if name.endswith(_COMPRESSED):
            raise ValueError(f"{name} must be an uncompressed tar file. Unpack it first.")
        if not name.endswith(".tar"):
            self.links.pop(name, None)
            self.files[name] = (place, member.size)
            return
        below = name[:-4] + "/"
        if below in self.inner:  # packed again: only its last state counts
            self.files = {n: p for n, p in self.files.items() if not n.startswith(below)}
        self.inner.add(below)
        self.folders.add(name[:-4])
        if within := tar.extractfile(member):
            with within:
                self.read(within, place, below)

    def follow_links(self) -> dict[str, str]:
        """Give linked names the files that they lead to; return the links that lead to none."""
        lost = {}
        for name, target in self.links.items():
            seen = {name}
            while target in self.links and target not in seen:
                seen.add(target)
                target = self.links[target]
            if target in self.files:
                self.files[name] = self.files[target]
            else:
                lost[name] = target
        return lost


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _folder_labels(path: str, names: list[str], folders: list[str]) -> tuple[list[int], list[str]]:
    """A label for each image by its first folder, and the names of the classes."""
    parts = [name.split("/") for name in names]
    first = {p[0] for p in parts}
    around = first | {f.split("/")[0] for f in folders}
    if len(first) == 1 < len(around) and all(len(p) > 2 for p in parts):
        raise ValueError(
            f"{path} must hold class/image files; all are below {parts[0][0]}, beside other folders"
            ". Pack what is in it."
        )
    if len(around) == 1 and any(len(p) > 2 for p in parts):
        parts = [p[1:] for p in parts]
        folders = [below for f in folders if (below := f.partition("/")[2])]
    if stray := next((name for name, p in zip(names, parts, strict=True) if len(p) < 2), None):
        raise ValueError(
            f"{path} must hold class/image files; got {stray}. Put it into a class's folder."
        )
    classes = sorted({p[0] for p in parts} | {f.split("/")[0] for f in folders})
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers[p[0]] for p in parts], classes


def _imagenet_labels(path: str, names: list[str]) -> tuple[list[int], list[str]]:
    """The labels of ILSVRC 2012: by the synset's folder, or by the number of a validation image."""
    classes = imagenet_classes()
    numbers = {name: i for i, name in enumerate(classes)}
    validation = _tfds_lines("validation_labels.txt")
    labels = []
    for name in names:
        parts = name.split("/")
        synset = next((part for part in parts[:-1] if part in numbers), None)
        found = re.fullmatch(r"ILSVRC2012_val_0*(\d+)\.jpe?g", parts[-1], re.IGNORECASE)
        if synset is None and found and 1 <= int(found[1]) <= len(validation):
            synset = validation[int(found[1]) - 1]
        if synset is None:
            raise ValueError(
                f"{path} must hold the images of ILSVRC 2012; got {name}. Name it otherwise, if it "
                "holds others."
            )
        labels.append(numbers[synset])
    return labels, classes


def imagenet_classes() -> list[str]:
    """The thousand synsets of ILSVRC 2012, in the order of their labels."""
    return _tfds_lines("labels.txt")


def _tfds_lines(name: str) -> list[str]:
    """A list that TFDS ships for ImageNet."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()
