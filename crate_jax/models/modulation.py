"""The arguments of a block that differ by depth, and factors that are computed for its halves."""

from typing import NamedTuple

from jax import Array


class PerLayer(NamedTuple):
    """The arguments that differ by depth. A stack takes each of them with the layers on axis 0.

    Attributes:
        drop_path: rate of stochastic depth, a scalar: the share of the examples that skip a half
            while training, if the tokens are added to it. None: no half is skipped.
        condition: for `crate_jax.models.block.Block.modulation`.
    """

    drop_path: Array | None = None
    condition: Array | None = None


class Modulation(NamedTuple):
    """The factors of one half of a block; each array broadcasts to tokens (B, N, d).

    Attributes:
        gate: the factor g of the half.
        scale: the normalised tokens are multiplied by 1 + scale; None: the half takes them as they
            are, and there is no shift either.
        shift: what is added to them then.
    """

    gate: Array
    scale: Array | None = None
    shift: Array | None = None
