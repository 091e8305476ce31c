"""How many training images a second does the host make? Ours against Pillow and tf.data.

    python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline_cpu_2core.json

The images are scikit-learn's two photographs, 500 x 375, JPEG of quality 92, in memory. Every
pipeline decodes, takes a random resized crop of 224 and a random flip, and makes batches of 128:

- ours: `crate_jax.data.loader.train_batches`, whole; pixels stay bytes (the device normalises).
  Crops are resized with antialiasing, the default, and once more without.
- Pillow: what torchvision does with RandomResizedCrop, RandomHorizontalFlip, ToTensor and
  Normalize, on Pillow images, in the same Grain loader. Needs Pillow.
- tf.data: decode_and_crop_jpeg, tf.image.resize, flip; pixels stay bytes. Without antialiasing, the
  default there, and once more with it. Left out without TensorFlow.

Each runs with 1 and 2 threads and, but for tf.data, which has none, with 1 and 2 worker processes.
All take turns in one process; a figure is the median of the rounds, of batches made after the
read-ahead is drained. Ratios compare the best of two threads or two workers on each side:
antialiased with antialiased (ratio_pillow, ratio_tf_data), plain with plain, and the defaults of
ours and tf.data. ``--soak N`` instead draws N batches of synthetic images
and reports how memory grew. The last line is JSON.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
from frame import Result, command_line, installed, publish, table
from timing import spread

from crate_jax.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from crate_jax.data.images.labelled import LabelledImages, open_labelled_images
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.loader import train_batches
from crate_jax.data.stores.sources import Source

BATCH, SIZE, EXAMPLES = 128, 224, 4096
WARM_UP, TIMED = 8, 16  # batches


def photographs() -> list[bytes]:
    """Two JPEGs of 500 x 375 pixels, quality 92."""
    from sklearn.datasets import load_sample_images

    images: Any = load_sample_images()
    encoded = []
    for image in images.images:
        small = cv2.resize(image, (500, 375), interpolation=cv2.INTER_AREA)
        options = [cv2.IMWRITE_JPEG_QUALITY, 92]
        encoded.append(cv2.imencode(".jpg", small[:, :, ::-1], options)[1].tobytes())
    return encoded


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A few JPEGs, over and over, as a data set."""

    jpegs: list[bytes]

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.jpegs[index % len(self.jpegs)], "label": index % len(self.jpegs)}


@dataclasses.dataclass(frozen=True)
class WithPillow(grain.transforms.RandomMap):
    """Torchvision's training transforms, by Pillow and NumPy."""

    jpegs: list[bytes]

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Index to a normalised image (c, H, W), float32."""
        from PIL import Image

        with Image.open(io.BytesIO(self.jpegs[element % len(self.jpegs)])) as file:
            image = file.convert("RGB")
        width, height = image.size
        while True:
            area = width * height * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                break
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        crop = image.crop((left, top, left + w, top + h))
        crop = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(crop).transpose(2, 0, 1).astype(np.float32) / 255
        mean = np.asarray(IMAGENET_MEAN, np.float32)[:, None, None]
        std = np.asarray(IMAGENET_STD, np.float32)[:, None, None]
        return {"image": (pixels - mean) / std, "label": np.int32(element % len(self.jpegs))}


def ours(jpegs: list[bytes], threads: int, workers: int, antialias: bool = True) -> Any:
    """The project's own training batches."""
    data = DataConfig(
        train_transforms=f"random_resized_crop({SIZE}, antialias={antialias})|random_flip()",
        num_threads=threads,
        num_workers=workers,
    )
    source = Source("photographs", Repeated(jpegs), len(jpegs))
    rows = LabelledImages(source, make_pipeline(data, (SIZE, SIZE, 3), train=True))
    return train_batches(rows, data, batch_size=BATCH, seed=0)


def pillow(jpegs: list[bytes], threads: int, workers: int) -> Any:
    """Batches made by Pillow in the same loader."""
    stream = grain.MapDataset.range(EXAMPLES).seed(0).shuffle().repeat()
    stream = stream.random_map(WithPillow(jpegs)).batch(BATCH)
    made = stream.to_iter_dataset(grain.ReadOptions(threads, max(2, threads)))
    if workers:
        made = made.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1))
    return iter(made)


def tf_data(jpegs: list[bytes], threads: int, workers: int, antialias: bool = False) -> Any:
    """Batches made by tf.data with as many threads."""
    import tensorflow as tf

    def prepare(jpeg: Any) -> Any:
        shape = tf.image.extract_jpeg_shape(jpeg)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
            min_object_covered=0.0,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), antialias=antialias)
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.deterministic = True
    stream = tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    stream = stream.map(prepare, num_parallel_calls=threads).batch(BATCH).prefetch(2)
    return stream.with_options(options).as_numpy_iterator()


