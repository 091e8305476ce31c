"""What the loader loads: rows of arrays, whatever is in them."""

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

Row = dict[str, np.ndarray]


class BadExampleError(ValueError):
    """A stored example cannot be read or is not what it should be; ``data.on_bad_example``."""


class Rows(Protocol):
    """Random access to rows of one shape: images with labels, crops, text.

    Attributes:
        name: what errors and logs call the rows, such as ``digits/train``.
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
        """
        ...


def good_row(rows: Rows, index: int, rng: np.random.Generator, *, skip: bool) -> tuple[Row, bool]:
    """The row at an index or, if that one is bad and may be skipped, the next good one.

    Every attempt draws the same random numbers. What replaces a bad row is then a function of
    index and generator, as any row is.

    Args:
        rows: the rows; after the last comes the first.
        index: of the row that is wanted.
        rng: of its random choices.
        skip: whether a bad row may be replaced.

    Returns:
        The row, and whether it is the one that was wanted.

    Raises:
        BadExampleError: the row is bad, and may not be skipped.
        ValueError: no row is good.
    """
    state = rng.bit_generator.state
    for step in range(len(rows)):
        rng.bit_generator.state = state
        try:
            return rows.row((index + step) % len(rows), rng), step == 0
        except BadExampleError:
            if not skip:
                raise
    raise ValueError(f"{rows.name} must hold good examples; none can be read.")
