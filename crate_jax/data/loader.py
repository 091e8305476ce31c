"""The Grain graph: shuffle, augment, shard, batch, read ahead, and on to the devices.

What a batch holds depends on the seed and on the number of examples seen before it, and on nothing
else: not on workers or threads, and not on how many processes share the work.
"""

import functools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from jax.sharding import Sharding

from crate_jax.config import DataConfig
from crate_jax.data.images.decode import BadExampleError
from crate_jax.data.images.rows import LoadForEvaluation, LoadForTraining, Prepare, load_example
from crate_jax.data.stores.sources import Source

# The loader runs examples in parallel; OpenCV's own threads would only get in each other's way.
cv2.setNumThreads(0)

# Most batches made ahead, however small they are, and how many more are on the devices.
MAX_AHEAD, ON_DEVICE = 32, 2
# Pieces of one worker: in its hands, in its queue, and two in those of the process that asked.
IN_TRANSIT = 4
LOGGED_BAD_EXAMPLES = 10

_log = logging.getLogger("crate_jax")
_log.setLevel(logging.WARNING)


class Batches:
    """An iterator over batches, made ahead in the background; close it when done.

    Attributes:
        waited_s: seconds that callers of ``next`` have waited, altogether.
        skipped: bad examples that were replaced or, in evaluation, left out.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        data: DataConfig,
        load: LoadForTraining | LoadForEvaluation,
        rows: int,
        sharding: Sharding | None,
    ):
        self.waited_s, self.skipped = 0.0, 0
        self._load, self._data = load, data
        self._bad: set[int] = set()
        piece, ahead = read_ahead(data, rows, math.prod(load.prepare.image_shape))
        threads = min(data.num_threads, ahead)
        made = examples.batch(piece).to_iter_dataset(grain.ReadOptions(threads, ahead))
        if data.num_workers:
            _prepare_for_workers()
            made = made.mp_prefetch(
                grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=1),
                worker_init_fn=_end_with_parent,
            )
        if piece < rows:
            made = made.batch(rows // piece, batch_fn=_join)
        made = made.map(self._without_bad)
        if sharding is not None:
            # A thread of its own transfers: the next batch is on the devices when a step ends.
            made = made.map(functools.partial(to_device, sharding=sharding))
            made = grain.experimental.ThreadPrefetchIterDataset(
                made, prefetch_buffer_size=ON_DEVICE
            )
        self._iterator = iter(made)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """Stop the workers and threads."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def _without_bad(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take the account of bad examples out of a batch: count, log the first, stop at many."""
        bad = batch.pop("bad")
        for index in bad[bad >= 0].tolist():
            self.skipped += 1
            if self.skipped <= LOGGED_BAD_EXAMPLES:
                _log.warning("skipped: %s", self._why(index))
            self._bad.add(index)
        # Each counts once: how many epochs and processes there are makes no difference.
        check_bad_share(self._load.source, self._data, len(self._bad))
        return batch

    def _why(self, index: int) -> str:
        """What is wrong with an example, found out again: a worker said only which it was."""
        try:
            load_example(self._load.source, index, self._load.prepare, np.random.default_rng(0))
        except BadExampleError as error:
            return str(error)
        return f"{self._load.source.name}[{index}] could not be read, and now can"


