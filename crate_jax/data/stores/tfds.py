"""TFDS data sets, prepared as array_record, parquet or TFRecord, without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from crate_jax.config import DataConfig
from crate_jax.data.stores import storage, tfrecord
from crate_jax.data.stores.array_record import open_array_records
from crate_jax.data.stores.examples import FINGERPRINT, Example, Examples, Source, listing_of
from crate_jax.data.stores.features import ExampleParser, check_features, make_parser
from crate_jax.errors import of_the_system

Builder = Any  # tfds.core.DatasetBuilder, which takes seconds to import


class UnknownDatasetError(KeyError):
    """TFDS has no data set of that name; `known` are the names that it has."""

    def __init__(self, name: str, known: list[str]):
        super().__init__(name)
        self.known = known


def open_tfds(
    data: DataConfig, split: str, *, num_classes: int | None = None, **_: object
) -> Source:
    """A split of a data set that is prepared, or that TFDS may download; images stay encoded."""
    import tensorflow_datasets as tfds

    builder = _prepared(functools.partial(tfds.builder, data.dataset), data, sys.stderr)
    return _open_split(builder, data, split, num_classes)


def open_digits(data: DataConfig, split: str, **_: object) -> Source:
    """A split of scikit-learn's digits, which are prepared if they are not there."""
    import tensorflow_datasets as tfds

    from crate_jax.data.stores.digits import Digits

    tfds.disable_progress_bar()  # it takes two seconds
    # scikit-learn has them: nothing is downloaded.
    data = dataclasses.replace(data, download=True)
    return _open_split(_prepared(Digits, data, io.StringIO()), data, split, None)


def _open_split(builder: Builder, data: DataConfig, split: str, num_classes: int | None) -> Source:
    """A split of a prepared data set, after its features and its length have been checked."""
    num_classes, class_names = check_features(data, builder.info.features, num_classes)
    try:
        length = builder.info.splits[split].num_examples
    except ValueError as error:
        known = builder.info.splits
        rule = f"one of {', '.join(known)}, or part of one"
        raise storage.unknown_split(rule, split, known) from error
    name = f"{data.dataset}/{split}"
    examples = TfdsExamples(_random_access(builder, data, split, name) if length else [])
    # TFDS drops examples when it writes parquet, and reads whole files where a part is asked for.
    if len(examples) != length:
        raise ValueError(
            f"{name} must hold {length} examples; TFDS reads {len(examples)} of "
            f"{builder.data_path}. Prepare it again with file_format='array_record'."
        )
    shards = builder.info.splits[split].file_instructions if length else []
    taken = [(shard.skip, shard.take) for shard in shards]
    listing = listing_of(
        "version and shards", f"{builder.info.full_name} {taken}", _fingerprint(builder)
    )
    return Source(name, examples, num_classes, class_names, listing)


def _fingerprint(builder: Builder) -> str:
    """The fingerprint that `crate_jax.data.stores.prepare` wrote; "" for files of others."""
    path = Path(str(builder.data_path)) / FINGERPRINT
    return path.read_text() if path.is_file() else ""


def _random_access(builder: Builder, data: DataConfig, split: str, name: str) -> Examples:
    """The examples of a split by index: ours of TFRecord and array_record, TFDS's of parquet."""
    file_format = builder.info.file_format
    kind = file_format.value if file_format else "unknown"
    parse = make_parser(data, builder.info.features)
    if kind != "tfrecord":
        return _as_data_source(builder, split, parse, name, kind)
    examples = tfrecord.open_tfrecords(
        builder.info.splits[split].file_instructions,
        parse,
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
    builder: Builder, split: str, parse: ExampleParser, name: str, kind: str
) -> Examples:
    """The examples of array_record and parquet files, which are read from a local disk alone."""
    import tensorflow_datasets as tfds

    if storage.is_remote(str(builder.data_path)):
        raise ValueError(
            f"{name} must be local: {kind} files cannot be read from {builder.data_path}. "
            "Mount the bucket as a folder, or prepare the data set as TFRecord."
        )
    if kind == "array_record":
        instructions = builder.info.splits[split].file_instructions
        return open_array_records(instructions, parse, name=name)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        return ParsedExamples(builder.as_data_source(split, deserialize_method=raw), parse)
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
class ParsedExamples:
    """Examples of records that are held as bytes."""

    records: Sequence[bytes]
    parse: ExampleParser

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self.parse(self.records[index])


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of TFDS; an index beyond the last ends a loop over them."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if index >= len(self):
            raise IndexError(index)
        return self.examples[index]


def _prepared(make: Callable[..., Builder], data: DataConfig, report: TextIO) -> Builder:
    """Make the builder with `make` and prepare it, or give the reason why there is none.

    TFDS reports on stdout, which belongs to the command's own result: it goes to `report`.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    folder = None if data.data_dir is None else storage.data_folder(data)
    try:
        builder = make(data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        raise UnknownDatasetError(data.dataset, registered.list_imported_builders()) from error
    except (AssertionError, ValueError) as error:  # of the version; of the spelling or the config
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "data.dataset must be a TFDS name, or name/config, or name:version; got "
            f"{data.dataset} ({reason}). Set --config.data.dataset."
        ) from error
    except ImportError as error:  # of a video or sound
        raise ValueError(
            f"data.dataset must be of images; {data.dataset} has a feature for which TFDS needs a "
            f"package ({error.msg}), as for video. Choose another data set, or install it."
        ) from error
    if builder.is_prepared():
        return builder
    if not data.download:
        raise FileNotFoundError(
            f"data.dataset must be prepared; {data.dataset} is not in {builder.data_path}. "
            f"{_where_it_may_be(data, builder)}, or let train have TFDS download and "
            "prepare it: --config.data.download=True."
        )
    builder = make(data_dir=folder, file_format="array_record")
    try:
        with contextlib.redirect_stdout(report):
            builder.download_and_prepare()
    except OSError as error:
        # Another process of this run, say, has been quicker: the same files are there.
        target, builder = builder.data_path, make(data_dir=folder)
        if not builder.is_prepared():
            if error.filename is None:  # of the network, say
                raise
            raise OSError(
                f"data.data_dir must accept the files of TFDS; {target} does not ({error}). Mend "
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
    if "[" in folder:
        return "TFDS takes the [ in its path for a pattern: rename that folder"
    entries = storage.list_subfolders(folder) if storage.is_folder(folder) else []
    versions = [name for name in entries if name[0].isdigit()]
    if versions:
        name = data.dataset.partition(":")[0]
        return f"There is {versions[-1]}: set --config.data.dataset={name}:{versions[-1]}"
    return "Set --config.data.data_dir, or --data_dir beside --dataset, to where it is"
