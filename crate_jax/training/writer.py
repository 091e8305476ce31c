"""Where metrics are kept: ``metrics.jsonl`` and TensorBoard's event files."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crate_jax.files import written_aside
from crate_jax.training.tensorboard import EventWriter


class MetricsWriter:
    """Writes scalars and images into a workdir; ``metrics.jsonl`` holds the scalars alone.

    A resumed run goes back to its checkpoint: lines of later steps, which an interrupted run may
    have left, are taken out, so that the file reads as if nothing had happened.

    Args:
        workdir: existing directory.
        start_step: the step the run continues from.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0):
        path = Path(workdir) / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = path.open("a", buffering=1)
        self._events = EventWriter(workdir, purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step.

        Raises:
            OSError: the disk does not take them.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._events.write(step, values)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures of one step, (n, H, W, c) by name, for TensorBoard.

        Raises:
            OSError: the disk does not take them.
        """
        self._events.write_images(step, images)

    def close(self) -> None:
        """Flush and close the files."""
        self._events.close()
        self._file.close()


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