def images_per_s(make: Callable[..., Any], jpegs: list[bytes], threads: int, workers: int) -> float:
    """One round of one pipeline."""
    stream: Iterator[Any] = make(jpegs, threads, workers)
    try:
        for _ in itertools.islice(stream, WARM_UP):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(stream, TIMED):
            pass
        return TIMED * BATCH / (time.perf_counter() - start)
    finally:
        if hasattr(stream, "close"):
            stream.close()


def start_up_s(jpegs: list[bytes], workers: int) -> float:
    """Seconds from nothing to the first batch with worker processes."""
    start = time.perf_counter()
    with contextlib.closing(ours(jpegs, 1, workers)) as stream:
        next(stream)
        return time.perf_counter() - start


def soak(batches: int, workers: int) -> Result:
    """Draw synthetic batches; resident memory of this process and its workers over time."""
    data = DataConfig(
        dataset="synthetic", train_transforms="random_flip()", num_workers=workers, prefetch_mib=16
    )
    shape = (32, 32, 3)
    rows = open_labelled_images(data, "train", train=True, image_shape=shape, num_classes=10)
    marks: list[float] = []
    every = max(1, batches // 20)
    with contextlib.closing(train_batches(rows, data, batch_size=32, seed=0)) as stream:
        for i in range(1, batches + 1):
            next(stream)
            if i % every == 0:
                marks.append(round(resident_mib(), 1))
    warm, last = marks[1], statistics.median(marks[-3:])
    return {"batches": batches, "workers": workers, "mib": marks, "growth": last / warm - 1}


def resident_mib() -> float:
    """Private and shared memory of this process and its children; Linux."""
    pids = [os.getpid()]
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        pids += [int(child) for child in (task / "children").read_text().split()]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(status.split("VmRSS:")[1].split()[0])
    return total / 1024


PAIRS = {
    "ratio_pillow": ("ours", "pillow"),
    "ratio_tf_data": ("ours", "tf_data"),  # both antialias
    "ratio_tf_data_plain": ("ours_plain", "tf_data_plain"),  # neither does
    "ratio_tf_data_defaults": ("ours", "tf_data_plain"),  # the default of each
}


def compare(rounds: int) -> Result:
    """All pipelines in turns."""
    jpegs = photographs()
    makers: dict[str, Callable[..., Any]] = {
        "ours": ours,
        "ours_plain": functools.partial(ours, antialias=False),
        "pillow": pillow,
    }
    if installed("tensorflow") or installed("tensorflow_cpu"):
        makers["tf_data"] = functools.partial(tf_data, antialias=True)
        makers["tf_data_plain"] = tf_data
    found: dict[tuple[str, int, int], list[float]] = {
        (name, threads, workers): []
        for threads, workers in ((1, 0), (2, 0), (1, 1), (1, 2))
        for name in makers
        if not (name.startswith("tf_data") and workers)
    }
    for _ in range(rounds):
        for (name, threads, workers), speeds in found.items():
            speeds.append(images_per_s(makers[name], jpegs, threads, workers))
    rows = [
        {"pipeline": name, "threads": threads, "workers": workers} | spread("images_per_s", speeds)
        for (name, threads, workers), speeds in found.items()
    ]
    # On each side the better of two threads and two workers.
    best = {
        name: max(
            row["images_per_s"]
            for row in rows
            if row["pipeline"] == name and max(row["threads"], row["workers"]) == 2
        )
        for name in makers
    }
    ratios = {name: best[a] / best[b] for name, (a, b) in PAIRS.items() if b in best}
    start_up = statistics.median(start_up_s(jpegs, 2) for _ in range(3))
    return {"images_per_s": best} | ratios | {
        "start_up_s": start_up, "batch_size": BATCH, "pipelines": rows
    }  # fmt: skip


def report(result: Result) -> list[str]:
    """Images a second of every pipeline."""
    rows = (
        f"{row['pipeline']} | {row['threads']} | {row['workers']} | {row['images_per_s']:.0f} | "
        f"{row['lowest_images_per_s']:.0f} to {row['highest_images_per_s']:.0f}"
        for row in result["pipelines"]
    )
    return table("pipeline | threads | workers | images/s | lowest to highest", rows)


def main() -> None:
    """Measure in turns, or soak; print and write."""
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--soak", type=int, help="instead: this many synthetic batches")
    parser.add_argument("--workers", type=int, default=0, help="of --soak")
    args = parser.parse_args()
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    found = soak(args.soak, args.workers) if args.soak else compare(args.rounds)
    packages = ("grain", "opencv-python-headless", "simplejpeg", "pillow", "tensorflow_cpu")
    publish(args, found, *packages, report=None if args.soak else report)


if __name__ == "__main__":
    main()
