"""Exact sums over a whole split."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import jax
from jax import Array


def add_up(
    sums_of: Callable[[dict[str, Array]], dict[str, Array]], batches: Iterable[dict[str, Array]]
) -> dict[str, float]:
    """The sums of all batches, in double precision on the host, one batch behind the device.

    Args:
        sums_of: from a batch to sums over its rows, among them ``examples``; jitted.
        batches: of `crate_jax.data.loader.eval_batches`, on the devices.

    Returns:
        The totals by the same names.

    Raises:
        ValueError: there is no example.
    """
    totals: defaultdict[str, float] = defaultdict(float)

    def add(sums: dict[str, Array]) -> None:
        for name, value in jax.device_get(sums).items():
            totals[name] += float(value)

    previous: dict[str, Array] = {}
    for batch in batches:
        sums = sums_of(batch)
        add(previous)
        previous = sums
    add(previous)
    if not totals["examples"]:
        raise ValueError("batches must hold at least one example; got none. Choose another split.")
    return dict(totals)
