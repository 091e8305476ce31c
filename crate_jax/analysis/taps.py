"""One forward pass that returns named per-layer tensors."""

from collections.abc import Sequence
from typing import Any

from jax import Array

from crate_jax.models.crate import TAPS, Crate


def taps(
    model: Crate, params: Any, images: Array, names: Sequence[str] = TAPS
) -> tuple[Array, dict[str, Array]]:
    """Run the model and return what its layers computed on the way.

    Args:
        model: a model of `crate_jax.create_model`.
        params: its parameters.
        images: (B, H, W, C), normalised.
        names: out of ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), ``mssa``,
            ``z_half`` and ``ista`` (L, B, N, d); only these are stored.

    Returns:
        Logits (B, Y), float32, and {name: array} in the model's dtype, layers on axis 0.

    Raises:
        KeyError: an unknown name.
        ValueError: no name, or images that do not fit the model.
    """
    if not names:
        raise ValueError(f"names must hold at least one of {', '.join(TAPS)}; got none.")
    return model.apply({"params": params}, images, train=False, taps=tuple(names))  # type: ignore
