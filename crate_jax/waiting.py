"""The progress of long work: the work counts, and other code may show it.

Nothing here knows a terminal. A command sets who shows (`shown_by`); without one, counting costs
nothing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")
Add = Callable[[int], object]  # so much more is done


class Show(Protocol):
    """Shows a piece of work while a block runs."""

    def __call__(self, what: str, total: int | None, unit: str) -> AbstractContextManager[Add]:
        """Show it.

        Args:
            what: is done, in a word or some.
            total: how much there is to do; None: nobody knows.
            unit: the unit of the total, in the plural; "": a step that cannot be counted.
        """
        ...


_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


@contextlib.contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Let somebody show what is counted while the block runs."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


@contextlib.contextmanager
def counting(what: str, total: int | None = None, unit: str = "") -> Iterator[Add]:
    """Count what is done in a block; see `Show` for the arguments.

    Yields:
        A function that takes how much more is done.
    """
    show = _SHOW.get()
    if show is None:
        yield lambda more: None
        return
    with show(what, total, unit) as add:
        yield add


def counted(
    items: Iterable[_Item],
    what: str,
    total: int | None = None,
    unit: str = "steps",
    *,
    size: Callable[[_Item], int] = lambda item: 1,
) -> Iterator[_Item]:
    """The items, each counted when the next one is asked for.

    Args:
        items: any.
        what: is done with them.
        total: the total of all sizes; None: nobody knows.
        unit: the unit of the sizes, in the plural.
        size: the size of an item.
    """
    with counting(what, total, unit) as add:
        for item in items:
            yield item
            add(size(item))
