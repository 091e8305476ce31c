"""Rows of text in columns that fit a terminal."""

import itertools
from collections.abc import Sequence

WIDTH = 80  # columns of a terminal


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first cells to the left, all others to the right, two spaces apart.

    Of a first cell that is too long its end is given.

    Args:
        rows: the first may be the heads of the columns. A row may have fewer cells than others.
    """
    columns = [*itertools.zip_longest(*rows, fillvalue="")]
    widths = [2 + max(map(len, column)) for column in columns[1:]]
    room = WIDTH - sum(widths)
    names = [name if len(name) <= room else f"…{name[1 - room :]}" for name in columns[0]]
    first = max(map(len, names))
    return [
        f"{name:{first}}{''.join(f'{cell:>{w}}' for cell, w in zip(cells, widths, strict=False))}"
        for name, (_, *cells) in zip(names, rows, strict=True)
    ]
