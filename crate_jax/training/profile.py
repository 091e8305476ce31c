"""A profile of some steps of a run, for TensorBoard and xprof."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from crate_jax.parallel import PyTree


class Profile:
    """Record devices and host from the first to the last of some steps.

    Process 0 writes a trace below ``plugins/profile`` of the workdir, where TensorBoard's profiler
    and xprof look for it. Its devices may still be at the step before the first one when it begins.

    Args:
        steps: "first:last"; None: nothing is recorded.

    Raises:
        ValueError: the steps are no such range.
    """

    def __init__(self, steps: str | None):
        self._folder, self._running = Path(), False
        self._first, self._last = _parse(steps) if steps is not None else (0, -1)

    @contextlib.contextmanager
    def into(self, folder: Path) -> Iterator[None]:
        """Record steps of the block into a folder of this machine; at its end nothing runs on."""
        self._folder = folder
        try:
            yield
        finally:
            self._stop()

    def before(self, step: int) -> None:
        """A step is about to begin. A run that is resumed among the steps records the rest."""
        due = self._first <= step <= self._last
        if due and not self._running and jax.process_index() == 0:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: PyTree) -> None:
        """A step has been handed to the devices. Wait for the last one."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _parse(steps: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f"profile_steps must be first:last, from step 1 on; got {steps}. "
            "Set --config.profile_steps=10:15, say."
        )
    return int(found[1]), int(found[2])
