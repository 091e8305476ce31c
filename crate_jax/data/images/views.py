"""Rows of several augmentations of an image."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from crate_jax.data.images.labelled import LabelledImages
from crate_jax.data.rows import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatedImages(LabelledImages):
    """Each image several times, augmented anew each time; a `crate_jax.data.rows.Rows`.

    A row holds all views of an image, so that they meet in a batch on any number of processes.

    Attributes: as of `LabelledImages`, and
        count: V, how many views a row has.
    """

    count: int

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shapes of one row: "image" (V, H, W, c) uint8 and "label" () int32."""
        shape = (self.count, *self.pipeline.image_shape)
        return {**super().shapes, "image": jax.ShapeDtypeStruct(shape, np.uint8)}

    def views(self, image: bytes | np.ndarray, rng: np.random.Generator, name: str) -> Row:
        """The views, of which each draws its own random numbers; the image is decoded once."""
        image = self.decoded(image, name)
        seen = [self.pipeline(image, rng, name=name) for _ in range(self.count)]
        return {"image": np.stack(seen)}


def repeated(images: LabelledImages, count: int) -> LabelledImages:
    """Rows of so many views; those given for one."""
    if count == 1:
        return images
    return RepeatedImages(
        source=images.source, pipeline=images.pipeline, classes=images.classes, count=count
    )
