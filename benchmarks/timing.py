"""Times of several ways to do something that take turns: a busy machine slows all of them alike.

And how fast the machine is at most: in one large product, and in a copy.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIN_ROUND_SECONDS = 0.2  # a turn repeats its call until it takes about this long


def finish(result: Any) -> np.ndarray:
    """Wait for the work behind a result, and bring it to the host."""
    if hasattr(result, "cpu"):  # PyTorch's; what the device was given before it is then done, too
        return result.float().cpu().numpy()
    return np.asarray(jax.block_until_ready(result), np.float32)


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


def spread(name: str, values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest of what was seen, under three names."""
    values = list(values)
    middle = statistics.median(values)
    return {name: middle, f"lowest_{name}": min(values), f"highest_{name}": max(values)}


def quotients(times: list[float], by: list[float]) -> list[float]:
    """Times of one by those of another, round by round."""
    return [a / b for a, b in zip(times, by, strict=True)]


def large_product(dtype: str) -> tuple[Callable[[], Any], int]:
    """A call that has JAX multiply two large square matrices, and the operations that takes."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    A = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    # One entry of the result is enough to wait for; the barrier has all of them computed.
    product = jax.jit(lambda A: jax.lax.optimization_barrier(A @ A)[0, 0])
    product(A).block_until_ready()
    return lambda: product(A), 2 * n**3


def copy_bytes_per_s() -> float:
    """Bytes read and written a second while JAX copies a large array within that memory."""
    n, calls = (2**26, 1) if jax.default_backend() == "cpu" else (2**28, 10)  # of float32
    # Into an array that is there already: a new one would time the system that provides its pages.
    # The sign makes it a computation, which XLA does not answer with the source itself.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    source, target = jnp.ones(n), jnp.zeros(n)

    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(calls):
            target = copy(source, target)
        target.block_until_ready()
        times.append(time.perf_counter() - start)
    return calls * 2 * source.nbytes / statistics.median(times[1:])  # the first one compiles
