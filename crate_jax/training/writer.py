"""The files of metrics: ``metrics.jsonl`` and TensorBoard's event files."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crate_jax.files import located, written_aside
from crate_jax.training.mirror import Mirror
from crate_jax.training.tensorboard import EventWriter

NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars and images into a workdir; ``metrics.jsonl`` holds the scalars alone.

    A resumed run goes back to its checkpoint: lines of later steps, which an interrupted run may
    have left, are taken out, so that the file reads as if nothing had happened.

    Args:
        workdir: existing directory, or in a bucket, where a `Mirror` stores the files.
        start_step: the step the run continues from.

    Attributes:
        folder: where the files are, on this machine; others that are put there are kept too.

    Raises:
        OSError: the disk does not take them, or the bucket does not give what it holds.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0):
        self._mirror = Mirror(located(workdir, "workdir"))
        self.folder = self._mirror.folder
        self._mirror.fetch(NAME)
        _drop_after(self.folder / NAME, start_step)
        self._file = (self.folder / NAME).open("a", buffering=1)
        purge = start_step + 1 if start_step else None
        self._events = EventWriter(self.folder, purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step.

        Raises:
            OSError: the disk does not take them.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._events.write(step, values)
        self._mirror.changed()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures of one step, (n, H, W, c) by name, for TensorBoard.

        Raises:
            OSError: the disk does not take them.
        """
        self._events.write_images(step, images)

    def flush(self) -> None:
        """Wait until all values are in the workdir.

        Raises:
            OSError: the bucket does not take it.
        """
        self._mirror.flush()

    def close(self) -> None:
        """Flush and close the files.

        Raises:
            OSError: the bucket does not take them.
        """
        self._events.close()
        self._file.close()
        self._mirror.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line cut off by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    with written_aside(path) as aside:
        aside.write_text("".join(kept))
