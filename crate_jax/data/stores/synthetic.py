"""Random images, to measure speed without a disk."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crate_jax.config import DataConfig
from crate_jax.data.stores.examples import Example, Source

NUM_CLASSES = 1000  # where nobody says how many


@dataclasses.dataclass(frozen=True)
class SyntheticImages:
    """Random pixels and labels, a function of the index alone."""

    image_shape: tuple[int, ...]
    num_classes: int
    length: int = 100_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, self.image_shape, np.uint8)
        return {"image": image, "label": int(rng.integers(self.num_classes))}


def open_synthetic(
    data: DataConfig,
    split: str,
    *,
    image_shape: Sequence[int],
    num_classes: int | None,
    **_: object,
) -> Source:
    """Images of a shape (H, W, c), the same in every split."""
    classes = num_classes or NUM_CLASSES
    return Source(f"synthetic/{split}", SyntheticImages(tuple(image_shape), classes), classes)
