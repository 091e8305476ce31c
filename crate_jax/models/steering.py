"""Steering: set a coordinate inside a layer to a value, for every token.

What is set lies in the collection `STEERING` of a model's variables, beside its parameters, so that
a program compiled once takes any coordinate and any value.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

STEERING = "steering"


@dataclasses.dataclass(frozen=True)
class Steer:
    """One coordinate that is set.

    Source: arXiv 2410.16443 and its code.

    Attributes:
        tap: "code", the sparse code in a wide dictionary; or "subspace_tokens", of MSSA.
        layer: counted from 0.
        coordinate: an atom of the dictionary; of the subspace tokens k·p + i, the i-th coordinate
            of the subspace k.
        value: what it is set to.
    """

    tap: str
    layer: int
    coordinate: int
    value: float


class Steering(NamedTuple):
    """The values to set in one array of a layer; the axes are the array's own, behind (B, N).

    Attributes:
        is_set: where.
        value: to what.
    """

    is_set: Array | np.ndarray
    value: Array | np.ndarray


def steered(X: Array, steering: Steering | None) -> Array:
    """X (B, N, …) with the set coordinates."""
    if steering is None:
        return X
    is_set, value = (x[None, None] for x in steering)
    return jnp.where(is_set, value.astype(X.dtype), X)


def steering(model: Any, *steers: Steer) -> dict[str, Any]:
    """The collection that sets coordinates of a model. Put it beside the model's parameters.

    ``model.apply({"params": params} | steering(model, Steer("code", 3, 17, 2.0)), …)``.

    Args:
        model: a model of `crate_jax.create_model`.
        *steers: what is set; none of them: nothing.

    Returns:
        ``{"steering": …}``, and {} for nothing.

    Raises:
        ValueError: the model has no such tap, layer or coordinate.
    """
    blocks: dict[str, dict[str, Steering]] = {}
    for steer in steers:
        part, shape = _place(model, steer)
        zeros = Steering(np.zeros(shape, bool), np.zeros(shape, np.float32))
        found = blocks.setdefault(part, {}).setdefault(steer.tap, zeros)
        for array, value in zip(found, (True, steer.value), strict=True):
            array.reshape(model.depth, -1)[steer.layer, steer.coordinate] = value
    return {STEERING: {"blocks": blocks}} if blocks else {}


def _place(model: Any, steer: Steer) -> tuple[str, tuple[int, ...]]:
    """The part that makes the array of a tap, and the array's shape without tokens, by layer."""
    places = {}
    if model.attention_part.name == "mssa":
        places["subspace_tokens"] = ("mssa", (model.num_heads, model.subspace_dim))
    if model.nonlinearity_part is not None and model.nonlinearity_part.name == "odl":
        places["code"] = ("odl", (model.overcompleteness * model.width,))
    if steer.tap not in places:
        raise ValueError(
            f"steer.tap must be one of {', '.join(places) or 'none'} for a "
            f"{type(model).__name__}; got {steer.tap}. Choose another."
        )
    part, shape = places[steer.tap]
    for name, size in {"layer": model.depth, "coordinate": int(np.prod(shape))}.items():
        if not 0 <= getattr(steer, name) < size:
            raise ValueError(
                f"steer.{name} must be >= 0 and < {size}; got {getattr(steer, name)}. Change it."
            )
    return part, (model.depth, *shape)
