"""Where metrics go: a progress line, JSON lines, TensorBoard."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO


class Stopwatch:
    """Throughput of the training steps alone: evaluation and checkpoints are not counted."""

    def __init__(self):
        self._steps, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop counting time."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Count time again."""
        self._since = time.perf_counter()

    def step(self) -> None:
        """Count one step."""
        self._steps += 1

    def lap(self) -> float:
        """Steps per second since the last lap."""
        self.pause()
        rate = self._steps / max(self._seconds, 1e-9)
        self._steps, self._seconds = 0, 0.0
        self.resume()
        return rate


class MetricsWriter:
    """Writes scalars into a workdir: ``metrics.jsonl`` and TensorBoard's event files.

    A resumed run goes back to its checkpoint: lines of later steps, which an interrupted run may have
    left, are taken out, so that the file reads as if nothing had happened.

    Args:
        workdir: existing directory.
        start_step: the step the run continues from.
        enabled: False on all processes but one; then nothing is written.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0, enabled: bool = True):
        self._file, self._board = None, None
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


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
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept))
    os.replace(aside, path)


class Progress:
    """What a person watches: one live line on a terminal, plain lines when piped.

    Args:
        total_steps: where the run ends.
        stream: where to write; None writes nothing.
    """

    def __init__(self, total_steps: int, stream: IO[str] | None = sys.stderr):
        self._total, self._stream = total_steps, stream
        self._live = bool(stream and stream.isatty())
        self._width = 0

    def update(self, step: int, values: Mapping[str, float], steps_per_s: float) -> None:
        """Show where the run is: step, loss, top-1, images per second, time to go."""
        eta = (self._total - step) / max(steps_per_s, 1e-9)
        text = (
            f"step {step}/{self._total}  loss {values['train/loss']:.4f}  "
            f"top1 {values['train/top1']:.3f}  {values['images_per_s']:.0f} images/s  "
            f"ETA {_clock(eta)}"
        )
        if self._live and self._stream:
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Write one line that stays."""
        if self._stream:
            self._stream.write(("\n" if self._width else "") + text + "\n")
            self._stream.flush()
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
