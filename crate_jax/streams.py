"""Standard streams that outlive their readers: a pipe is closed, a terminal goes, a disk fills.

Whoever watches may leave at any time, and no step and no checkpoint depends on it.
"""

import atexit
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO, cast

# Nobody will read this stream again. After other errors, such as a full disk, it may go on.
_GONE = {
    *(errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO),
    *(errno.ECONNRESET, errno.ESHUTDOWN, errno.ENOTCONN),
}


class Nowhere(io.TextIOBase):
    """A stand-in for a standard stream that a program was started without."""

    def write(self, text: str, /) -> int:
        """Take a text, and forget it."""
        return len(text)


class Tolerant:
    """A text stream that drops what cannot be written.

    Args:
        stream: what to write to; everything but writing is left to it.
        redirect: once nobody reads, let the stream's file descriptor lead nowhere. Libraries write
            there too, and Python itself does when it ends.

    Attributes:
        failure: why text was dropped, if somebody still reads the stream.
    """

    def __init__(self, stream: TextIO | Nowhere, *, redirect: bool = False):
        self._stream, self._redirect, self._gone = stream, redirect, False
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text."""
        self._attempt(self._write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written, if somebody takes it."""
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        """True if a person may be watching."""
        try:
            return not self._gone and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def finish(self) -> None:
        """At the end of a program: write the rest, or forget it without a word."""
        self.failure = None
        self.flush()
        if self.failure is not None:
            self._lead_nowhere()

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:  # a terminal without Greek letters
            encoded = text.encode(error.encoding, "backslashreplace")
            self._stream.write(encoded.decode(error.encoding))

    def _attempt(self, action: Callable[..., object], *args: str) -> None:
        if self._gone:
            return
        try:
            action(*args)
        except OSError as error:
            if error.errno in _GONE:
                self._lead_nowhere()
            else:
                self.failure = error
        except ValueError:  # the stream is closed
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        self._gone = True
        if self._redirect:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def tolerant(stream: TextIO | None) -> TextIO:
    """A stream that drops what cannot be written; of None, everything."""
    if isinstance(stream, Tolerant):
        return cast(TextIO, stream)
    return cast(TextIO, Tolerant(stream or Nowhere()))


def secure_streams() -> None:
    """Make the standard streams of a program tolerant, for all that it and its libraries write."""
    _occupy()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Tolerant):
            stream = Tolerant(stream or Nowhere(), redirect=True)
            setattr(sys, name, stream)
            atexit.register(stream.finish)


def _occupy() -> None:
    """Let closed standard descriptors lead nowhere.

    A file that is opened later would get the number of one, and what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(nowhere, True)


def failure(stream: TextIO) -> OSError | None:
    """The reason for which a stream with a reader has dropped text; None if it has not."""
    return stream.failure if isinstance(stream, Tolerant) else None
