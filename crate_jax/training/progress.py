"""The output of a run: a live line for people, and its metrics files."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np

from crate_jax.config import TrainConfig
from crate_jax.files import Json
from crate_jax.streams import tolerant
from crate_jax.training.loggers import Loggers, open_loggers
from crate_jax.training.writer import MetricsWriter


class Reporter:
    """The output of a run: to its files, to ``config.loggers`` and to people.

    Args:
        workdir: existing directory, or in a bucket.
        config: the config of the run.
        total_steps: the last step of the run.
        record: the record of the checkpoint that the run continues from: its ``step`` and
            ``summary``; and ``notes``, lines to say at the start.
        headline: the task's metric that the lines show beside the loss.
        peak_share: of the published peak of all devices, for one example a second; 0: not known.
        enabled: False on all processes but one; then nothing is written.

    Attributes:
        summary: the last value of each metric that a run is judged by.
        folder: on this machine; what is written there is in the workdir, at the end if not before.
    """

    def __init__(
        self,
        workdir: Path,
        config: TrainConfig,
        total_steps: int,
        record: Json,
        *,
        headline: str,
        peak_share: float = 0.0,
        enabled: bool = True,
    ):
        first = record["step"]
        self.summary: dict[str, float] = dict(record["summary"])
        self._batch_size, self._total = config.batch_size, total_steps
        self._peak_share = peak_share
        self._counted, self._waited_s, self._watch = first, 0.0, Stopwatch()
        self._shown = dict.fromkeys(("loss", headline))  # in this order, each once
        self._progress = Progress(total_steps, sys.stderr if enabled else None)
        self._writer, self._loggers = None, Loggers({}, self.say)
        if first >= total_steps:
            self._progress.say(f"{workdir} is complete at step {first}. Nothing to do.")
        elif enabled:
            self._loggers = open_loggers(config, workdir, self.say)
            self._writer = MetricsWriter(workdir, start_step=first)
        for note in record.get("notes", ()):
            self.say(note)
        if 0 < first < total_steps:
            self._progress.say(f"resuming {workdir} after step {first} of {total_steps}")

        self.folder = self._writer.folder if self._writer else workdir

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # A second failure would take the place of what ended the run.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            if self._writer is not None:
                self._writer.close()
        self._loggers.close(self.summary, failed=kind is not None)

    def flush(self) -> None:
        """Wait until all that was written is in the workdir, as it must be before a checkpoint.

        Raises:
            OSError: the bucket does not take it.
        """
        if self._writer is not None:
            self._writer.flush()

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
            step: the step.
            metrics: ``loss`` and whatever else the step measured.
            log: whether it is written.
            waited_s: seconds for which the steps of this program have waited for data, in all.
            skipped: bad examples that were replaced, in all.
        """
        self.summary["train/loss"] = metrics["loss"]
        if log:
            seconds = self._watch.lap()
            rate = (step - self._counted) / seconds
            values = {f"train/{name}": value for name, value in metrics.items()}
            values["examples_per_s"] = round(rate * self._batch_size, 1)
            if self._peak_share:
                values["flops_share"] = round(rate * self._batch_size * self._peak_share, 4)
            values["data_wait_share"] = round(min(1, (waited_s - self._waited_s) / seconds), 4)
            if skipped:
                values["data_skipped"] = skipped
            self._counted, self._waited_s = step, waited_s
            self._write(step, values)
            shown = {name: metrics[name] for name in self._shown if name in metrics}
            self._progress.update(step, shown, rate, rate * self._batch_size)

    def inspected(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        """The task has looked inside: scalars and pictures (n, H, W, c) by full name."""
        if scalars:
            self._write(step, {name: float(value) for name, value in scalars.items()})
        if images and self._writer is not None:
            self._writer.write_images(step, images)
            self._loggers.images(step, images)

    def tested(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The evaluation split was measured; returns its metrics under their full names."""
        values = {f"test/{name}": value for name, value in metrics.items()}
        self.summary |= values
        self._write(step, values)
        shown = "  ".join(
            f"test {name} {metrics[name]:.4f}" for name in self._shown if name in metrics
        )
        self._progress.say(f"step {step}/{self._total}  {shown}")
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
            self._loggers.scalars(step, values)


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


class Progress:
    """The display for a person: one live line on a terminal, plain lines in a pipe.

    Args:
        total_steps: the last step of the run.
        stream: where to write, as long as it takes what is written; None writes nothing.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = sys.stderr):
        self._total, self._stream = total_steps, tolerant(stream) if stream else None
        self._live = bool(self._stream and self._stream.isatty())
        self._width = 0

    def update(
        self, step: int, shown: Mapping[str, float], steps_per_s: float, examples_per_s: float
    ) -> None:
        """Show where the run is: step, what it is judged by, examples per second, time to go."""
        eta = (self._total - step) / max(steps_per_s, 1e-9)
        values = "  ".join(
            f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.3f}"
            for name, value in shown.items()
        )
        text = (
            f"step {step}/{self._total}  {values}  {examples_per_s:.0f} examples/s  "
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
