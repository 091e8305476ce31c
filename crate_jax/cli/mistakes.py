"""A user's mistake is one line on stderr; a bug keeps its trace."""

import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def complain(message: str) -> int:
    """Write the line; return the exit status of a mistake."""
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return 2


def text(error: Exception) -> str:
    """What an error says; str() of a KeyError would quote it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def raised_here(error: Exception) -> bool:
    """Whether this package raised an error itself: such an error is about a user's mistake."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents
