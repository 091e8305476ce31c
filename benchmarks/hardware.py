"""What a figure was measured on, and how fast that is."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def describe_cpu() -> str:
    """Cores that this process may use, and the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} x {names[0] if names else platform.machine()}"


def large_product(dtype: str) -> tuple[Callable[[], Any], int]:
    """A call that has JAX multiply two large square matrices, and the operations that takes."""
    import jax  # not at the top: the other benchmarks need none of it
    import jax.numpy as jnp

    n = 2048 if jax.default_backend() == "cpu" else 8192
    A = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    # One entry of the result is enough to wait for; the barrier has all of them computed.
    product = jax.jit(lambda A: jax.lax.optimization_barrier(A @ A)[0, 0])
    product(A).block_until_ready()
    return lambda: product(A), 2 * n**3


def copy_bytes_per_s() -> float:
    """Bytes read and written a second while JAX copies a large array within that memory."""
    import jax
    import jax.numpy as jnp

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
