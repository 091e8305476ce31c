"""Write a folder or ImageNet's tar files as a TFDS data set in array_record files."""

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.rows import patiently
from crate_jax.data.stores import storage, tars
from crate_jax.data.stores.examples import FINGERPRINT
from crate_jax.data.stores.sources import STORES, Source, check_same_classes, open_source
from crate_jax.files import Json, expanded, written_aside
from crate_jax.waiting import Add, counting

# Examples a file: about 140 MB of ImageNet, whose training split then has TFDS's 1,025 files.
SHARD_EXAMPLES = 1250

IMAGENET, IMAGENET_VERSION = "imagenet2012", "5.1.0"  # as TFDS calls them


def prepare(
    source_dir: str,
    target_dir: str,
    *,
    name: str | None = None,
    shard_examples: int = SHARD_EXAMPLES,
    say: Callable[[str], object] | None = None,
) -> Json:
    """Write every split of a folder or of tar files into ``target_dir/name/version``.

    Images are copied byte for byte, in an order drawn once, so that ``train[:10%]`` has all
    classes. Each file appears whole or not at all, and the data set's description last: what was
    stopped goes on after its last whole file when it is started again, if the source is the same
    by its classes and by the names, labels and sizes of its images.

    Args:
        source_dir: holds a folder or a tar file for each split, as `open_source` reads them.
        target_dir: what ``data.data_dir`` will be.
        name: what ``data.dataset`` will be, NAME or NAME:VERSION, not one of TFDS's own; None for
            the thousand classes of ILSVRC 2012, which become ``imagenet2012``.
        shard_examples: examples a file, >= 1.
        say: called with a line of progress after each file.

    Returns:
        ``dataset``, ``data_dir``, ``path``, ``splits`` (examples of each), ``files`` and how many
        were ``written`` now.

    Raises:
        ValueError, FileNotFoundError: there is nothing to prepare, splits differ in their classes,
            a name does not fit, the target holds something else, or the source has changed.
    """
    source_dir, target_dir = expanded(source_dir, "--from"), expanded(target_dir, "--to")
    if storage.is_remote(target_dir):
        raise ValueError(f"--to must be a local folder; got {target_dir}. Copy the result there.")
    sources = _open_splits(source_dir)
    first = next(iter(sources.values()))
    for source in sources.values():
        check_same_classes(first, source)
    name, version = _name_and_version(name, first.class_names)
    folder = Path(target_dir) / name / version
    files = {
        split: [folder / _file_name(name, split, i, count) for i in range(count)]
        for split, source in sources.items()
        if (count := -(-len(source) // shard_examples))
    }
    _check_class_names(first.class_names)
    _check_target(folder, {path.name for paths in files.values() for path in paths})
    folder.mkdir(parents=True, exist_ok=True)
    _keep_fingerprint(folder, _fingerprint(sources, shard_examples))
    written = _write_splits(folder, version, sources, files, say)
    return {
        "dataset": name,
        "data_dir": str(target_dir),
        "path": str(folder),
        "splits": {split: len(source) for split, source in sources.items()},
        "files": sum(map(len, files.values())),
        "written": written,
    }


def _write_splits(
    folder: Path,
    version: str,
    sources: dict[str, Source],
    files: dict[str, list[Path]],
    say: Callable[[str], object] | None,
) -> int:
    """Write the files that are not there yet, then the description; how many were written."""
    import tensorflow_datasets as tfds

    (names,) = {source.class_names for source in sources.values()}
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(names)),
            "file_name": tfds.features.Text(),
        }
    )
    written, infos = 0, []
    for split, paths in files.items():
        order = np.random.default_rng(0).permutation(len(sources[split]))
        shards = [order[i :: len(paths)] for i in range(len(paths))]
        with counting(f"prepare {split}", len(order), "images") as add:
            for i, (path, shard) in enumerate(zip(paths, shards, strict=True)):
                if not path.exists():
                    _write_shard(path, sources[split], shard, features, add)
                    written += 1
                else:
                    add(len(shard))
                if say:
                    say(f"{split}: file {i + 1} of {len(paths)}, {path.name}")
        size = sum(path.stat().st_size for path in paths)
        lengths = [len(shard) for shard in shards]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command's result
        tfds.folder_dataset.write_metadata(
            data_dir=str(folder),
            features=features,
            split_infos=infos,
            version=version,
            check_data=False,
        )
    return written


