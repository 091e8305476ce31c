"""The meanings of Orbax's errors: damage on disk, a disk that refuses, a failing system, a bug."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

import jax

from crate_jax.buckets import ServiceError, complaint
from crate_jax.errors import first_line
from crate_jax.machine import lacks_memory


class DamagedStepError(ValueError):
    """A step differs from the one that was saved; another step may be whole."""


class OtherTreeError(ValueError):
    """The tree to restore differs from the tree of a checkpoint.

    The checkpoint may well be whole.
    """


# No file that is damaged raises these.
_NEVER_DAMAGE = (ImportError, NameError, MemoryError, RecursionError, OtherTreeError)
# No disk that refuses to be written raises these.
_NEVER_REFUSAL = (
    *(*_NEVER_DAMAGE, TypeError, AttributeError, LookupError, ArithmeticError),
    *(AssertionError, NotImplementedError),
)
# Missing or changed files: damage. Other numbers speak of the system.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_NUMBER = re.compile(r"\[OS error (\d+)")  # in the words of tensorstore


@contextlib.contextmanager
def damages(told: Callable[[Exception], DamagedStepError]) -> Iterator[None]:
    """Turn errors of reading a damaged step into those that `told` makes; others stay as they are.

    Orbax raises bare Exceptions, KeyErrors and JSON errors, and AttributeErrors too.

    Raises:
        DamagedStepError: the step is damaged.
        OSError: the system fails; what it cannot read now may be whole.
    """
    try:
        yield
    except _NEVER_DAMAGE:
        raise
    except Exception as error:
        lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        if lost or lacks_memory(error):  # of another process, or of this one
            raise
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number is None and (said := complaint(error)):
            raise ServiceError("the checkpoint", said) from error
        if number is None or number in _DAMAGE:
            raise told(error) from error
        if isinstance(error, OSError):
            raise
        raise OSError(number, first_line(error)) from error


@contextlib.contextmanager
def refusals(told: Callable[[Exception], OSError]) -> Iterator[None]:
    """Turn errors of writing into those that `told` makes; bugs stay as they are.

    tensorstore raises ValueErrors as well as OSErrors.
    """
    try:
        yield
    except _NEVER_REFUSAL:
        raise
    except Exception as error:
        raise told(error) from error


def _number(error: Exception) -> int | None:
    """The number of the system's error in the words of tensorstore."""
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None
