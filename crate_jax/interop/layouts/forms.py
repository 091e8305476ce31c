"""The form of one of our arrays in another program: one class a form, used in both directions.

Our linear maps are ``x @ W``, the input's axes first.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array on both sides, but for how its axes are cut; the base of all forms."""

    apart: ClassVar[bool] = False  # whether a patch's rows, columns and channels stand apart

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Their array of ours."""
        return ours

    def to_ours(self, official: np.ndarray, shape: Shape) -> np.ndarray:
        """Our array of theirs; ``shape`` decides how its axes are cut."""
        return official.reshape(shape)

    def tree_shape(self, official: Shape) -> Shape:
        """Our shape of theirs, as far as it tells; axes that they flatten stay one."""
        return official


@dataclasses.dataclass(frozen=True)
class Leading(Same):
    """Axes of length one in front on the official side."""

    axes: int = 1

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """The axes put in front."""
        return ours[(None,) * self.axes]

    def tree_shape(self, official: Shape) -> Shape:
        """Without those axes."""
        return official[self.axes :]


@dataclasses.dataclass(frozen=True)
class Trailing(Same):
    """Axes of length one at the end on the official side."""

    axes: int = 1

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """The axes put at the end."""
        return ours.reshape(*ours.shape, *[1] * self.axes)

    def tree_shape(self, official: Shape) -> Shape:
        """Without those axes."""
        return official[: -self.axes]


class Flat(Same):
    """One axis officially."""

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """All axes joined."""
        return ours.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear(Same):
    """(out, in) officially; here the input's axes first, then the output's."""

    in_axes: int = 1

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Input and output flattened, then swapped."""
        return ours.reshape(math.prod(ours.shape[: self.in_axes]), -1).T

    def to_ours(self, official: np.ndarray, shape: Shape) -> np.ndarray:
        """Swapped, then cut into the axes of ``shape``."""
        return official.T.reshape(shape)

    def tree_shape(self, official: Shape) -> Shape:
        """Swapped."""
        return official[::-1]


class Pointwise(Same):
    """A linear map that is a convolution of one pixel officially, (out, in, 1, 1)."""

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Swapped, with the pixel's axes at the end."""
        return ours.T[..., None, None]

    def to_ours(self, official: np.ndarray, shape: Shape) -> np.ndarray:
        """Without those axes, swapped."""
        return official[..., 0, 0].T.reshape(shape)

    def tree_shape(self, official: Shape) -> Shape:
        """Swapped, without those axes."""
        return official[1::-1]


class Kernel(Same):
    """(out, in, rows, columns) officially, as PyTorch keeps a convolution; here in and out last."""

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Output and input first."""
        return ours.transpose(3, 2, 0, 1)

    def to_ours(self, official: np.ndarray, shape: Shape) -> np.ndarray:
        """Output and input last."""
        return official.transpose(2, 3, 1, 0).reshape(shape)

    def tree_shape(self, official: Shape) -> Shape:
        """(rows, columns, in, out)."""
        return (*official[2:], *official[1::-1])


class PatchKernel(Same):
    """(h, w, c, d) officially, as Flax keeps a convolution; h·w·c is one axis here."""

    apart = True


class Convolution(Kernel, PatchKernel):
    """(d, c, h, w) officially, as PyTorch keeps a convolution; h·w·c is one axis here."""


@dataclasses.dataclass(frozen=True)
class Copies(Same):
    """The same matrix so many times below each other officially, once here."""

    count: int
    form: Same

    def to_official(self, ours: np.ndarray) -> np.ndarray:
        """Repeated."""
        return np.concatenate([self.form.to_official(ours)] * self.count)

    def to_ours(self, official: np.ndarray, shape: Shape) -> np.ndarray:
        """The first one.

        Raises:
            ValueError: they are not equal.
        """
        first, *others = np.split(official, self.count)
        if any((other != first).any() for other in others):
            raise ValueError(
                f"must be {self.count} equal copies of one matrix; got copies that differ. "
                "This model has one matrix for all of them."
            )
        return self.form.to_ours(first, shape)

    def tree_shape(self, official: Shape) -> Shape:
        """The shape of one of them."""
        return self.form.tree_shape((official[0] // self.count, *official[1:]))
