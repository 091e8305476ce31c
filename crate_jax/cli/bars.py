"""Long work in a terminal: a bar with the time that is left; elsewhere a line now and then.

tqdm draws, and its variables count: TQDM_DISABLE=1 draws nothing, TQDM_DELAY says after how many
seconds a bar appears. A bar has no colour.
"""

import abc
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from crate_jax.columns import WIDTH
from crate_jax.streams import tolerant
from crate_jax.waiting import Add, shown_by

DELAY_S = 2.0  # work that is done by then needs no bar
TICK_S = 0.5  # between two looks at the clock
LINE_EVERY_S = 60.0  # where nobody watches


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show what is counted in the block; at its end no bar is left in the terminal."""
    with contextlib.ExitStack() as left, shown_by(_Shown(left)):
        yield


class _Shown:
    """A `Show` for this program's stderr.

    Args:
        left: closes bars of loops that an error has ended.
    """

    def __init__(self, left: contextlib.ExitStack):
        self._left = left

    @contextlib.contextmanager
    def __call__(self, what: str, total: int | None, unit: str) -> Iterator[Add]:
        watched = tolerant(sys.stderr).isatty()
        work = _Bar(what, total, unit) if watched else _Lines(what, total, unit)
        self._left.callback(work.close)
        try:
            yield work.add
        finally:
            work.close()


class _Ticking(abc.ABC):
    """Work that looks at the clock while it takes long, whatever the main thread does."""

    def __init__(self):
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @abc.abstractmethod
    def tick(self) -> None:
        """Look at the clock."""

    def close(self) -> None:
        """End; more than once does nothing."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            self.tick()


class _Bar(_Ticking):
    """A bar of tqdm, in at most 80 columns."""

    def __init__(self, what: str, total: int | None, unit: str):
        from tqdm import tqdm

        columns, rows = _size()
        form = None if unit else "{desc} {elapsed}"
        self._bar: Any = tqdm(
            desc=what,
            total=total,
            unit=f" {unit}",
            unit_scale=unit == "bytes",
            bar_format=form,
            delay=float(os.environ.get("TQDM_DELAY", DELAY_S)),
            miniters=0,  # whenever it is told, if mininterval is over
            ncols=min(WIDTH, columns) - 1,
            nrows=rows,
            leave=False,
            file=sys.stderr,
        )
        super().__init__()

    def add(self, more: int) -> None:
        """Count, and draw if it is time."""
        total = self._bar.total
        self._bar.update(more if total is None else max(0, min(more, total - self._bar.n)))

    def tick(self) -> None:
        self._bar.update(0)

    def close(self) -> None:
        super().close()
        self._bar.close()


class _Lines(_Ticking):
    """A line of text a minute, where stderr is a file or a pipe."""

    def __init__(self, what: str, total: int | None, unit: str):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._start = self._said = time.monotonic()
        super().__init__()

    def add(self, more: int) -> None:
        """Count."""
        self._done += more

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S:
            return
        self._said, spent = now, now - self._start
        parts = [f"{self._what}: {_clock(spent)}"]
        if self._unit:
            of = f" of {self._total}" if self._total else ""
            parts.append(f"{self._done}{of} {self._unit}")
        if self._total and self._done:
            parts.append(f"{_clock(spent * max(0, self._total / self._done - 1))} left")
        stream = tolerant(sys.stderr)
        stream.write(", ".join(parts) + "\n")
        stream.flush()


def _size() -> tuple[int, int]:
    """Columns and rows of the terminal; 80 and 24 of one that does not say."""
    try:
        columns, rows = os.get_terminal_size(2)
    except OSError:
        columns, rows = 0, 0
    return columns or WIDTH, rows or 24


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
