"""A user's mistake is one line on stderr."""

import sys

from crate_jax.streams import tolerant


def complain(message: str) -> int:
    """Write the line; return the exit status of a mistake."""
    tolerant(sys.stderr).write("error: " + " ".join(message.split()) + "\n")
    return 2


def text(error: BaseException) -> str:
    """The message of an error; str() of a KeyError would quote it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
