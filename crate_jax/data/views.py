"""Rows of several augmentations of an image."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from crate_jax.data.rows import Row, Rows


@dataclasses.dataclass(frozen=True)
class Views:
    """Each image as often as one wants, every time augmented anew; a `crate_jax.data.rows.Rows`.

    A row holds all views of an image, so that they meet in a batch on any number of processes.

    Attributes:
        images: of one view each.
        count: V, how many views a row has.
    """

    images: Rows
    count: int

    @property
    def name(self) -> str:
        """What errors and logs call the rows."""
        return self.images.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the images, if they have any."""
        return getattr(self.images, "class_names", ())

    @property
    def listing(self) -> str:
        """That of the images, if they have one."""
        return getattr(self.images, "listing", "")

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Of one row: "image" (V, H, W, c) uint8 and "label" () int32."""
        shapes = dict(self.images.shapes)
        one = shapes["image"]
        return shapes | {"image": jax.ShapeDtypeStruct((self.count, *one.shape), one.dtype)}

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        """Read and transform one image as often.

        Raises:
            BadExampleError, FailingSystemError: as of one view.
        """
        views = [self.images.row(index, rng) for _ in range(self.count)]
        return views[0] | {"image": np.stack([view["image"] for view in views])}


def in_views(rows: Rows, count: int) -> Rows:
    """Rows of so many views; those given for one."""
    return Views(rows, count) if count > 1 else rows
