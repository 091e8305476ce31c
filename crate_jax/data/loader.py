"""The Grain graph: shuffle, load, shard, batch, read ahead, and on to the devices.

What a batch holds depends on the seed and on the number of examples seen before it, and on nothing
else: not on workers or threads, and not on how many processes share the work.
"""

import dataclasses
import functools
import logging
import math
import time
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from crate_jax.config import DataConfig
from crate_jax.data.rows import BadExampleError, Row, Rows, good_row
from crate_jax.data.workers import end_with_parent, make_ready
from crate_jax.errors import judged
from crate_jax.interrupts import kept_from_children

# Most batches made ahead, however small they are, and how many more are on the devices.
MAX_AHEAD, ON_DEVICE = 32, 2
# Pieces of one worker: in its hands, in its queue, and two in those of the process that asked.
IN_TRANSIT = 4
LOGGED_BAD_EXAMPLES = 10
# Rows of a stream without an end: Grain divides their number as a float, and more would round up.
ENDLESS = 2**52

_log = logging.getLogger("crate_jax")
_log.setLevel(logging.WARNING)


def train_batches(
    rows: Rows,
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    examples_seen: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    sharding: Sharding | None = None,
) -> "Batches":
    """Endless training batches, each row once per epoch, every epoch in a new order.

    The stream is cut into batches across the ends of epochs, so every batch is full. Starting after
    `examples_seen` costs no more than starting at zero.

    With data.repeats = r each row stands r times in a row, each time with random numbers of its own
    (repeated augmentation, arXiv 1901.09335). The processes take these copies in turn. An epoch
    keeps its length: it has the first 1/r of its order.
    Differs from official (DeiT's sampler): there an epoch ends at a multiple of 256 rows.

    Args:
        rows: what to load.
        data: reads repeats, num_workers, num_threads, prefetch_mib, on_bad_example, max_bad_share.
        batch_size: rows per batch over all processes.
        seed: the seed of the order, and of the random numbers that `rows` gets.
        examples_seen: rows of the stream to leave out at its start.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.
        sharding: of global arrays on the devices, to which batches are then transferred two ahead;
            None leaves them on the host.

    Returns:
        Iterator over {name: (b, …)} of `rows.shapes`. On the host, b = batch_size / process_count:
        every process_count-th row of the global batch.

    Raises:
        BadExampleError: by the iterator, if data.on_bad_example is "raise".
        ValueError: by the iterator, if more rows are bad than data.max_bad_share allows; at once,
            if shared memory is too small for the workers.
    """
    load = _LoadForTraining(rows, skip=data.on_bad_example == "skip")
    epoch = grain.MapDataset.range(len(rows)).seed(seed % 2**32).shuffle()
    if data.repeats > 1:
        epoch = _Repeated(epoch, data.repeats)
    stream = epoch.repeat()
    # Random numbers are drawn by the position in the stream, hence before it is shared out.
    stream = stream.random_map(load)[examples_seen:ENDLESS][process_index::process_count]
    # An evaluation will have a loader beside this one.
    return Batches(stream, rows, data, batch_size // process_count, sharding, loaders=2)


def eval_batches(
    rows: Rows,
    data: DataConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    sharding: Sharding | None = None,
) -> "Batches":
    """Every row once, in order, in equally many full batches on every process.

    Zeros with mask 0 fill the last batch and stand for bad rows that are skipped.

    Args:
        rows: what to load, without randomness that matters.
        data: see `train_batches`; nothing is repeated.
        batch_size: rows per batch over all processes.
        process_index: which process this is.
        process_count: how many share a batch; divides batch_size.
        sharding: see `train_batches`.

    Returns:
        As `train_batches`, and "mask" (b,) float32: 1 for a row, 0 for filling.

    Raises:
        As `train_batches`.
    """
    load = _LoadForEvaluation(rows, skip=data.on_bad_example == "skip")
    padded = -(-len(rows) // batch_size) * batch_size
    indices = grain.MapDataset.range(padded)[process_index::process_count]
    # Nothing is refused here: a run that has come so far shall not end for want of room.
    return Batches(indices.map(load), rows, data, batch_size // process_count, sharding, loaders=0)


def check_bad_share(rows: Rows, data: DataConfig, bad: int) -> None:
    """Refuse a data set with too many bad examples.

    Args:
        rows: the data set.
        data: reads max_bad_share.
        bad: how many of its rows are known to be bad.

    Raises:
        ValueError: they are more than the share that is allowed.
    """
    if bad > data.max_bad_share * len(rows):
        raise ValueError(
            f"{rows.name} must have at most a share of {data.max_bad_share} of bad examples; "
            f"{bad} of {len(rows)} are. Restore its files, or raise data.max_bad_share."
        )


class _Repeated(grain.MapDataset):
    """Each element several times in a row, in epochs as long as those of the parent."""

    def __init__(self, parent: grain.MapDataset, times: int):
        super().__init__(parent)
        self._times = times

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + place // self._times]


@dataclasses.dataclass(frozen=True)
class _LoadForTraining(grain.transforms.RandomMap):
    """Index to row; ``bad`` is the index if another row had to take its place, else −1."""

    rows: Rows
    skip: bool

    @judged
    def random_map(self, element: int, rng: np.random.Generator) -> Row:
        row, is_own = good_row(self.rows, element, rng, skip=self.skip)
        return row | {"bad": np.array(-1 if is_own else element)}


@dataclasses.dataclass(frozen=True)
class _LoadForEvaluation(grain.transforms.Map):
    """Index to row with its mask: 1, or 0 for filling and, if `skip`, for a bad row."""

    rows: Rows
    skip: bool

    @judged
    def map(self, element: int) -> Row:
        bad = -1
        if element < len(self.rows):
            try:
                row = self.rows.row(element, np.random.default_rng(element))
                return row | {"mask": np.ones((), np.float32), "bad": np.array(-1)}
            except BadExampleError:
                if not self.skip:
                    raise
                bad = element
        blank = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in self.rows.shapes.items()}
        return blank | {"mask": np.zeros((), np.float32), "bad": np.array(bad)}


class Batches:
    """An iterator over batches, made ahead in the background; close it when done.

    Room for the batches of so many ``loaders`` is asked for before the first worker starts.

    Attributes:
        waited_s: seconds that callers of ``next`` have waited, altogether.
        skipped: bad rows that were replaced or, in evaluation, left out.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        rows: Rows,
        data: DataConfig,
        batch_size: int,
        sharding: Sharding | None,
        loaders: int,
    ):
        self.waited_s, self.skipped = 0.0, 0
        self._rows, self._data = rows, data
        self._bad: set[int] = set()
        row_bytes = sum(math.prod(s.shape) * s.dtype.itemsize for s in rows.shapes.values())
        piece, ahead = read_ahead(data, batch_size, row_bytes)
        threads = min(data.num_threads, ahead)
        made = stream.batch(piece).to_iter_dataset(grain.ReadOptions(threads, ahead))
        if data.num_workers:
            need = loaders * data.num_workers * IN_TRANSIT * piece * row_bytes
            make_ready(data.num_workers, need)
            options = grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=1)
            made = made.mp_prefetch(options, worker_init_fn=end_with_parent)
        if piece < batch_size:
            made = grain.experimental.RebatchIterDataset(made, batch_size)
        made = made.map(self._without_bad)
        if sharding is not None:
            # A thread of its own transfers: the next batch is on the devices when a step ends.
            made = made.map(functools.partial(to_device, sharding=sharding))
            made = grain.experimental.ThreadPrefetchIterDataset(
                made, prefetch_buffer_size=ON_DEVICE
            )
        self._iterator, self._to_start = iter(made), bool(data.num_workers)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            with kept_from_children(self._to_start):  # Grain starts its workers at the first
                self._to_start = False
                return next(self._iterator)
        finally:
            self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """Stop the workers and threads."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    @judged
    def _without_bad(self, batch: Row) -> Row:
        """Take the account of bad rows out of a batch: count, log the first, stop at many."""
        bad = batch.pop("bad")
        for index in bad[bad >= 0].tolist():
            self.skipped += 1
            if self.skipped <= LOGGED_BAD_EXAMPLES:
                _log.warning("skipped: %s", self._why(index))
            self._bad.add(index)
        # Each counts once: how many epochs and processes there are makes no difference.
        check_bad_share(self._rows, self._data, len(self._bad))
        return batch

    def _why(self, index: int) -> str:
        """Find the fault of a row again: a worker named only the row."""
        try:
            self._rows.row(index, np.random.default_rng(0))
        except BadExampleError as error:
            return str(error)
        return f"{self._rows.name}[{index}] could not be read, and now can"


def read_ahead(data: DataConfig, batch_size: int, row_bytes: int) -> tuple[int, int]:
    """The size and number of the pieces that the loader reads ahead within ``data.prefetch_mib``.

    Each thread of each worker makes a whole element at a time. Elements that are batches, of 1,024
    rows of 150 kB, would fill 10 GB in sixteen workers of four threads. Hence elements are pieces
    of a batch where memory is short, and batches are cut of them. Grain's own
    `pick_performance_config` takes the elements as they are. It bounds one buffer and the number
    of workers, but not what threads and workers hold together.

    Args:
        data: reads num_workers, num_threads and prefetch_mib.
        batch_size: rows of a batch on this process.
        row_bytes: of a row.

    Returns:
        Rows of a piece, and pieces that each worker (or this process, without any) makes ahead.
        Both are at least 1, whatever memory is allowed.
    """
    workers = max(1, data.num_workers)
    transit = IN_TRANSIT if data.num_workers else 1
    affordable = data.prefetch_mib * 2**20 / (workers * row_bytes)  # rows of a worker
    piece = max(1, min(batch_size, int(affordable / (data.num_threads + transit))))
    most = -(-MAX_AHEAD * batch_size // (piece * workers))
    return piece, max(1, min(most, int(affordable / piece) - transit))


def to_device(batch: Row, sharding: Sharding) -> dict[str, jax.Array]:
    """Move this process's rows of a batch to its devices, as one global array for each leaf."""
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
