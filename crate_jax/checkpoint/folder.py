"""The folder of a run's checkpoints: what is swept up there, and what is set aside."""

import os
import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils

FOLDER = "checkpoints"  # below the run's workdir
DAMAGED = "damaged-"  # what a step that was set aside is called


def check_path(workdir: Path) -> None:
    """Refuse a path that Orbax would take for a pattern of paths.

    It finds what it has just written by one. Under such a name it would find nothing, or what
    another run has written, and say that all is saved.

    Raises:
        ValueError: there is a ``[``, ``*``, ``?`` or backslash in it.
    """
    if odd := next((letter for letter in str(workdir) if letter in "[*?\\"), ""):
        raise ValueError(
            f"workdir must have no {odd} in its path, which checkpoints are found by as a pattern; "
            f"got {workdir}. Choose another --workdir."
        )


def sweep(directory: Path, step: int | str | None) -> None:
    """Remove what unfinished saves have left, as far as that can be done.

    Orbax's own sweep fails the next save where it cannot, and a failed save's writers may go on
    for a while. What is left under its temporary name harms nobody; the next run sweeps again.
    """
    if jax.process_index() == 0:
        for path in directory.glob(f"{step}.*tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path, steps: list[int]) -> None:
    """Rename damaged steps; every process of the run calls this."""
    if jax.process_index() == 0:
        for step in steps:
            names = [f"{DAMAGED}{step}", *(f"{DAMAGED}{step}.{i}" for i in range(1, 1000))]
            free = next(name for name in names if not (directory / name).exists())
            os.rename(directory / str(step), directory / free)
    # Nobody looks before the names are changed.
    multihost_utils.sync_global_devices("crate_jax: damaged checkpoints are set aside")


def no_checkpoint(directory: Path) -> FileNotFoundError:
    """The error of a reader who finds none."""
    return FileNotFoundError(
        f"workdir must hold a checkpoint; {directory.parent} has none. "
        f"Train first: python -m crate_jax train --workdir={directory.parent}"
    )


def unwritable(directory: Path, steps: list[int], error: Exception) -> OSError:
    """The error of a save that could not be written; these steps stay."""
    reason = str(error).strip().split("\n")[0].rpartition(": ")[2]
    kept = f"Intact: {', '.join(map(str, steps))}" if steps else "There is none yet"
    return OSError(
        f"{directory} must take checkpoints; it did not ({reason}). {kept}. Free or mount the "
        "disk, and run again."
    )
