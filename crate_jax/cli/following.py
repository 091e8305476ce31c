"""Checkpoints of a run as they come, while another process trains; no lock is taken."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from crate_jax.streams import tolerant

if TYPE_CHECKING:  # imported where it is used, with Orbax
    from crate_jax.checkpoint.manager import Checkpointer

EVERY_S = 5.0  # seconds between two looks


def follow(
    workdir: str,
    wanted: "Callable[[Checkpointer], Iterable[int] | None]",
    interval: float = EVERY_S,
) -> Iterator[int]:
    """The checkpoints that somebody wants, whenever there are any.

    If there is no checkpoint yet, one line says at once what it waits for.

    Args:
        workdir: the workdir of the run, which may not be there yet.
        wanted: from the run's checkpoints to steps; None: it is at its end. Where it wants none, it
            is asked again after a pause.
        interval: seconds between two looks.

    Yields:
        A step.
    """
    first = True
    while True:
        steps = _look(workdir, wanted)
        if steps is None:
            return
        if first and not steps and not _look(workdir, lambda reader: reader.steps):
            say(f"waiting for the first checkpoint of a run in {workdir}")
        first = False
        yield from steps
        if not steps:
            time.sleep(interval)


def say(line: str) -> None:
    """A line of what is done, at once."""
    tolerant(sys.stdout).write(line + "\n")
    sys.stdout.flush()


def _look(
    workdir: str, wanted: "Callable[[Checkpointer], Iterable[int] | None]"
) -> list[int] | None:
    """Choose the wanted ones of the checkpoints that are there now; [] if there are none."""
    from crate_jax.checkpoint.manager import Checkpointer

    try:
        reader = Checkpointer(workdir, read_only=True)
    except FileNotFoundError:
        return []
    try:
        found = wanted(reader)
        return None if found is None else list(found)
    finally:
        reader.close()
