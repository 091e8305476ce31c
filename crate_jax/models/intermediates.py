"""Tokens of some layers, in the arrangement of other libraries."""

from collections.abc import Sequence

import numpy as np
from jax import Array

from crate_jax import placement

FORMATS = ("NHWC", "NLC")


def chosen_layers(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """The chosen layers among 0 … L − 1, in the order in which they are asked for.

    Args:
        indices: layers, of which a negative one counts from the last; a number n: the last n; None:
            all.
        depth: L.

    Raises:
        ValueError: there is no such layer.

    >>> chosen_layers([0, -1], 12), chosen_layers(2, 12)
    ([0, 11], [10, 11])
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int | np.integer):
        if not 1 <= indices <= depth:
            raise ValueError(
                f"indices must be at most {depth} as a number, of the last layers, and at least 1; "
                f"got {indices}. Give a list to name layers."
            )
        return list(range(depth - int(indices), depth))
    if wrong := [i for i in indices if not -depth <= i < depth]:
        raise ValueError(
            f"indices must be layers in 0 … {depth - 1}, or negative ones from the last; got "
            f"{wrong[0]}. Leave it out."
        )
    return [i % depth for i in indices]


def check_format(output_fmt: str) -> None:
    """Refuse an order of axes that is not known.

    Raises:
        ValueError: it is not.
    """
    if output_fmt not in FORMATS:
        raise ValueError(
            f"output_fmt must be {' or '.join(FORMATS)}; got {output_fmt}. Channels come last in "
            "JAX: transpose NHWC by (0, 3, 1, 2) for NCHW."
        )


def arranged(
    Z_BxNxd: Array, first_patch: int, grid: tuple[int, int], output_fmt: str
) -> tuple[Array, Array]:
    """The patches of a layer, (B, P, d) or (B, down, across, d), and the tokens before them."""
    before, patches = Z_BxNxd[:, :first_patch], Z_BxNxd[:, first_patch:]
    if output_fmt == "NHWC":
        shape = (patches.shape[0], *grid, patches.shape[-1])
        patches = placement.reshape(patches, shape)
    return patches, before
