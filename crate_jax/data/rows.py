"""The rows that the loader loads: arrays with any content."""

import errno
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import jax
import numpy as np

Row = dict[str, np.ndarray]
_Read = TypeVar("_Read")

# Seconds to wait before each further attempt at what the system failed to read: 16 in all.
PATIENCE_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# For causes that are not the disk's or the network's.
REMEDIES = {
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
    errno.ENFILE: "Raise the machine's limit of open files: sysctl fs.file-max.",
    errno.ENOMEM: "Lower data.num_workers, data.num_threads or data.prefetch_mib.",
    errno.EACCES: "Let this user read it.",
    errno.EPERM: "Let this user read it.",
}

_log = logging.getLogger("crate_jax")


class BadExampleError(ValueError):
    """A stored example does not decode or breaks a rule; ``data.on_bad_example`` decides."""


class FailingSystemError(OSError):
    """A disk, network or machine fails. The example may be good, and is not skipped."""


def patiently(read: Callable[[], _Read], name: str) -> _Read:
    """Call `read`, with some more attempts if the system fails.

    Errors of the system are `OSError` and `MemoryError`. A file that is not there is none: waiting
    brings no file back.

    Args:
        read: called again after each pause of `PATIENCE_S`.
        name: what errors and logs call that which is read.

    Raises:
        FailingSystemError: the last attempt failed too; the message names the cause.
    """
    for attempt, pause in enumerate(PATIENCE_S):
        try:
            return read()
        except FileNotFoundError:
            raise
        except (OSError, MemoryError) as error:
            if not attempt:
                _say(name, _cause(error))
        time.sleep(pause)
    try:
        return read()
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        code = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
        remedy = REMEDIES.get(code or 0, "Mend the disk or the network, then start again.")
        raise FailingSystemError(
            f"{name} must be readable; got {_cause(error)}, in {len(PATIENCE_S) + 1} attempts over "
            f"{sum(PATIENCE_S):.0f} s. {remedy}"
        ) from error


def _cause(error: OSError | MemoryError) -> str:
    return f"{type(error).__name__}: {str(error) or 'out of memory'}"


@functools.lru_cache(maxsize=1024)
def _say(name: str, cause: str) -> None:
    """Log once that something is tried again, however many threads and epochs read it."""
    _log.warning("%s cannot be read now (%s); it is tried again", name, cause)


class Rows(Protocol):
    """Random access to rows of one shape: images with labels, crops, text.

    Attributes:
        name: the name of the rows in errors and logs, such as ``digits/train``.
        shapes: shape and dtype of each array of a row.
    """

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:  # noqa: D102
        ...

    def __len__(self) -> int: ...

    def row(self, index: int, rng: np.random.Generator) -> Row:
        """The row at an index, with the random choices of a generator.

        Raises:
            BadExampleError: what is stored there is bad; the message names rows and index.
            FailingSystemError: it cannot be read, and may be good.
        """
        ...


def good_row(rows: Rows, index: int, rng: np.random.Generator, *, skip: bool) -> tuple[Row, bool]:
    """The row at an index. If it is bad and may be skipped, the next good row.

    Every attempt draws the same random numbers. What replaces a bad row is then a function of
    index and generator, as any row is.

    Args:
        rows: the rows; after the last comes the first.
        index: of the row that is wanted.
        rng: the random generator of its random choices.
        skip: whether a bad row may be replaced.

    Returns:
        The row, and whether it is the one that was wanted.

    Raises:
        BadExampleError: the row is bad, and may not be skipped.
        ValueError: no row is good.
    """
    state, first = rng.bit_generator.state, None
    for step in range(len(rows)):
        rng.bit_generator.state = state
        try:
            return rows.row((index + step) % len(rows), rng), step == 0
        except BadExampleError as error:
            if not skip:
                raise
            first = first or error
    raise ValueError(
        f"{rows.name} must hold good examples; none can be read. The first: {first}"
    ) from first
