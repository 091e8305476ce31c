"""Find the image and the label among the features of a TFDS data set, and their decoders."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.stores.examples import Example

Feature = Any  # tfds.features.FeatureConnector, which takes seconds to import

# Types of arrays that `crate_jax.data.images.decode.array_pixels` takes.
PIXELS = ("uint8", "uint16", "bool", "float16", "float32", "float64")

FILE_NAME = "file_name"  # of the image, where `prepare` or TFDS has kept it


@dataclasses.dataclass(frozen=True)
class ExampleParser:
    """Turn the bytes of an example into image, label and file name; nothing else is decoded.

    Attributes:
        image_key: name of the feature; of one within another, ``a/b``.
        label_key: likewise.
        parser: TFDS's own, of the features that are wanted.
        decode_image: from what the parser gives to an array; None: it gives a file's bytes.
    """

    image_key: str
    label_key: str
    parser: Any
    decode_image: Callable[[Any], np.ndarray] | None

    def __call__(self, record: bytes) -> Example:
        """The example.

        Raises:
            Exception: the record is damaged, or a feature of it: ValueError, or protobuf's own.
        """
        stored = self.parser.parse_example(record)
        image = stored[self.image_key]
        if self.decode_image is not None:
            try:
                image = self.decode_image(image)
            except MemoryError:
                raise
            except Exception as error:  # AttributeError, zlib.error and others, of damaged bytes
                raise ValueError(f"{self.image_key} does not decode") from error
        found: Example = {"image": image, "label": int(stored[self.label_key])}
        if isinstance(name := stored.get(FILE_NAME), bytes):
            found["name"] = name.decode(errors="replace")
        return found


def make_parser(data: DataConfig, features: Feature) -> ExampleParser:
    """The parser of a data set that `check_features` has found fit."""
    from tensorflow_datasets.core import features as tfds
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    flat = dict(_flat(features))
    image = flat[data.image_key]
    wanted = {key: flat[key] for key in (data.image_key, data.label_key)}
    if isinstance(name := flat.get(FILE_NAME), tfds.Text):
        wanted[FILE_NAME] = name
    parser = ExampleParserNp({key: _stored(f) for key, f in wanted.items()})
    # TFDS keeps an image of floats as the PNG of their bytes, four channels a pixel.
    is_file = isinstance(image, tfds.Image) and image.np_dtype != np.float32
    decode = None if is_file else image.decode_example_np
    return ExampleParser(data.image_key, data.label_key, parser, decode)


def _stored(feature: Feature) -> Any:
    """The stored form of a TFDS feature. Arrays of any size are flat, with their shape beside them.

    TFDS's parser for NumPy takes their shape for known but for one side.
    """
    from tensorflow_datasets.core.features.feature import TensorInfo

    info = feature.get_serialized_info()
    if isinstance(info, dict) and info["value"].shape:
        info = info | {"value": TensorInfo(shape=(None,), dtype=info["value"].np_dtype)}
    return info


def check_features(
    data: DataConfig, features: Feature, num_classes: int | None
) -> tuple[int, tuple[str, ...]]:
    """Check that image and label can be read; return the number and names of the classes.

    Args:
        data: reads dataset, image_key and label_key.
        features: the features of the data set.
        num_classes: of integer labels, which have no names of classes; None: not known.

    Raises:
        ValueError: a feature is not there, or is none of pixels or of one label an image.
    """
    flat = dict(_flat(features))
    _check_keys(data, flat)
    image, label = flat[data.image_key], flat[data.label_key]
    if not _is_pixels(image):
        raise ValueError(
            f"data.image_key must name an image of uint8, uint16 or floats, of one frame; "
            f"{data.image_key} of {data.dataset} is a {_kind(image)}. Choose another of "
            f"{_listed(flat)}, or prepare the data set with tfds.features.Image."
        )
    if _is_class(label):
        return label.num_classes, tuple(label.names or ())
    if not _is_integer(label):
        raise ValueError(
            f"data.label_key must name a ClassLabel or an integer, one for each image; "
            f"{data.label_key} of {data.dataset} is a {_kind(label)}. Choose another of "
            f"{_listed(flat)}, or prepare the data set with tfds.features.ClassLabel."
        )
    if num_classes is None:
        raise ValueError(
            f"model.num_classes must be set if labels are integers; {data.label_key} of "
            f"{data.dataset} is a {_kind(label)}, which does not say how many classes there are. "
            "Set --config.model.num_classes (with --model: --model-kwargs num_classes=…)."
        )
    return num_classes, ()


def _check_keys(data: DataConfig, flat: Mapping[str, Feature]) -> None:
    """Check that image and label exist. The error lists the features and the flags."""
    flags = []
    for field, key, fits in (
        ("image_key", data.image_key, (_is_pixels,)),
        ("label_key", data.label_key, (_is_class, _is_integer)),
    ):
        if key not in flat:
            fitting = [name for fit in fits for name, feature in flat.items() if fit(feature)]
            flags.append(f"--config.data.{field}={fitting[0] if fitting else 'NAME'}")
    if flags:
        raise ValueError(
            f"data.dataset must have the features {data.image_key} and {data.label_key}; got "
            f"{data.dataset}. It has {_listed(flat)}. Set {' and '.join(flags)} (evaluate "
            "and compare: --image_key, --label_key), or choose another data set."
        )


def _flat(features: Feature, prefix: str = "") -> Iterator[tuple[str, Feature]]:
    """Features by name, those within another as ``a/b``; sequences are left as they are."""
    from tensorflow_datasets.core import features as tfds

    if not isinstance(features, tfds.FeaturesDict):
        return
    for name, feature in sorted(features.items()):
        if isinstance(feature, tfds.FeaturesDict):
            yield from _flat(feature, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def _is_pixels(feature: Feature) -> bool:
    """True for one image: encoded, or an array (H, W) or (H, W, c)."""
    from tensorflow_datasets.core import features as tfds

    rank, dtype = _rank_and_type(feature)
    if isinstance(feature, tfds.Image):
        return rank == 3
    return isinstance(feature, tfds.Tensor) and rank in (2, 3) and dtype in PIXELS


def _is_class(feature: Feature) -> bool:
    from tensorflow_datasets.core import features as tfds

    return isinstance(feature, tfds.ClassLabel) and feature.num_classes is not None


def _is_integer(feature: Feature) -> bool:
    from tensorflow_datasets.core import features as tfds

    rank, dtype = _rank_and_type(feature)
    return isinstance(feature, tfds.Tensor) and rank == 0 and np.dtype(dtype).kind in "biu"


def _rank_and_type(feature: Feature) -> tuple[int, str]:
    """The number of axes and the dtype of an array; (−1, "object") of anything else."""
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
    if not isinstance(shape, tuple) or dtype is None or isinstance(dtype, dict):
        return -1, "object"
    return len(shape), np.dtype(dtype).name


def _kind(feature: Feature) -> str:
    """A feature in words, such as "Tensor of int32 (8, 8, 1)"."""
    kind = type(feature).__name__
    inner = getattr(feature, "feature", None)  # of a sequence
    if inner is not None:
        return f"{kind} of {_kind(inner)}"
    rank, dtype = _rank_and_type(feature)
    if rank < 0:
        return kind
    return f"{kind} of {dtype}" + (f" {feature.shape}" if rank else "")


def _listed(flat: Mapping[str, Feature]) -> str:
    """All features by name and kind."""
    return ", ".join(f"{name} ({_kind(f)})" for name, f in flat.items()) or "no features"
