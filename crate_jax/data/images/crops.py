"""Rows of several views of an image: two global crops, and some small, local ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from crate_jax.config import DataConfig, SimDinoConfig, TrainConfig
from crate_jax.data.images.labelled import LabelledImages, open_labelled_images
from crate_jax.data.images.pipeline import Pipeline, pipeline_of
from crate_jax.data.rows import Row, good_row
from crate_jax.data.stores.sources import check_same_classes

_ANY_LABEL = 2**31 - 1  # of data sets whose labels are numbers: they only measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class CroppedImages(LabelledImages):
    """The views of the images of a source; a `crate_jax.data.rows.Rows`.

    Attributes: as of `LabelledImages`, whose pipeline makes the first global crop, and
        second: from pixels to the second global crop.
        local: from pixels to a local crop.
        count: of local crops.
    """

    second: Pipeline
    local: Pipeline
    count: int

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """One row's shapes: "global" (2, H, W, c), "local" (n, h, w, c) if n > 0, "label" ()."""
        several = {"global": (2, self.pipeline), "local": (self.count, self.local)}
        views = {
            name: jax.ShapeDtypeStruct((n, *pipeline.image_shape), np.uint8)
            for name, (n, pipeline) in several.items()
            if n
        }
        return views | {"label": jax.ShapeDtypeStruct((), np.int32)}

    def views(self, image: bytes | np.ndarray, rng: np.random.Generator, name: str) -> Row:
        """The crops, of which each draws its own random numbers; the image is decoded once."""
        image = self.decoded(image, name)
        pipelines = (self.pipeline, self.second)
        views = {"global": np.stack([each(image, rng, name=name) for each in pipelines])}
        if self.count:
            crops = [self.local(image, rng, name=name) for _ in range(self.count)]
            views["local"] = np.stack(crops)
        return views


def open_crops(
    data: DataConfig,
    views: SimDinoConfig,
    split: str,
    *,
    image_shape: Sequence[int],
    **opening: Any,
) -> CroppedImages:
    """The views of the images of a split for training; one row is made at once.

    Args:
        data: says where the images are, and what the first global crop is.
        views: what the others are.
        split: see `open_source`.
        image_shape: (H, W, c) of a global crop.
        **opening: of `open_labelled_images`.

    Raises:
        ValueError: a local crop would be larger than a global one, or transforms do not lead to
            crops of their size.
        BadExampleError, FileNotFoundError, KeyError, ValueError: see `open_labelled_images`.
    """
    side, channels = views.local_size, image_shape[-1]
    if views.local_crops and side > min(image_shape[:2]):
        height, width = image_shape[:2]
        raise ValueError(
            f"simdino.local_size must be at most the side of a global crop; got {side} and "
            f"{height}x{width}. Set --config.simdino.local_size, or model.image_size."
        )
    # Misspelt transforms fail before any image is read.
    local = pipeline_of(
        views.local_transforms, "simdino.local_transforms", (side, side, channels), fast=True
    )
    spec, field = views.second_transforms, "simdino.second_transforms"
    second = pipeline_of(spec, field, image_shape, fast=True) if spec else None
    rows = open_labelled_images(data, split, train=True, image_shape=image_shape, **opening)
    crops = CroppedImages(
        source=rows.source,
        pipeline=rows.pipeline,
        classes=rows.classes,
        second=second or rows.pipeline,
        local=local,
        count=views.local_crops,
    )
    good_row(crops, 0, np.random.default_rng(0), skip=data.on_bad_example == "skip")
    return crops


def open_views(
    config: TrainConfig, splits: Sequence[tuple[str, bool]], *, image_shape: Sequence[int]
) -> tuple[LabelledImages, ...]:
    """Views of the splits for training, whole images of the others; labels only measure.

    Args:
        config: reads data and simdino.
        splits: the name of each, and whether it is for training.
        image_shape: (H, W, c) that the model takes.

    Raises:
        BadExampleError, FileNotFoundError, KeyError, ValueError: see `open_crops`; or the classes
            of two splits differ.
    """
    size: dict[str, Any] = dict(image_shape=image_shape, num_classes=_ANY_LABEL)
    opened: list[LabelledImages] = []
    for split, train in splits:
        if train:
            opened.append(open_crops(config.data, config.simdino, split, **size))
        else:
            opened.append(open_labelled_images(config.data, split, train=False, **size))
        check_same_classes(opened[0].source, opened[-1].source)
    return tuple(opened)
