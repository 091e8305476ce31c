"""The folder of a run's checkpoints: unfinished saves are removed, damaged steps set aside."""

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from crate_jax.buckets import check_reachable, is_remote, remove_tree, rename_tree
from crate_jax.files import located

FOLDER = "checkpoints"  # below the run's workdir
DAMAGED = "damaged-"  # what a step that was set aside is called
# In a bucket no folder is renamed in one piece: a step is whole once Orbax has added this object.
COMMITTED = "commit_success.txt"


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


def checkpoints_of(workdir: str | Path) -> Path:
    """The folder of a run's checkpoints. A bucket must be reachable.

    Raises:
        ValueError: it cannot.
    """
    directory = located(workdir, "workdir", absolute=True) / FOLDER
    check_reachable(directory, "workdir")
    return directory


def sweep(directory: Path, step: int | str | None) -> None:
    """Remove the remains of unfinished saves of a step, as far as that can be done.

    Orbax's own sweep fails the next save where it cannot, and a failed save's writers may go on
    for a while. What is left unfinished harms nobody; the next run sweeps again.

    Args:
        directory: the directory of the steps.
        step: which; "*" for all of them; None for none.
    """
    if jax.process_index() == 0:
        for path in unfinished(directory, str(step)):
            if is_remote(path):
                remove_tree(path)
            else:
                shutil.rmtree(path, ignore_errors=True)


def unfinished(directory: Path, step: str) -> Iterator[Path]:
    """Folders of unfinished saves of a step, or of all for ``*``."""
    if not is_remote(directory):
        yield from directory.glob(f"{step}.*tmp*")
    elif directory.exists():
        steps = [path for path in directory.iterdir() if path.name.isdigit()]
        yield from (p for p in steps if step in ("*", p.name) and not (p / COMMITTED).exists())


def set_aside(directory: Path, steps: list[int]) -> None:
    """Rename damaged steps; every process of the run calls this."""
    if jax.process_index() == 0:
        for step in steps:
            names = [f"{DAMAGED}{step}", *(f"{DAMAGED}{step}.{i}" for i in range(1, 1000))]
            free = next(name for name in names if not (directory / name).exists())
            rename = rename_tree if is_remote(directory) else os.rename
            rename(directory / str(step), directory / free)
    # Nobody looks before the names are changed.
    multihost_utils.sync_global_devices("crate_jax: damaged checkpoints are set aside")


def damage(directory: Path, step: int, steps: list[int], reason: str) -> str:
    """The line about a damaged step. It names the steps that may be used instead."""
    others = ", ".join(str(other) for other in steps if other != step)
    remedy = f"Use another step: {others}." if others else "Train anew."
    return f"checkpoint must be readable; step {step} in {directory} is not ({reason}). {remedy}"


def no_checkpoint(workdir: str | Path) -> FileNotFoundError:
    """The error for a reader of a run without a checkpoint.

    Args:
        workdir: as the user wrote it, so that the command of the message can be pasted.
    """
    if (located(workdir, "workdir") / "config.json").exists():
        remedy = "Its training has saved nothing yet: wait, or start it again by the same command."
    else:
        command = f"python -m crate_jax train --config=digits --workdir={shlex.quote(str(workdir))}"
        remedy = f"Correct the path, or train first, for example: {command}"
    return FileNotFoundError(f"workdir must hold a checkpoint; {workdir} has none. {remedy}")


def unwritable(directory: Path, steps: list[int], error: Exception) -> OSError:
    """The error of a save that could not be written; these steps stay."""
    reason = str(error).strip().split("\n")[0].rpartition(": ")[2]
    kept = f"Intact: {', '.join(map(str, steps))}" if steps else "There is none yet"
    remedy = "Check the bucket" if is_remote(directory) else "Free or mount the disk"
    return OSError(
        f"{directory} must take checkpoints; it did not ({reason}). {kept}. {remedy}, and run "
        "again."
    )
