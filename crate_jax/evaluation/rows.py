"""Apply a function to every row of a split, in order, on any devices."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, Sharding

from crate_jax.parallel import PyTree, on_mesh, place, replicated

OfRows = Callable[[PyTree, PyTree, dict[str, Array]], dict[str, Array]]


class ByRow(NamedTuple):
    """The result of `by_row`, on the host.

    Attributes:
        arrays: by name, (n, …), of the rows that count, in the order of the split.
        places: of these rows in the split, (n,) int64: bad ones may have been left out.
    """

    arrays: dict[str, np.ndarray]
    places: np.ndarray


def by_row(
    function: OfRows, params: PyTree, extra: PyTree, batches: Iterable[dict[str, Array]], mesh: Mesh
) -> ByRow:
    """Map a whole split, one batch behind the device.

    Args:
        function: from (parameters, extra, batch) to arrays (B, …); pure, it runs under jit.
        params: the parameters of a task, on the host or one device.
        extra: the extra of a task, on the host or one device.
        batches: the batches of `crate_jax.data.loader.eval_batches`, on the mesh.
        mesh: over which the rows of a batch are spread.

    Raises:
        ValueError: no row counts.
    """
    everywhere = replicated(mesh)
    params, extra = jax.tree.map(functools.partial(place, sharding=everywhere), (params, extra))

    def masked(params: PyTree, extra: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
        return function(params, extra, batch) | {"mask": batch["mask"]}

    step = jax.jit(on_mesh(mesh, masked), out_shardings=everywhere)
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)

    def keep(found: dict[str, Array], order: np.ndarray) -> None:
        for name, values in found.items():
            parts[name].append(np.asarray(values)[order])

    previous: tuple[dict[str, Array], np.ndarray] = {}, np.zeros(0, np.int64)
    for batch in batches:
        found = step(params, extra, batch)
        keep(*previous)
        mask = batch["mask"]
        previous = found, order_of_split(mask.sharding, len(mask))
    keep(*previous)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    places = np.flatnonzero(whole.pop("mask") > 0) if whole else np.zeros(0, np.int64)
    if not len(places):
        raise ValueError("batches must hold at least one example; got none. Choose another split.")
    return ByRow({name: values[places] for name, values in whole.items()}, places)


def order_of_split(sharding: Sharding, rows: int) -> np.ndarray:
    """The places of the rows of a split in a batch, (B,): each process loaded every so-manyth row.

    Args:
        sharding: the sharding of the batch, over axis 0.
        rows: the rows of the batch, over all processes.
    """
    owner = np.zeros(rows, np.int64)
    for device, (share, *_) in sharding.devices_indices_map((rows,)).items():
        owner[share] = device.process_index
    nth = np.zeros(rows, np.int64)  # row of its process
    for process in np.unique(owner):
        nth[owner == process] = np.arange(np.sum(owner == process))
    return np.lexsort((owner, nth))
