"""Sort errors by their cause: a user, the system, or a bug of ours, which keeps its trace."""

import dis
import errno
import functools
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# The errors that this package raises for users; see `is_mistake`.
_FOR_USERS = (ValueError, KeyError, OSError, FloatingPointError)
_PACKAGE = __name__.partition(".")[0]
_RECIPE = "<run_path>"  # what runpy calls a file that it runs
_RAISE, _RERAISE = dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"]
_JUDGEMENT = "crate_jax_is_mistake"

# Errors of the system that no file, disk or network brings about, only a program.
_OF_PROGRAMS = {
    *(errno.EBADF, errno.EFAULT, errno.ENOTTY, errno.ECHILD, errno.ESRCH, errno.EPIPE),
    *(errno.ENOTSOCK, errno.EDEADLK),
}


def is_mistake(error: BaseException) -> bool:
    """True if one line is enough: the error was written for users, or the system speaks of a file.

    An error is written for users where this package has a ``raise`` for it. A lookup that fails,
    ``int()``, unpacking, or a library's error is a bug, in this package's lines too. So is any
    error of a recipe's own lines.
    """
    judged_before = getattr(error, _JUDGEMENT, None)
    if judged_before is not None:
        return judged_before
    return isinstance(error, _FOR_USERS) and (_raised_here(error) or of_the_system(error))


def of_the_system(error: BaseException) -> bool:
    """True if the system refused a file, a disk or a network, or an error wraps such an error."""
    if not isinstance(error, OSError) or any(_module(tb) == _RECIPE for tb in _entries(error)):
        return False
    found: BaseException | None = error
    seen: set[int] = set()  # a chain may lead back
    while found is not None and getattr(found, "errno", None) is None and id(found) not in seen:
        seen.add(id(found))
        found = found.__cause__ or found.__context__  # requests wraps the socket's three times
    if not isinstance(found, OSError) or found.errno in (None, *_OF_PROGRAMS):
        return False
    # EINVAL of a path is the file system's; else it is about a program's numbers.
    return found.errno != errno.EINVAL or found.filename is not None


def judged(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Wrap a function, so that its errors carry the judgement whether they are mistakes.

    For what Grain calls: where it raises such an error again, in another process, the trace has
    other frames.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            setattr(error, _JUDGEMENT, is_mistake(error))  # pickled with the error
            raise

    return run


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def _raised_here(error: BaseException) -> bool:
    """True if a ``raise`` statement of this package raised an error."""
    entries = _entries(error)
    if not entries or _module(entries[-1]).partition(".")[0] != _PACKAGE:
        return False
    last, code = entries[-1], entries[-1].tb_frame.f_code
    at = code.co_code[last.tb_lasti]
    if at != _RERAISE:
        return at == _RAISE
    # JAX and Grain, which leave out frames of theirs, give the place where a frame ended instead:
    # the end of a `with`. The line is still that of the error.
    lines = {
        instruction.positions.lineno
        for instruction in dis.get_instructions(code)
        if instruction.opcode == _RAISE and instruction.positions
    }
    return last.tb_lineno in lines


def _entries(error: BaseException) -> list[TracebackType]:
    """The entries of a trace, the place of the error last."""
    found, entry = [], error.__traceback__
    while entry is not None:
        found.append(entry)
        entry = entry.tb_next
    return found


def _module(entry: TracebackType) -> str:
    return entry.tb_frame.f_globals.get("__name__") or ""
