"""Rows of an image and its label."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.images.decode import EncodedImage
from crate_jax.data.images.pipeline import Pipeline, make_pipeline
from crate_jax.data.rows import BadExampleError, Row, good_row, patiently
from crate_jax.data.stores.sources import Source, check_known_classes, open_source
from crate_jax.errors import first_line

# No file that is damaged makes its reader raise these: they are bugs, or a package is missing.
_NEVER_DAMAGE = (ImportError, NameError, RecursionError, NotImplementedError, AssertionError)

_ANY_LABEL = 2**31 - 1  # of data sets whose labels are numbers, where none is read


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """The images of a source, through a pipeline, with their labels; a `crate_jax.data.rows.Rows`.

    Attributes:
        source: where the images are stored.
        pipeline: from a stored image to pixels.
        classes: names in whose order rows number the classes of the source, which are among them;
            (): as the source numbers them.
    """

    source: Source
    pipeline: Pipeline
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the rows in errors and logs."""
        return self.source.name

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shapes of one row: "image" (H, W, c) uint8 and "label" () int32."""
        return {
            "image": jax.ShapeDtypeStruct(self.pipeline.image_shape, np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return len(self.classes) or self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, if known: those of the model, if the source has any."""
        return (self.classes or self.source.class_names) if self.source.class_names else ()

    @property
    def listing(self) -> str:
        """Another one where other images lie, or in another order; "" if the store has none."""
        return self.source.listing

    @functools.cached_property
    def _labels(self) -> Sequence[int]:
        """The label in rows of each class of the source."""
        if not (self.classes and self.source.class_names):
            return range(self.source.num_classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [numbers[name] for name in self.source.class_names]

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        """Read, check, decode and transform one image.

        Raises:
            BadExampleError: it is damaged, not there, no image, or its label is out of range; the
                message names data set, split, index and, where there is one, file.
            FailingSystemError: disk, network or machine fail, for as long as `patiently` waits.
        """
        name, before = f"{self.name}[{index}]", rng and rng.bit_generator.state

        def attempt() -> Row:
            if rng:
                rng.bit_generator.state = before
            return self._row(index, rng, name)

        return patiently(attempt, name)

    def _row(self, index: int, rng: np.random.Generator, name: str) -> Row:
        """`row`, as far as one attempt comes."""
        try:
            example = self.source.examples[index]
        except _NEVER_DAMAGE:
            raise
        except Exception as error:  # whatever a reader of files calls a damaged one
            system = isinstance(error, OSError | MemoryError)
            if system and not isinstance(error, FileNotFoundError):
                raise
            said = first_line(error).removesuffix(".")
            raise BadExampleError(
                f"{name} must be readable; got {type(error).__name__}: {said}. Restore its file."
            ) from error
        if "name" in example:
            name += f" ({example['name']})"
        label = int(example["label"])
        if not 0 <= label < self.source.num_classes:
            last = self.source.num_classes - 1
            raise BadExampleError(
                f"{name} must have a label of 0 … {last}; got {label}. Correct it."
            )
        label = np.array(self._labels[label], np.int32)
        return {**self.views(example["image"], rng, name), "label": label}

    def views(self, image: bytes | np.ndarray, rng: np.random.Generator, name: str) -> Row:
        """The views of an image that a row shows.

        Args:
            image: as it is stored.
            rng: the random generator of the transforms.
            name: the name of the image in errors.
        """
        return {"image": self.pipeline(image, rng, name=name)}

    def decoded(self, image: bytes | np.ndarray, name: str) -> np.ndarray:
        """An image as it is stored, or its pixels, for several views of it."""
        if isinstance(image, np.ndarray):
            return image
        channels = self.pipeline.image_shape[-1]
        return EncodedImage(image, channels=channels, name=name, fast=self.pipeline.fast).pixels()


def open_labelled_images(
    data: DataConfig,
    split: str,
    *,
    train: bool,
    image_shape: Sequence[int],
    num_classes: int | None,
    classes: Sequence[str] = (),
    labelled: bool = True,
) -> LabelledImages:
    """Open the images of a split. One row is made at once, so a misfit fails here.

    Args:
        data: says where the images are and what is done to them.
        split: see `open_source`.
        train: whether data.train_transforms or data.eval_transforms are applied.
        image_shape: (H, W, c) that the model takes.
        num_classes: of synthetic images and of integer labels, as `open_source` takes it.
        classes: names of a model's outputs, by which the labels are numbered; (): as they are.
        labelled: whether labels are read, as `open_source` takes it. Without, any number will do
            for one, and `num_classes` counts for nothing.

    Raises:
        BadExampleError: the first row is bad, and data.on_bad_example is "raise".
        FileNotFoundError, KeyError, ValueError: see `open_source` and `make_pipeline`; or the
            transforms do not lead to `image_shape`, no row is good, or a class of the split is not
            among `classes`.
    """
    pipeline = make_pipeline(data, image_shape, train=train)
    num_classes = num_classes if labelled else _ANY_LABEL
    source = open_source(
        data, split, image_shape=image_shape, num_classes=num_classes, labelled=labelled
    )
    if classes:
        check_known_classes(source, classes)
    rows = LabelledImages(source, pipeline, tuple(classes))
    good_row(rows, 0, np.random.default_rng(0), skip=data.on_bad_example == "skip")
    return rows
