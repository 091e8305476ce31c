"""The Grain graph: shuffle, augment, shard, batch, prefetch, and on to the devices.

What a batch holds depends on the seed and on the number of examples seen before it, and on nothing
else: not on workers or threads, and not on how many processes share the work.
"""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from jax.sharding import Sharding

from crate_jax.config import DataConfig
from crate_jax.data.augment import Transform, parse_transforms
from crate_jax.data.decode import decode_image
from crate_jax.data.sources import Source

# The loader runs examples in parallel; OpenCV's own threads would only get in each other's way.
cv2.setNumThreads(0)


@dataclasses.dataclass(frozen=True)
class Prepare(grain.transforms.RandomMap):
    """One stored example to {"image": (H, W, c) uint8, "label": int32}.

    Attributes:
        transforms: applied in order.
        image_shape: (H, W, c) that must come out.
        field: the config field that holds the transforms, for errors.
    """

    transforms: tuple[Transform, ...]
    image_shape: tuple[int, int, int]
    field: str

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Decode and transform; the same element and generator state give the same pixels."""
        image = element["image"]
        if isinstance(image, bytes):
            name = element.get("name", "data.dataset")
            image = decode_image(image, channels=self.image_shape[-1], name=name)
        for transform in self.transforms:
            image = transform(image, rng)
        if image.shape != self.image_shape:
            wanted, got = ("x".join(map(str, s)) for s in (self.image_shape, image.shape))
            raise ValueError(
                f"{self.field} must give the {wanted} images that the model takes; got {got}. "
                f"End it with resize({self.image_shape[:2]})."
            )
        return {"image": np.ascontiguousarray(image), "label": np.int32(element["label"])}


def make_prepare(data: DataConfig, image_shape: Sequence[int], *, train: bool) -> Prepare:
    """The per-example part of the pipeline.

    Raises:
        KeyError, ValueError: the transforms are misspelt, see `parse_transforms`.
    """
    field = "data.train_transforms" if train else "data.eval_transforms"
    spec = data.train_transforms if train else data.eval_transforms
    return Prepare(tuple(parse_transforms(spec, field)), tuple(image_shape), field)  # type: ignore


def train_batches(
    source: Source,
    data: DataConfig,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int,
    examples_seen: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, each example once per epoch, every epoch in a new order.

    The stream is cut into batches across the ends of epochs, so every batch is full. Starting after
    `examples_seen` costs no more than starting at zero.

    Args:
        source: of `open_source`.
        data: reads num_workers, num_threads and prefetch_batches.
        prepare: of `make_prepare`.
        batch_size: examples per batch over all processes.
        seed: of order and augmentation.
        examples_seen: examples of the stream to leave out at its start.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.

    Yields:
        {"image": (b, H, W, c) uint8, "label": (b,) int32} with b = batch_size / process_count:
        every process_count-th example of the global batch.
    """
    stream = grain.MapDataset.source(source.examples).seed(seed % 2**32).shuffle().repeat()
    # Random numbers are drawn by the position in the stream, hence before it is shared out.
    stream = stream.random_map(prepare)[examples_seen:][process_index::process_count]
    return _iterate(stream.batch(batch_size // process_count), data)


def eval_batches(
    source: Source,
    data: DataConfig,
    prepare: Prepare,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, in equally many full batches on every process.

    What is missing in the last batch is filled with copies of the first example and masked out.

    Args:
        source: of `open_source`.
        data: reads num_workers, num_threads and prefetch_batches.
        prepare: of `make_prepare`, without randomness that matters.
        batch_size: examples per batch over all processes.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.

    Yields:
        {"image": (b, H, W, c) uint8, "label": (b,) int32, "mask": (b,) float32, 1 for an example
        and 0 for filling}.
    """
    padded = -(-len(source) // batch_size) * batch_size
    indices = grain.MapDataset.range(padded)[process_index::process_count]

    def fetch(index: int) -> dict[str, Any]:
        real = index < len(source)
        rng = np.random.default_rng(index)
        example = prepare.random_map(source.examples[index if real else 0], rng)
        return example | {"mask": np.float32(real)}

    return _iterate(indices.map(fetch).batch(batch_size // process_count), data)


def to_device(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """This process's rows of a batch to its devices, as one global array a leaf."""
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _iterate(batches: grain.MapDataset, data: DataConfig) -> Iterator[dict[str, np.ndarray]]:
    """Run the graph ahead of its consumer, in threads or in processes."""
    options = grain.ReadOptions(
        num_threads=data.num_threads, prefetch_buffer_size=data.prefetch_batches
    )
    iterable = batches.to_iter_dataset(options)
    if data.num_workers:
        _ensure_flags_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=data.num_workers, per_worker_buffer_size=data.prefetch_batches
            ),
            worker_init_fn=_end_with_parent,
        )
    iterator = iter(iterable)
    try:
        yield from iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Let a worker end when its program is killed; it would wait for ever to hand over a batch."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _ensure_flags_parsed() -> None:
    """Grain reads an absl flag when it starts workers, also in programs that use no absl flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
