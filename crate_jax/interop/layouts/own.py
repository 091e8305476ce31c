"""Our own tree as a layout: each array under its path."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from crate_jax.interop.layouts.forms import Same
from crate_jax.interop.layouts.layout import Arrays, Layout, Shapes, Tree


@dataclasses.dataclass(frozen=True)
class OwnPaths(Layout):
    """Our own tree: each array under its path."""

    def to_ours(
        self, arrays: Mapping[str, np.ndarray], tree: Tree, skip: Collection[str] = ()
    ) -> Arrays:
        """The arrays as they are, not copied."""
        return dict(arrays)

    def in_groups(self, names: Iterable[str], groups: Collection[str]) -> list[str]:
        """By the first part of a path, whether the model has it or not."""
        return [name for name in names if name.split("/")[0] in groups]


def own_paths(shapes: Shapes) -> OwnPaths:
    """The layout of our own tree with these paths."""
    return OwnPaths("own", {path: (path, Same()) for path in shapes}, head="head/.*")
