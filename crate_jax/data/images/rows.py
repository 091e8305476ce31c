"""From one stored example to one of a batch: read, check, decode, transform."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.images.augment import UnfitImageError, random_resized_crop
from crate_jax.data.images.decode import BadExampleError, EncodedImage
from crate_jax.data.images.transform_spec import Transform, parse_transforms
from crate_jax.data.stores.sources import Source


@dataclasses.dataclass(frozen=True)
class Prepare:
    """From a stored example to what a batch holds; see `make_prepare`.

    Attributes:
        transforms: applied in order.
        image_shape: (H, W, c) that must come out.
        field: the config field that holds the transforms, for errors.
        fast: decode with small differences, see `EncodedImage`.
    """

    transforms: tuple[Transform, ...]
    image_shape: tuple[int, int, int]
    field: str
    fast: bool

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator, *, name: str = "image"
    ) -> np.ndarray:
        """Decode and transform; the same example and generator state give the same pixels.

        Args:
            example: its ``image`` is encoded bytes, or pixels (H, W, c), uint8.
            rng: of the transforms.
            name: what errors call the example.

        Returns:
            Pixels of `image_shape`, uint8, contiguous.

        Raises:
            BadExampleError: the bytes do not decode, or the image is too long or too small for a
                transform.
            ValueError: the transforms do not lead to `image_shape`.
        """
        image = example["image"]
        if isinstance(image, bytes):
            channels = self.image_shape[-1]
            image = EncodedImage(image, channels=channels, name=name, fast=self.fast)
        for transform in self.transforms:
            if isinstance(image, EncodedImage) and transform.func is not random_resized_crop:
                image = image.pixels()
            try:
                image = transform(image, rng)
            except UnfitImageError as error:
                raise BadExampleError(f"{name}: {error}") from error
        if isinstance(image, EncodedImage):
            image = image.pixels()
        if image.shape != self.image_shape:
            wanted, got = ("x".join(map(str, s)) for s in (self.image_shape, image.shape))
            raise ValueError(
                f"{self.field} must give the {wanted} images that the model takes; got {got}. "
                f"End it with resize({self.image_shape[:2]})."
            )
        return np.ascontiguousarray(image)


def make_prepare(data: DataConfig, image_shape: Sequence[int], *, train: bool) -> Prepare:
    """The per-example part of the pipeline.

    Raises:
        KeyError, ValueError: the transforms are misspelt, see `parse_transforms`.
    """
    field = "data.train_transforms" if train else "data.eval_transforms"
    spec = data.train_transforms if train else data.eval_transforms
    transforms = tuple(parse_transforms(spec, field, channels=image_shape[-1]))
    return Prepare(transforms, tuple(image_shape), field, fast=train)  # type: ignore[arg-type]


def load_example(
    source: Source, index: int, prepare: Prepare, rng: np.random.Generator
) -> dict[str, Any]:
    """Read, check and prepare one example.

    Returns:
        {"image": (H, W, c) uint8, "label": int32}.

    Raises:
        BadExampleError: it cannot be read, is no image, or its label is out of range; the message
            names data set, split, index and, where there is one, file.
    """
    name = f"{source.name}[{index}]"
    try:
        example = source.examples[index]
    except Exception as error:  # whatever a reader of files calls a damaged one
        lines = str(error).strip().splitlines() or [""]
        raise BadExampleError(
            f"{name} must be readable; got {type(error).__name__}: {lines[0]} Restore its file."
        ) from error
    if "name" in example:
        name += f" ({example['name']})"
    label = int(example["label"])
    if not 0 <= label < source.num_classes:
        raise BadExampleError(
            f"{name} must have a label of 0 … {source.num_classes - 1}; got {label}. Mend it."
        )
    return {"image": prepare(example, rng, name=name), "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class LoadForTraining(grain.transforms.RandomMap):
    """Index to example; a bad one is replaced by the next good one if `skip`.

    ``bad`` is the index that had to be replaced, or −1.
    """

    source: Source
    prepare: Prepare
    skip: bool

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Load the example with this index, or the next good one."""
        state = rng.bit_generator.state
        for step in range(len(self.source)):
            try:
                rng.bit_generator.state = state  # as if nothing had been tried before
                index = (element + step) % len(self.source)
                example = load_example(self.source, index, self.prepare, rng)
                return example | {"bad": np.int64(element if step else -1)}
            except BadExampleError:
                if not self.skip:
                    raise
        raise ValueError(f"{self.source.name} must hold good examples; none can be read.")


@dataclasses.dataclass(frozen=True)
class LoadForEvaluation(grain.transforms.Map):
    """Index to example with its mask: 1, or 0 for filling and, if `skip`, for a bad example."""

    source: Source
    prepare: Prepare
    skip: bool

    def map(self, element: int) -> dict[str, Any]:
        """Load the example with this index; the transforms draw from a generator of its own."""
        if element < len(self.source):
            try:
                rng = np.random.default_rng(element)
                example = load_example(self.source, element, self.prepare, rng)
                return example | {"mask": np.float32(1), "bad": np.int64(-1)}
            except BadExampleError:
                if not self.skip:
                    raise
        bad = element if element < len(self.source) else -1
        image = np.zeros(self.prepare.image_shape, np.uint8)
        return {"image": image, "label": np.int32(0), "mask": np.float32(0), "bad": np.int64(bad)}
