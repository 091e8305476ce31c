"""TFDS data sets, prepared as array_record, parquet or TFRecord, without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import sys
from typing import Any

from crate_jax.config import DataConfig, did_you_mean
from crate_jax.data.stores import storage, tfrecord

# What ``data.dataset`` may be besides a name of TFDS.
OTHER_DATA = ("digits", "folder", "synthetic", "tar")


def open_tfds(data: DataConfig, split: str) -> tuple[str, "NamedExamples", int, tuple[str, ...]]:
    """One split; images stay encoded.

    Args:
        data: reads dataset, data_dir, download, on_bad_example, check_crc and index_dir.
        split: in TFDS's own syntax.

    Returns:
        What a `Source` holds: its name, examples, number of classes and their names.

    Raises:
        As `crate_jax.data.stores.sources.open_source`.
    """
    import tensorflow_datasets as tfds

    builder = _tfds_builder(data)
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
        info = builder.info.splits[split]
    except ValueError as error:
        raise FileNotFoundError(
            f"split must be one of {', '.join(builder.info.splits)}, or part of one; got {split}. "
            + did_you_mean(split, builder.info.splits)
        ) from error
    name, length = f"{data.dataset}/{split}", info.num_examples
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    kind = builder.info.file_format.value if builder.info.file_format else "unknown"
    examples: Any = []  # TFDS opens no empty split
    if length and kind == "tfrecord":
        examples = tfrecord.open_tfrecords(
            info.file_instructions,
            features,
            decoders,
            folder=str(builder.data_path),
            index_dir=data.index_dir,
            check_crc=data.check_crc,
        )
        if examples.missing and data.on_bad_example == "raise":
            raise ValueError(
                f"{name} must have whole files; {examples.missing[0]} ends before its last "
                "example. Restore it, or set data.on_bad_example=skip to go on without."
            )
    elif length:
        examples = _as_data_source(builder, split, decoders, name, kind)
    # TFDS drops examples when it writes parquet, and reads whole files where a part is asked for.
    if len(examples) != length:
        raise ValueError(
            f"{name} must hold {length} examples; TFDS reads {len(examples)} of "
            f"{builder.data_path}. Prepare it again with file_format='array_record'."
        )
    return name, NamedExamples(examples), label.num_classes or 0, tuple(label.names or ())


def _as_data_source(builder: Any, split: str, decoders: Any, name: str, kind: str) -> Any:
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
    except Exception as error:  # whatever pyarrow calls a damaged file; it reads all at once
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{name} must have whole files; {builder.data_path} does not open ({reason}). "
            "Restore it."
        ) from error


@dataclasses.dataclass(frozen=True)
class NamedExamples:
    """Examples of TFDS under the names that `Examples` has."""

    examples: Any

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)  # which ends a loop over the examples
        example = self.examples[index]
        found = {"image": example["image"], "label": int(example["label"])}
        if isinstance(name := example.get("file_name"), bytes):
            found["name"] = name.decode(errors="replace")
        return found


def _tfds_builder(data: DataConfig) -> Any:
    """The prepared builder, or the reason why there is none."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if data.dataset == "digits":
        from crate_jax.data.stores.digits import Digits as make

        download = True  # from no network: scikit-learn has them
        tfds.disable_progress_bar()  # it takes two seconds
    else:
        make, download = functools.partial(tfds.builder, data.dataset), data.download
    try:
        builder = make(data_dir=data.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = {*OTHER_DATA, *registered.list_imported_builders()}
        raise KeyError(
            "data.dataset must be digits, folder, tar, synthetic or a TFDS name; got "
            f"{data.dataset}. " + did_you_mean(data.dataset, known)
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
                f"{_where_it_may_be(data, builder)}, or let TFDS download and prepare it with "
                "--config.data.download=True."
            )
        builder = make(data_dir=data.data_dir, file_format="array_record")
        # TFDS reports on stdout, which belongs to the command's own result.
        report = io.StringIO() if data.dataset == "digits" else sys.stderr
        try:
            with contextlib.redirect_stdout(report):
                builder.download_and_prepare()
        except OSError:
            # Another process of this run, say, has been quicker: the same files are there.
            builder = make(data_dir=data.data_dir)
            if not builder.is_prepared():
                raise
        except ImportError as error:
            raise ValueError(
                f"data.dataset must be prepared; TFDS needs a package to prepare {data.dataset} "
                f"({error.msg}). Install it (pip install tensorflow-cpu, if that is the one) for "
                "this once; reading the prepared files needs none. See docs/data.md."
            ) from error
    return builder


def _where_it_may_be(data: DataConfig, builder: Any) -> str:
    """A remedy for a data set that is not prepared: another version that is there, or none."""
    folder = str(builder.data_path).rpartition("/")[0]
    entries = storage.list_folder(folder) if storage.is_folder(folder) else {}
    versions = [name for name, is_dir in entries.items() if is_dir and name[0].isdigit()]
    if versions:
        name = data.dataset.partition(":")[0]
        return f"There is {versions[-1]}: set --config.data.dataset={name}:{versions[-1]}"
    return "Set --config.data.data_dir to where it is"