def _open_splits(source_dir: str) -> dict[str, Source]:
    """Every folder, or else every tar file, of a folder, as a split."""
    if not storage.is_folder(source_dir):
        raise FileNotFoundError(f"--from must be an existing folder; got {source_dir}.")
    splits, kind = list(tars.tar_splits(source_dir)), "tar"
    folders = storage.list_subfolders(source_dir)
    if splits and folders:
        raise ValueError(
            f"--from must hold folders or tar files, not both; got {folders[0]} beside the tar "
            f"file of {splits[0]}. Move one away."
        )
    if not splits:
        splits, kind = folders, "folder"
    for split in splits:
        if not re.fullmatch(r"\w[\w-]*", split, re.ASCII) or split == "all":
            raise ValueError(
                f"splits must be named by letters, digits, _ and -, and not all; got {split!r}. "
                f"Rename it in {source_dir}."
            )
    if not splits:
        raise ValueError(
            f"--from must hold a folder or a tar file for each split; got {source_dir}. "
            "See docs/data.md."
        )
    data = DataConfig(dataset=kind, data_dir=source_dir)
    return {
        split: open_source(data, split, image_shape=(1, 1, 3), num_classes=1) for split in splits
    }


def _name_and_version(name: str | None, classes: tuple[str, ...]) -> tuple[str, str]:
    """The name and version of the data set.

    A name of TFDS's own would bring TFDS's own classes with it.
    """
    from tensorflow_datasets.core import registered

    name, _, version = (name or "").partition(":")
    if classes == tuple(tars.imagenet_classes()) and name in ("", IMAGENET):
        return IMAGENET, version or IMAGENET_VERSION
    taken = {*registered.list_imported_builders(), *STORES}
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in taken:
        raise ValueError(
            "--name must be a name of your own, of small letters, digits and _; got "
            f"{name or 'none'}. TFDS reads {IMAGENET} with the thousand classes of ILSVRC 2012 "
            "alone."
        )
    if version and not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version, re.ASCII):
        raise ValueError(f"--name's version must be of three numbers; got {version}. Write 1.0.0.")
    return name, version or "1.0.0"


def _check_target(folder: Path, planned: set[str]) -> None:
    """Check that all data files in the target are among the planned ones."""
    found = {p.name for p in folder.glob("*array_record*")} if folder.is_dir() else set()
    if odd := sorted(found - planned):
        raise ValueError(
            f"{folder} must hold nothing else; got {odd[0]}. Name another --to, or remove it."
        )


def _check_class_names(classes: tuple[str, ...]) -> None:
    """TFDS keeps the names in a text file, one on a line."""
    for name in classes:
        if name.encode(errors="ignore").decode().strip().splitlines() != [name]:
            raise ValueError(
                "classes must have names that are a line of text, without a space at an end; got "
                f"{name!r}. Rename its folder."
            )


def _fingerprint(sources: dict[str, Source], shard_examples: int) -> str:
    """A hash of all that decides what the files hold, but for the bytes of the images."""
    digest = hashlib.sha256(repr(shard_examples).encode())
    for split, source in sources.items():
        digest.update(repr((split, len(source), source.class_names)).encode())
        images: Any = source.examples  # FolderImages or TarImages
        for array in (images.names, images.labels, images.length):
            digest.update(f"{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _keep_fingerprint(folder: Path, fingerprint: str) -> None:
    """Write it down before the first file; files that are there must be of the same."""
    path = folder / FINGERPRINT
    if path.exists() or any(folder.glob("*array_record*")):
        if not path.exists() or path.read_text() != fingerprint:
            raise ValueError(
                f"{folder} must hold files of this source; they were prepared from another. "
                "Remove it, or name another --to."
            )
        return
    with written_aside(path) as aside:
        aside.write_text(fingerprint)


def _file_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def _write_shard(path: Path, source: Source, indices: np.ndarray, features: Any, add: Add) -> None:
    """One file, whole or not at all."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    with written_aside(path) as aside:
        writer: Any = ArrayRecordWriter(str(aside), "group_size:1")
        try:
            for index in indices.tolist():
                name = f"{source.name}[{index}]"
                example = patiently(functools.partial(source.examples.__getitem__, index), name)
                record = {
                    "image": example["image"],  # the bytes as they are
                    "label": np.int64(example["label"]),
                    "file_name": os.path.basename(example.get("name", "")).encode(errors="replace"),
                }
                writer.write(serializer.serialize_example(record))
                add(1)
        finally:
            writer.close()
