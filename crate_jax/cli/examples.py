"""Examples that commands look at: of a run's split, or of a folder of images."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crate_jax.config import TrainConfig

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.tasks.task import Inside
    from crate_jax.training.run import Run

Batch = dict[str, Any]  # of arrays on the host, rows on axis 0
MOST_IMAGES = 256  # of a folder
_VALUES_AT_ONCE = 2**25  # of a tap, in memory


def folder_images(
    folder: str, config: TrainConfig, image_shape: tuple[int, int, int], *, resized: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The images below a folder, and of each the folder it lies in.

    Args:
        folder: the folder.
        config: the config of the run, whose evaluation prepares them.
        image_shape: (H, W, c) that must come out.
        resized: whether they are just resized to that, in the place of the run's preparation.

    Raises:
        ValueError: there is none.
        BadExampleError: one cannot be read.
    """
    from crate_jax.data.images.pipeline import make_pipeline
    from crate_jax.data.stores.examples import unpack_name
    from crate_jax.data.stores.folders import folder_images as found_in

    found = found_in(folder, lambda _: 0)
    if not len(found):
        raise ValueError(f"--images must be a folder with images; got {folder}. Choose another.")
    data = copy.deepcopy(config.data)
    if resized:
        data.eval_transforms = f"resize({tuple(image_shape[:2])})"
    pipeline = make_pipeline(data, image_shape, train=False)
    pixels, kinds = [], []
    for i in range(min(len(found), MOST_IMAGES)):
        example = found[i]
        pixels.append(
            pipeline(example["image"], np.random.default_rng(0), name=example.get("name", folder))
        )
        kinds.append(Path(unpack_name(found.names[i])).parent.name or ".")
    return np.stack(pixels), kinds


def enlarged(images_BxHxWxc: np.ndarray, side: int) -> np.ndarray:
    """Stored images as squares of another side, by bilinear interpolation."""
    import cv2  # here: models and measures do without it

    c = images_BxHxWxc.shape[-1]
    made = [
        cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in images_BxHxWxc
    ]
    return np.stack(made).reshape(len(made), side, side, c)


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Stored pixels as floats in [0, 1]."""
    return pixels.astype(np.float64) / 255 if pixels.dtype == np.uint8 else np.clip(pixels, 0, 1)


def split_examples(run: "Run", count: int) -> Iterator[Batch]:
    """The first examples of the evaluation split, batch after batch, on the host, without filling.

    Args:
        run: with "eval" rows.
        count: of how many examples, at most.

    Raises:
        ValueError: none can be read.
    """
    from crate_jax.data.loader import eval_batches

    data, left = run.config.data, count
    size = run.config.eval_batch_size
    with contextlib.closing(eval_batches(run.rows["eval"], data, batch_size=size)) as batches:
        for batch in batches:
            real = np.flatnonzero(batch["mask"])[:left]
            if len(real):
                yield {name: values[real] for name, values in batch.items() if name != "mask"}
            left -= len(real)
            if not left:
                return
    if left == count:
        raise ValueError(
            f"data.eval_split must have an example that can be read; {data.dataset}/"
            f"{data.eval_split} has none. Choose another split."
        )


def first_examples(run: "Run", count: int) -> Batch:
    """`split_examples` as one batch."""
    parts = [*split_examples(run, count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def parts(inside: "Inside") -> Iterator[np.ndarray]:
    """Inputs in batches whose taps fit into memory."""
    model: Any = inside.model
    size = max(1, _VALUES_AT_ONCE // (model.depth * model.num_tokens * model.width))
    for start in range(0, len(inside.inputs), size):
        yield np.asarray(inside.inputs[start : start + size])
