"""The names of a family's parameters in another program: one table, read in both directions.

All layers are stacked on axis 0 here and apart there. How an array lies, a form says. No model and
no file is known here.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from crate_jax.interop.layouts.forms import Same, Shape

Shapes = Mapping[str, Shape]
Arrays = dict[str, np.ndarray]


class Tree(NamedTuple):
    """The facts about a model that a layout needs.

    Attributes:
        shapes: of its variables, by path: parameters as they are, and running statistics and the
            like behind the name of their collection.
        patch: rows, columns and channels of a patch, which our projection holds on one axis; None:
            the model has no patches.
        collections: that the model has beside its parameters.
        grid: patches down and across, of those with fixed positions; None: the model has none.
    """

    shapes: Shapes
    patch: tuple[int, int, int] | None
    collections: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    @property
    def depth(self) -> int:
        """Layers that are stacked; 0: none are."""
        return max(
            (s[0] for path, s in self.shapes.items() if path.startswith("blocks/")), default=0
        )

    @property
    def of_parameters(self) -> "Tree":
        """Without the other collections."""
        own = {k: v for k, v in self.shapes.items() if k.split("/")[0] not in self.collections}
        return Tree(own, self.patch, grid=self.grid)


Table = Mapping[str, tuple[str, Same]]


class Entry(NamedTuple):
    """One official entry, and where it goes."""

    path: str
    layer: int | None  # index on axis 0 of our array; None: the whole array
    form: Same
    ours: (
        Shape  # of our array, or of its one layer, a patch's axes apart where the form has them so
    )
    official: Shape


class Implied(NamedTuple):
    """Values that a field of the model has where weights have these names.

    Attributes:
        sign: the name that tells.
        values: the legal ones.
    """

    sign: str
    values: tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and forms of one program.

    Attributes:
        name: of the layout, for messages and for `save_weights`.
        table: our path to the official name, in which ``{i}`` is the layer, and the form.
        in_torch: whether PyTorch files have it.
        prefix: before every official name in a file; names are compared without it.
        bare: pattern of the names that it does not stand before.
        under: the key of PyTorch files that holds the entries; "": they lie in the file itself.
        chunks: in how many parts a file has the layers, with the part before a layer's number in
            names, ``blocks.0.1.x``; 0: in one, without. Names are compared without it.
        zeros: paths that have no entry there and are zero.
        left_out: pattern of entries that belong to no parameter of ours and are left aside.
        head: pattern of the head's entries besides those of the table, such as its further layers.
        copies: names under which an array of the table lies there a second time: that of the copy,
            that in the table. A name that is in the table too is a copy where the model has no
            parameter for it.
        constants: names, in which ``{i}`` is the layer, of what each layer has there besides its
            parameters, and how it follows from the model.
        fillers: entries without which that program takes no file, and what is written there of a
            model that has none.
        implies: what the names tell of fields of the model that no shape shows.
        in_file_names: of such fields, the pattern by which the name of a file tells the number.
    """

    name: str
    table: Table
    in_torch: bool = True
    prefix: str = ""
    bare: str = ""
    under: str = ""
    chunks: int = 0
    zeros: tuple[str, ...] = ()
    left_out: str = ""
    head: str = ""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Callable[[Tree], np.ndarray]] = dataclasses.field(default_factory=dict)
    fillers: Mapping[str, Callable[[Tree], np.ndarray]] = dataclasses.field(default_factory=dict)
    implies: Mapping[str, Implied] = dataclasses.field(default_factory=dict)
    in_file_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> str:
        """Pattern of the names in the table, of their copies, of constants and of the head's."""
        named = [pattern for pattern, _ in self.table.values()]
        patterns = [_regex(pattern) for pattern in (*named, *self.copies, *self.constants)]
        return "|".join(patterns + [self.head] * bool(self.head))

    def in_file(self, name: str, depth: int) -> str:
        """An official name as it stands in a file of a model of so many layers."""
        if self.chunks and (found := re.fullmatch(r"blocks\.(\d+)\.(.*)", name)):
            part = int(found[1]) // max(1, depth // self.chunks)
            name = f"blocks.{part}.{found[1]}.{found[2]}"
        bare = self.bare and re.fullmatch(self.bare, name)
        return name if bare else self.prefix + name

    def recognised(self, names: Iterable[str]) -> int:
        """Count the names that the table has."""
        known = re.compile("|".join(_regex(pattern) for pattern, _ in self.table.values()))
        return sum(known.fullmatch(name) is not None for name in names)

    def set_aside(self, names: Iterable[str]) -> list[str]:
        """The names that are left aside."""
        return [name for name in names if self.left_out and re.fullmatch(self.left_out, name)]

    def parameters(self, arrays: Mapping[str, np.ndarray], tree: Tree) -> Arrays:
        """The arrays by official name without copies and constants.

        Of an array that lies there under one of its two names alone, that one counts.

        Raises:
            ValueError: a copy or a constant is not what it must be.
        """
        found = dict(arrays)
        for name, of in self._copies(tree).items():
            if name not in found:
                continue
            copy = found.pop(name)
            if not np.array_equal(copy, found.setdefault(of, copy)):
                raise ValueError(
                    f"{name} must equal {of} in weights of this model; it does not. Build a model "
                    "whose head has a table of its own: tied=False."
                )
        for name, value in self._constants(tree).items():
            given = found.pop(name, value)
            if np.shape(given) == value.shape and not np.allclose(given, value, rtol=0, atol=1e-6):
                raise ValueError(f"{name} must be as the model computes it; it is not.")
        return found

    def of_other_grids(self, arrays: Mapping[str, np.ndarray], tree: Tree) -> list[str]:
        """The constants that belong to another grid of patches."""
        constants = self._constants(tree) if tree.grid is not None else {}
        return [k for k, v in constants.items() if k in arrays and arrays[k].shape != v.shape]

    def _copies(self, tree: Tree) -> Mapping[str, str]:
        """The entries that are no parameters of the model."""
        own = {pattern for path, (pattern, _) in self.table.items() if path in tree.shapes}
        return {name: of for name, of in self.copies.items() if name not in own}

    def _constants(self, tree: Tree) -> Arrays:
        return {
            pattern.format(i=layer): compute(tree)
            for pattern, compute in self.constants.items()
            for layer in range(tree.depth)
        }

    def told_by(self, file_name: str) -> dict[str, float]:
        """Fields of the model that the name of a file tells."""
        found = {name: re.search(told, file_name) for name, told in self.in_file_names.items()}
        return {name: float(match[1]) for name, match in found.items() if match}

    def in_groups(self, names: Iterable[str], groups: Collection[str]) -> list[str]:
        """The names that belong to these top-level groups of our tree."""
        patterns = [
            _regex(pattern)
            for path, (pattern, _) in self.table.items()
            if path.split("/")[0] in groups
        ]
        patterns += [self.head] if "head" in groups and self.head else []
        return [name for name in names if any(re.fullmatch(p, name) for p in patterns)]

    def tree_shapes(self, shapes: Shapes) -> dict[str, Shape]:
        """Our shapes of official ones, for no model in particular: as far as they tell."""
        found = {}
        for path, (pattern, form) in self.table.items():
            matching = [shape for name, shape in shapes.items() if _matches(pattern, name)]
            if matching:
                layers = (len(matching),) if "{i}" in pattern else ()
                found[path] = (*layers, *form.tree_shape(matching[0]))
        return found

    def entries(self, tree: Tree, skip: Collection[str] = ()) -> dict[str, Entry]:
        """Every official entry of a model, by name, without the groups that are skipped.

        Raises:
            ValueError: the layout has no name for one of the model's parameters.
        """
        entries = {}
        for path, shape in tree.shapes.items():
            if path.split("/")[0] in skip or path in self.zeros:
                continue
            if path not in self.table:
                raise ValueError(
                    f"{path} must have a name in the layout {self.name}; it has none. "
                    "Weights of this model are kept under their own paths, in .safetensors or .npz."
                )
            pattern, form = self.table[path]
            stacked = "{i}" in pattern
            ours = shape[1:] if stacked else shape
            ours = (*tree.patch, *ours[1:]) if form.apart and tree.patch else ours
            # An array of stride zero has a shape and no memory.
            official = form.to_official(np.broadcast_to(np.float32(0), ours)).shape
            for layer in range(shape[0]) if stacked else (None,):
                entries[pattern.format(i=layer)] = Entry(path, layer, form, ours, official)
        return entries

    def to_ours(
        self, arrays: Mapping[str, np.ndarray], tree: Tree, skip: Collection[str] = ()
    ) -> Arrays:
        """The flat parameter tree of a model, from arrays that `entries` fits.

        Returns:
            New float32 arrays by path, without the groups that are skipped.

        Raises:
            ValueError: an entry contradicts its form; see `Copies`.
        """
        entries = self.entries(tree, skip)
        used = {entry.path for entry in entries.values()}
        flat = {path: np.empty(s, np.float32) for path, s in tree.shapes.items() if path in used}
        for name, entry in entries.items():
            try:
                value = entry.form.to_ours(np.asarray(arrays[name]), entry.ours)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            place = flat[entry.path][... if entry.layer is None else entry.layer]
            place[...] = value.reshape(place.shape)
        zeros = {path for path in self.zeros if path.split("/")[0] not in skip} & set(tree.shapes)
        return flat | {path: np.zeros(tree.shapes[path], np.float32) for path in zeros}

    def to_official(self, flat: Mapping[str, np.ndarray], tree: Tree) -> Arrays:
        """The official arrays by name, of a flat tree of the model's parameters.

        Returns:
            New contiguous arrays of the dtypes of ``flat``, by name, without the prefix; copies and
            constants too.

        Raises:
            ValueError: the layout has no place for a parameter.
        """
        for path in self.zeros:
            if path in flat and np.any(flat[path]):
                raise ValueError(
                    f"{path} must be zero in the layout {self.name}, which has no place for it; "
                    "got other values. Choose another layout."
                )
        official = {}
        for name, entry in self.entries(tree).items():
            whole = flat[entry.path]
            value = (whole if entry.layer is None else whole[entry.layer]).reshape(entry.ours)
            official[name] = np.array(entry.form.to_official(value), order="C")
        official |= {name: official[of].copy() for name, of in self._copies(tree).items()}
        filled = {name: fill(tree) for name, fill in self.fillers.items()}
        return filled | official | self._constants(tree)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(re.escape("{i}"), r"\d+")


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(_regex(pattern), name) is not None
