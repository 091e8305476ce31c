"""Times of several ways to do something that take turns: a busy machine slows all of them alike."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import jax

MIN_ROUND_SECONDS = 0.2  # a turn repeats its call until it takes about this long


def seconds(run: Callable[[], Any], calls: int, finish: Callable[[Any], Any]) -> float:
    """Seconds a call, over some calls in a row, until the last one is finished."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    finish(run())
    return (time.perf_counter() - start) / calls


def race(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    finish: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, list[float]]:
    """Seconds a call of each in each round, one after the other, in another order each time.

    Which one comes before decides what a turn finds in caches and memory.

    Args:
        runs: what to call, by name; compiled already, or the number of calls in a turn is off.
        rounds: how often each has its turn.
        finish: waits for the work behind a result.
    """
    calls = {
        name: max(1, math.ceil(MIN_ROUND_SECONDS / seconds(run, 1, finish)))
        for name, run in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], calls[name], finish))
    return times
