"""Where metrics go: a progress line, JSON lines, TensorBoard."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from crate_jax.config import TrainConfig
from crate_jax.training.tensorboard import EventWriter


class Reporter:
    """All that a run says of itself, to its files and to whoever watches.

    Args:
        workdir: existing directory.
        config: of the run.
        total_steps: where the run ends.
        record: of the checkpoint that the run continues from: its ``step`` and ``summary``; and
            ``notes``, lines to say at the start.
        enabled: False on all processes but one; then nothing is written.

    Attributes:
        summary: the last value of each metric that a run is judged by.
    """

    def __init__(
        self,
        workdir: Path,
        config: TrainConfig,
        total_steps: int,
        record: Mapping[str, Any],
        *,
        enabled: bool = True,
    ):
        first = record["step"]
        self.summary: dict[str, float] = dict(record["summary"])
        self._batch_size, self._total = config.batch_size, total_steps
        self._counted, self._waited_s, self._watch = first, 0.0, Stopwatch()
        self._progress = Progress(total_steps, sys.stderr if enabled else None)
        self._writer = None
        if first >= total_steps:
            self._progress.say(f"{workdir} is complete at step {first}. Nothing to do.")
        elif enabled:
            self._writer = MetricsWriter(workdir, start_step=first)
        for note in record.get("notes", ()):
            self.say(note)
        if 0 < first < total_steps:
            self._progress.say(f"resuming {workdir} after step {first} of {total_steps}")

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._progress.say(text)

    def trained(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        log: bool,
        waited_s: float = 0.0,
        skipped: int = 0,
    ) -> None:
        """A step is done.

        Args:
            step: which.
            metrics: `loss`, `top1` and whatever else the step measured.
            log: whether it is written.
            waited_s: seconds for which the steps of this program have waited for data, in all.
            skipped: bad examples that were replaced, in all.
        """
        self.summary["train/loss"] = metrics["loss"]
        if log:
            seconds = self._watch.lap()
            rate = (step - self._counted) / seconds
            values = {f"train/{name}": value for name, value in metrics.items()}
            values["images_per_s"] = round(rate * self._batch_size, 1)
            values["data_wait_share"] = round(min(1, (waited_s - self._waited_s) / seconds), 4)
            if skipped:
                values["data_skipped"] = skipped
            self._counted, self._waited_s = step, waited_s
            self._write(step, values)
            self._progress.update(step, values, rate)

    def measured(self, step: int, layers: Mapping[str, Iterable[float]]) -> None:
        """The objective was measured: {name: one value a layer}."""
        flat = {
            f"objective/{name}/layer{i:02d}": float(value)
            for name, values in layers.items()
            for i, value in enumerate(values)
        }
        self._write(step, flat)

    def tested(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The evaluation split was measured; returns its metrics under their full names."""
        values = {f"test/{name}": value for name, value in metrics.items()}
        self.summary |= values
        self._write(step, values)
        self._progress.say(
            f"step {step}/{self._total}  test loss {metrics['loss']:.4f}  "
            f"test top1 {metrics['top1']:.4f}"
        )
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        self._watch.pause()
        try:
            yield
        finally:
            self._watch.resume()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, values)


class Stopwatch:
    """Seconds of work: it can be paused."""

    def __init__(self):
        self._seconds, self._since = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Count again."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out; positive."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        self.resume()
        return max(seconds, 1e-9)


class MetricsWriter:
    """Writes scalars into a workdir: ``metrics.jsonl`` and TensorBoard's event files.

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
