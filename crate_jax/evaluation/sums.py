"""Exact sums over a whole split."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from crate_jax.waiting import counted

# The total of every name, or totals of the shape of the array that was added up.
Totals = dict[str, Any]


def watched(
    batches: Iterable[dict[str, Array]], examples: int, what: str = "evaluate"
) -> Iterator[dict[str, Array]]:
    """The batches of a split, counted for whoever waits.

    Args:
        batches: the batches of `crate_jax.data.loader.eval_batches`.
        examples: the number of examples of the split.
        what: is done with them.
    """
    return counted(batches, what, examples, "examples", size=lambda batch: len(batch["mask"]))


def add_up(
    sums_of: Callable[[dict[str, Array]], dict[str, Array]], batches: Iterable[dict[str, Array]]
) -> Totals:
    """The sums of all batches, in double precision on the host, one batch behind the device.

    Args:
        sums_of: from a batch to sums over its rows, among them ``examples``; jitted.
        batches: the batches of `crate_jax.data.loader.eval_batches`, on the devices.

    Returns:
        The totals by the same names: numbers, and arrays of float64 for sums that are arrays.

    Raises:
        ValueError: there is no example.
    """
    totals: Totals = {"examples": 0.0}

    def add(sums: dict[str, Array]) -> None:
        for name, value in jax.device_get(sums).items():
            exact = np.asarray(value, np.float64)
            totals[name] = totals.get(name, 0.0) + (exact if exact.ndim else float(exact))

    previous: dict[str, Array] = {}
    for batch in batches:
        sums = sums_of(batch)
        add(previous)
        previous = sums
    add(previous)
    if not totals["examples"]:
        raise ValueError("batches must hold at least one example; got none. Choose another split.")
    return totals
