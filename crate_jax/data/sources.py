"""Where examples come from: TFDS data sources, image folders, synthetic images."""

import contextlib
import dataclasses
import functools
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crate_jax.config import DataConfig, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Examples(Protocol):
    """Random access to {"image": encoded bytes or pixels (H, W, c) uint8, "label": integer}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of one data set.

    Attributes:
        name: what errors and logs call it, such as ``digits/train``.
        examples: random access to the examples.
        num_classes: labels are in [0, num_classes).
    """

    name: str
    examples: Examples
    num_classes: int

    def __len__(self) -> int:
        return len(self.examples)


def open_source(
    data: DataConfig, split: str, *, image_shape: Sequence[int], num_classes: int
) -> Source:
    """Open one split; nothing is read but what is needed to count and find its examples.

    Args:
        data: reads dataset, data_dir and download.
        split: a TFDS split, such as ``train[:90%]``, or a folder below data_dir.
        image_shape: (H, W, c) of synthetic images; stored ones have their own.
        num_classes: of synthetic images, likewise.

    Raises:
        FileNotFoundError: the directory, split or prepared data set does not exist.
        KeyError: TFDS knows no such data set; the nearest name is suggested.
        ValueError: the data set is not one of images with labels, is stored as TFRecord, holds
            another number of examples than it says, or is empty.
    """
    if data.dataset == "synthetic":
        images = SyntheticImages(tuple(image_shape), num_classes)
        source = Source(f"synthetic/{split}", images, num_classes)
    elif data.data_dir is not None and not os.path.isdir(data.data_dir):
        raise FileNotFoundError(
            f"data.data_dir must be an existing directory; got {data.data_dir}. "
            "Set --config.data.data_dir."
        )
    elif data.dataset == "folder":
        source = _open_folder(data, split)
    else:
        source = _open_tfds(data, split)
    if not len(source):
        raise ValueError(f"{source.name} must hold examples; it is empty. Choose another split.")
    return source


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
    """Image files with their labels."""

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": Path(path).read_bytes(), "label": self.labels[index], "name": path}


def image_paths(folder: str | Path) -> list[Path]:
    """The image files anywhere below a folder, in the order of their paths."""
    return [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]


def _open_folder(data: DataConfig, split: str) -> Source:
    """``data_dir/split/class/image``; classes are numbered in the order of their sorted names."""
    if data.data_dir is None:
        raise ValueError("data.data_dir must be set for a folder. Set --config.data.data_dir=ROOT.")
    root = Path(data.data_dir) / split
    if not root.is_dir():
        have = sorted(p.name for p in Path(data.data_dir).iterdir() if p.is_dir())
        raise FileNotFoundError(
            f"split must be a folder below {data.data_dir}; got {split}. "
            + did_you_mean(split, have)
        )
    classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    found = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in image_paths(root / name)
    ]
    examples = FolderImages([path for path, _ in found], [label for _, label in found])
    return Source(f"{root}", examples, len(classes))


def _open_tfds(data: DataConfig, split: str) -> Source:
    """A TFDS data set that is prepared as array_record or parquet; images stay encoded."""
    import tensorflow_datasets as tfds

    builder = _tfds_builder(data)
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise ValueError(
            f"data.dataset must have the features image and label; got {data.dataset}."
        )
    try:
        length = builder.info.splits[split].num_examples
    except ValueError as error:
        raise FileNotFoundError(
            f"split must be one of {', '.join(builder.info.splits)}, or part of one; got {split}. "
            + did_you_mean(split, builder.info.splits)
        ) from error
    images = [name for name, f in features.items() if isinstance(f, tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    again = "Prepare it again with file_format='array_record'."
    try:  # TFDS opens no empty split
        examples: Any = builder.as_data_source(split, decoders=decoders) if length else []
    except NotImplementedError as error:
        raise ValueError(
            f"data.dataset must be prepared as array_record or parquet; {data.dataset} in "
            f"{builder.data_path} is not. {again}"
        ) from error
    # TFDS drops examples when it writes parquet, and reads whole files where a part is asked for.
    if len(examples) != length:
        raise ValueError(
            f"{data.dataset}/{split} must hold {length} examples; TFDS reads {len(examples)} of "
            f"{builder.data_path}. {again}"
        )
    return Source(f"{data.dataset}/{split}", examples, features["label"].num_classes)


def _tfds_builder(data: DataConfig) -> Any:
    """The prepared builder, or the reason why there is none."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if data.dataset == "digits":
        from crate_jax.data.digits import Digits as make

        download = True  # from no network: scikit-learn has them
        tfds.disable_progress_bar()  # it takes two seconds
    else:
        make, download = functools.partial(tfds.builder, data.dataset), data.download
    try:
        builder = make(data_dir=data.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = {"digits", "folder", "synthetic", *registered.list_imported_builders()}
        raise KeyError(
            f"data.dataset must be digits, folder, synthetic or a TFDS name; got {data.dataset}. "
            + did_you_mean(data.dataset, known)
        ) from error
    except (AssertionError, ValueError) as error:  # of the version; of the spelling or the config
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "data.dataset must be a TFDS name, or name/config, or name:version; got "
            f"{data.dataset} ({reason}). Set --config.data.dataset."
        ) from error
    if not builder.is_prepared():
        if not download:
            raise FileNotFoundError(
                f"data.dataset must be prepared; {data.dataset} is not in {builder.data_path}. "
                "Set --config.data.data_dir to where it is, or let TFDS download and prepare it "
                "with --config.data.download=True."
            )
        builder = make(data_dir=data.data_dir, file_format="array_record")
        # TFDS reports on stdout, which belongs to the command's own result.
        report = io.StringIO() if data.dataset == "digits" else sys.stderr
        with contextlib.redirect_stdout(report):
            builder.download_and_prepare()
    return builder
