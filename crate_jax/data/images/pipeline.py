"""The way from a stored image to the pixels of a row: decode and transform."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.images.augment import UnfitImageError, random_resized_crop
from crate_jax.data.images.decode import EncodedImage, array_pixels
from crate_jax.data.images.transform_spec import Transform, parse_transforms
from crate_jax.data.rows import BadExampleError


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The way from a stored image to the pixels of a row; see `make_pipeline`.

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
        self, image: bytes | np.ndarray, rng: np.random.Generator, *, name: str = "image"
    ) -> np.ndarray:
        """Decode and transform; the same image and generator state give the same pixels.

        Args:
            image: encoded bytes, or pixels (H, W) or (H, W, c) of a type that `array_pixels` takes.
            rng: the random generator of the transforms.
            name: the name of the image in errors.

        Returns:
            Pixels of `image_shape`, uint8, contiguous.

        Raises:
            BadExampleError: the bytes do not decode, or the image is too long or too small for a
                transform.
            ValueError: the image is neither, or the transforms do not lead to `image_shape`.
        """
        channels = self.image_shape[-1]
        if isinstance(image, bytes):
            pixels = EncodedImage(image, channels=channels, name=name, fast=self.fast)
        elif isinstance(image, np.ndarray):
            pixels = array_pixels(image, channels=channels, name=name)
        else:
            raise ValueError(
                f"{name} must be bytes or a NumPy array; got {type(image).__name__}. Convert it."
            )
        for transform in self.transforms:
            if isinstance(pixels, EncodedImage) and transform.func is not random_resized_crop:
                pixels = pixels.pixels()
            try:
                pixels = transform(pixels, rng)
            except UnfitImageError as error:
                raise BadExampleError(f"{name}: {error}") from error
        if isinstance(pixels, EncodedImage):
            pixels = pixels.pixels()
        if pixels.shape != self.image_shape:
            wanted, got = ("x".join(map(str, s)) for s in (self.image_shape, pixels.shape))
            raise ValueError(
                f"{self.field} must give the {wanted} images that the model takes; got {got}. "
                f"End it with resize({self.image_shape[:2]})."
            )
        return np.ascontiguousarray(pixels)


def make_pipeline(data: DataConfig, image_shape: Sequence[int], *, train: bool) -> Pipeline:
    """The pipeline of training or of evaluation, to images of a shape (H, W, c).

    Raises:
        KeyError, ValueError: the transforms are misspelt, see `parse_transforms`.
    """
    field = "data.train_transforms" if train else "data.eval_transforms"
    spec = data.train_transforms if train else data.eval_transforms
    return pipeline_of(spec, field, image_shape, fast=train)


def pipeline_of(spec: str, field: str, image_shape: Sequence[int], *, fast: bool) -> Pipeline:
    """The pipeline of some transforms, to images of a shape (H, W, c).

    Args:
        spec: see `parse_transforms`.
        field: see `parse_transforms`.
        image_shape: (H, W, c) that must come out.
        fast: of `Pipeline`.

    Raises:
        KeyError, ValueError: the transforms are misspelt.
    """
    height, width, channels = image_shape
    transforms = tuple(parse_transforms(spec, field, channels=channels))
    return Pipeline(transforms, (height, width, channels), field, fast=fast)