def check_bad_share(source: Source, data: DataConfig, bad: int) -> None:
    """Refuse a data set of which too much is bad.

    Args:
        source: the data set.
        data: reads max_bad_share.
        bad: how many of its examples are known to be bad.

    Raises:
        ValueError: they are more than the share that is allowed.
    """
    if bad > data.max_bad_share * len(source):
        raise ValueError(
            f"{source.name} must have at most a share of {data.max_bad_share} of bad examples; "
            f"{bad} of {len(source)} are. Restore its files, or raise data.max_bad_share."
        )


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
    sharding: Sharding | None = None,
) -> Batches:
    """Endless training batches, each example once per epoch, every epoch in a new order.

    The stream is cut into batches across the ends of epochs, so every batch is full. Starting after
    `examples_seen` costs no more than starting at zero.

    Args:
        source: of `open_source`.
        data: reads num_workers, num_threads, prefetch_mib, on_bad_example and max_bad_share.
        prepare: of `make_prepare`.
        batch_size: examples per batch over all processes.
        seed: of order and augmentation.
        examples_seen: examples of the stream to leave out at its start.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.
        sharding: of global arrays on the devices, to which batches are then transferred two ahead;
            None leaves them on the host.

    Returns:
        Iterator over {"image": (b, H, W, c) uint8, "label": (b,) int32}. On the host,
        b = batch_size / process_count: every process_count-th example of the global batch.

    Raises:
        BadExampleError: by the iterator, if data.on_bad_example is "raise".
        ValueError: by the iterator, if more examples are bad than data.max_bad_share allows.
    """
    load = LoadForTraining(source, prepare, skip=data.on_bad_example == "skip")
    stream = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()
    # Random numbers are drawn by the position in the stream, hence before it is shared out.
    stream = stream.random_map(load)[examples_seen:][process_index::process_count]
    return Batches(stream, data, load, batch_size // process_count, sharding)


def eval_batches(
    source: Source,
    data: DataConfig,
    prepare: Prepare,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    sharding: Sharding | None = None,
) -> Batches:
    """Every example once, in order, in equally many full batches on every process.

    What is missing in the last batch is filled with black images and masked out.

    Args:
        source: of `open_source`.
        data: as for `train_batches`; a bad example that is skipped is masked out.
        prepare: of `make_prepare`, without randomness that matters.
        batch_size: examples per batch over all processes.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.
        sharding: as for `train_batches`.

    Returns:
        Iterator over {"image": (b, H, W, c) uint8, "label": (b,) int32, "mask": (b,) float32, 1
        for an example and 0 for filling}.

    Raises:
        As `train_batches`.
    """
    load = LoadForEvaluation(source, prepare, skip=data.on_bad_example == "skip")
    padded = -(-len(source) // batch_size) * batch_size
    indices = grain.MapDataset.range(padded)[process_index::process_count]
    return Batches(indices.map(load), data, load, batch_size // process_count, sharding)


def read_ahead(data: DataConfig, rows: int, row_bytes: int) -> tuple[int, int]:
    """How the loader works ahead within ``data.prefetch_mib``: in what pieces, and how many.

    Every thread of every worker makes a piece at a time. Pieces are whole batches where there is
    memory for so many of them, else parts of a batch, which are joined when they are handed out.

    Args:
        data: reads num_workers, num_threads and prefetch_mib.
        rows: examples of a batch on this process.
        row_bytes: of an example.

    Returns:
        Rows of a piece, a divisor of `rows`, and pieces that each worker (or this process, without
        any) makes ahead. More memory than allowed is taken only where no divisor fits.
    """
    workers = max(1, data.num_workers)
    transit = IN_TRANSIT if data.num_workers else 1
    budget = data.prefetch_mib * 2**20 / workers
    wanted = budget / ((data.num_threads + transit) * row_bytes)
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    piece = max(n for n in divisors if n <= max(1, wanted))
    if piece < wanted / 4:  # of a prime number, say: handing over many tiny pieces takes long
        piece = min((n for n in divisors if n > wanted), default=rows)
    most = -(-MAX_AHEAD * rows // (piece * workers))
    return piece, max(1, min(most, int(budget / (piece * row_bytes)) - transit))


def _join(pieces: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The pieces of a batch as one."""
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def to_device(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """This process's rows of a batch to its devices, as one global array a leaf."""
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Let a worker end when its program is killed, and only then.

    It would wait for ever to hand over a batch. Ctrl-C, and the SIGTERM of many schedulers, reach
    all processes; they are the program's to act on, which needs its workers to end the step.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _prepare_for_workers() -> None:
    """What Grain needs of a program that starts workers.

    It reads an absl flag, also where a program uses none. And it leaves batches that workers have
    ready when they end to Python's resource tracker, which frees them, but says so.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    quiet = "ignore:resource_tracker:UserWarning"
    if quiet not in sys.warnoptions:  # which multiprocessing hands to the tracker
        sys.warnoptions.append(quiet)
