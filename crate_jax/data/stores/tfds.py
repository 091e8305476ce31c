"""TFDS data sets, prepared as array_record, parquet or TFRecord, without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from crate_jax.config import DataConfig, did_you_mean
from crate_jax.data.stores import storage, tfrecord
from crate_jax.data.stores.examples import Example, Source
from crate_jax.errors import of_the_system

Builder = Any  # tfds.core.DatasetBuilder, which takes seconds to import


class Records(Protocol):
    """Random access to the examples of a split as TFDS holds them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tfrecord.Record: ...


class UnknownDatasetError(KeyError):
    """TFDS knows no data set of that name; `known` are those that it knows."""

    def __init__(self, name: str, known: list[str]):
        super().__init__(name)
        self.known = known


def open_tfds(data: DataConfig, split: str, **_: object) -> Source:
    """A split of a data set that is prepared, or that TFDS may download; images stay encoded."""
    import tensorflow_datasets as tfds

    builder = _prepared(functools.partial(tfds.builder, data.dataset), data, sys.stderr)
    return _open_split(builder, data, split)


def open_digits(data: DataConfig, split: str, **_: object) -> Source:
    """A split of scikit-learn's digits, which are prepared where they are not."""
    import tensorflow_datasets as tfds

    from crate_jax.data.stores.digits import Digits

    tfds.disable_progress_bar()  # it takes two seconds
    # scikit-learn has them: nothing is downloaded.
    data = dataclasses.replace(data, download=True)
    return _open_split(_prepared(Digits, data, io.StringIO()), data, split)


def _open_split(builder: Builder, data: DataConfig, split: str) -> Source:
    """A split of a prepared data set, after its features and its length have been checked."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise ValueError(
            f"data.dataset must have the features image and label; got {data.dataset}."
        )
    if not isinstance(label := features["label"], tfds.features.ClassLabel):
        raise ValueError(
            f"data.dataset must have a ClassLabel as its label; that of {data.dataset} is a "
            f"{type(label).__name__}. Prepare it with tfds.features.ClassLabel."
        )
    try:
        length = builder.info.splits[split].num_examples
    except ValueError as error:
        raise FileNotFoundError(
            f"split must be one of {', '.join(builder.info.splits)}, or part of one; got {split}. "
            + did_you_mean(split, builder.info.splits)
        ) from error
    name = f"{data.dataset}/{split}"
    examples = TfdsExamples(_random_access(builder, data, split, name) if length else [])
    # TFDS drops examples when it writes parquet, and reads whole files where a part is asked for.
    if len(examples) != length:
        raise ValueError(
            f"{name} must hold {length} examples; TFDS reads {len(examples)} of "
            f"{builder.data_path}. Prepare it again with file_format='array_record'."
        )
    return Source(name, examples, label.num_classes or 0, tuple(label.names or ()))


def _random_access(builder: Builder, data: DataConfig, split: str, name: str) -> Records:
    """The examples of a split by index: ours of TFRecord, TFDS's of array_record and parquet."""
    import tensorflow_datasets as tfds

    features, file_format = builder.info.features, builder.info.file_format
    kind = file_format.value if file_format else "unknown"
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    if kind != "tfrecord":
        return _as_data_source(builder, split, decoders, name, kind)
    examples = tfrecord.open_tfrecords(
        builder.info.splits[split].file_instructions,
        functools.partial(features.deserialize_example_np, decoders=decoders),
        folder=str(builder.data_path),
        index_dir=data.index_dir,
        check_crc=data.check_crc,
    )
    if examples.missing and data.on_bad_example == "raise":
        raise ValueError(
            f"{name} must have whole files; {examples.missing[0]} ends before its last "
            "example. Restore it, or set data.on_bad_example=skip to go on without."
        )
    return examples


def _as_data_source(
    builder: Builder, split: str, decoders: Mapping[str, object], name: str, kind: str
) -> Records:
    """TFDS's own random access to array_record and parquet."""
    if storage.is_remote(str(builder.data_path)):
        raise ValueError(
            f"{name} must be local: {kind} files cannot be read from {builder.data_path}. "
            "Mount the bucket as a folder, or prepare the data set as TFRecord."
        )
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"data.dataset must be prepared as array_record, parquet or tfrecord; {name} is "
            f"{kind}. Prepare it again with file_format='array_record'."
        ) from error
    except (ImportError, NameError, MemoryError):
        raise
    except Exception as error:  # whatever pyarrow calls a damaged file; it reads all at once
        if of_the_system(error):  # too many open files, say, which says nothing of these
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{name} must have whole files; {builder.data_path} does not open ({reason}). "
            "Restore it."
        ) from error


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of TFDS under the names that `Example` has."""

    examples: Records

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if index >= len(self):
            raise IndexError(index)  # which ends a loop over the examples
        example = self.examples[index]
        found: Example = {"image": example["image"], "label": int(example["label"])}
        if isinstance(name := example.get("file_name"), bytes):
            found["name"] = name.decode(errors="replace")
        return found


def _prepared(make: Callable[..., Builder], data: DataConfig, report: TextIO) -> Builder:
    """The builder that `make` makes, prepared, or the reason why there is none.

    TFDS reports on stdout, which belongs to the command's own result: it goes to `report`.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if data.data_dir is not None:
        storage.data_folder(data)
    try:
        builder = make(data_dir=data.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UnknownDatasetError(data.dataset, registered.list_imported_builders()) from error
    except (AssertionError, ValueError) as error:  # of the version; of the spelling or the config
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "data.dataset must be a TFDS name, or name/config, or name:version; got "
            f"{data.dataset} ({reason}). Set --config.data.dataset."
        ) from error
    if builder.is_prepared():
        return builder
    if not data.download:
        raise FileNotFoundError(
            f"data.dataset must be prepared; {data.dataset} is not in {builder.data_path}. "
            f"{_where_it_may_be(data, builder)}, or let TFDS download and prepare it with "
            "--config.data.download=True."
        )
    builder = make(data_dir=data.data_dir, file_format="array_record")
    try:
        with contextlib.redirect_stdout(report):
            builder.download_and_prepare()
    except OSError as error:
        # Another process of this run, say, has been quicker: the same files are there.
        folder, builder = builder.data_path, make(data_dir=data.data_dir)
        if not builder.is_prepared():
            if error.filename is None:  # of the network, say
                raise
            raise OSError(
                f"data.data_dir must take what TFDS prepares; {folder} does not ({error}). Mend "
                "it, or set --config.data.data_dir to another folder."
            ) from error
    except ImportError as error:
        raise ValueError(
            f"data.dataset must be prepared; TFDS needs a package to prepare {data.dataset} "
            f"({error.msg}). Install it (pip install tensorflow-cpu, if that is the one) for "
            "this once; reading the prepared files needs none. See docs/data.md."
        ) from error
    return builder


def _where_it_may_be(data: DataConfig, builder: Builder) -> str:
    """A remedy for a data set that is not prepared: another version that is there, or none."""
    folder = str(builder.data_path).rpartition("/")[0]
    entries = storage.list_subfolders(folder) if storage.is_folder(folder) else []
    versions = [name for name in entries if name[0].isdigit()]
    if versions:
        name = data.dataset.partition(":")[0]
        return f"There is {versions[-1]}: set --config.data.dataset={name}:{versions[-1]}"
    return "Set --config.data.data_dir to where it is"
