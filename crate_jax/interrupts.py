"""Ctrl-C ends a command with one line and status 130, wherever it is: in imports, in a compiler.

Python raises KeyboardInterrupt between two of its own instructions. That is too late while a
library compiles for minutes, and in vain where a library swallows it. So a thread hears the signal,
too, and ends the process where nothing else has.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130  # as a shell says of a program that SIGINT ended
LINE = "interrupted; what was saved before is intact"
PATIENCE_S = 5.0  # for what is to be closed and removed on the way out

# Files that are being written aside; whoever ends the process without its `finally` removes them.
ASIDE: set[str] = set()


class _Heeded:
    """The signals that this process has received.

    Attributes:
        raising: whether a command runs, which a KeyboardInterrupt ends in good order.
        told: whether the line is written.
        answered: the number of signals that need nobody to end the process any more.
        heard: how many signals Python's handler has had.
        sent: how many the thread has had, to which they come at once.
    """

    raising = False
    told = False
    answered = 0
    heard = 0
    sent = 0


def heed() -> None:
    """Take SIGINT over, for a program; a program that it is ignored for goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = functools.partial(_again, sys.unraisablehook)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="interrupts").start()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """While the block runs, the first SIGINT raises KeyboardInterrupt; elsewhere it ends all."""
    _Heeded.raising = True
    try:
        yield
    finally:
        _Heeded.raising = False


@contextlib.contextmanager
def kept_from_children(enabled: bool) -> Iterator[None]:
    """Processes that start while the block runs never get SIGINT; a terminal sends it to all.

    They would end with a trace each, if it came before they had set their own handlers.
    """
    if not enabled or not hasattr(signal, "pthread_sigmask"):  # Windows has none
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def answered() -> None:
    """Say that a KeyboardInterrupt was an order to finish, which may take as long as it takes."""
    _Heeded.answered = max(_Heeded.heard, _Heeded.sent)


def told() -> None:
    """Say that the line is written."""
    _Heeded.told = True


def _handle(number: int, frame: FrameType | None) -> None:
    _Heeded.heard += 1
    if not _Heeded.raising or _Heeded.heard > _Heeded.answered + 1:
        _end()
    raise KeyboardInterrupt


def _again(otherwise: Callable[[Any], object], lost: Any) -> None:
    """Send SIGINT again where KeyboardInterrupt was raised in vain, as in a callback of gc."""
    if lost.exc_type is not KeyboardInterrupt:
        otherwise(lost)
        return
    _Heeded.heard -= 1
    _Heeded.sent -= 1
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


def _watch(descriptor: int) -> None:
    """End the process some seconds after a SIGINT, unless that was answered or is another's."""
    while True:
        numbers = os.read(descriptor, 1)
        if signal.SIGINT not in numbers or signal.getsignal(signal.SIGINT) is not _handle:
            continue
        _Heeded.sent += 1
        threading.Event().wait(PATIENCE_S)
        if _Heeded.sent > _Heeded.answered and signal.getsignal(signal.SIGINT) is _handle:
            _end()


def _end() -> NoReturn:
    """Remove what is half written, say the line, and go, whatever still runs."""
    for path in list(ASIDE):
        with contextlib.suppress(OSError):
            os.unlink(path)
    if not _Heeded.told:
        with contextlib.suppress(OSError):
            start = "\n" if sys.stderr is not None and os.isatty(2) else ""
            os.write(2, f"{start}error: {LINE}\n".encode())
    os._exit(INTERRUPTED)
