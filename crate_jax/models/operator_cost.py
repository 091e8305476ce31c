"""The cost of a layer's operators, by formula: multiply-adds, and the values saved for backward.

Each operator has a row here, by the name that it has in a block; a new operator is a new row.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from crate_jax.models.classifier import pair
from crate_jax.models.stacked import BlockModel


class Cost(NamedTuple):
    """The cost of an operator of one layer, for one example.

    Attributes:
        products: multiply-adds of its matrix products with weights.
        attention: multiply-adds of those of tokens with tokens.
        outputs: values that the products with weights give, as far as the backward pass needs them;
            without those of ``last``.
        kept: values that the backward pass keeps without remat, in the dtype of the computation.
        kept_bytes: bytes that it keeps besides.
        last: multiply-adds, of those with weights, of a last product that the backward pass never
            computes again: nothing but a sum comes after it.
        parts: values of gradients that come in parts, once for each part but the first: those of a
            weight that is in several products.
        scores: of ``attention``, the multiply-adds of scores, which automatic differentiation
            computes again without remat.
    """

    products: int
    attention: int
    outputs: int
    kept: int
    kept_bytes: int = 0
    last: int = 0
    parts: int = 0
    scores: int = 0


def _mssa(model: BlockModel) -> Cost:
    """U and W_out, which one full subspace has not; V and O are kept.

    Besides them automatic differentiation keeps A, and the derived pass two numbers for each row.
    Where W_out is U again, the gradient of U comes in two parts.
    """
    N, d, K, p = sizes(model)
    tied = getattr(model, "tied_output", False)
    maps, derived = 1 + (tied or (K, p) != (1, d)), model.backward == "derived"
    return Cost(
        products=maps * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=N * K * p,
        kept=maps * N * K * p + (0 if derived else K * N * N),
        kept_bytes=8 * K * N if derived else 0,
        last=(maps - 1) * N * d * K * p,
        parts=tied * d * K * p,
        scores=0 if derived else N * N * K * p,
    )


def _mhsa(model: BlockModel) -> Cost:
    """Maps to queries, keys and values, and W_out; those three, A and O are kept."""
    N, d, K, p = sizes(model)
    return Cost(
        products=4 * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=3 * N * K * p,
        kept=4 * N * K * p + K * N * N,
        last=N * d * K * p,
        scores=N * N * K * p,
    )


def _tssa(model: BlockModel) -> Cost:
    """U and W_out; V and O are kept, and in float32 membership and second moments.

    No product takes tokens with tokens: its sums are elementwise.
    """
    N, d, K, p = sizes(model)
    return Cost(
        products=2 * N * d * K * p,
        attention=0,
        outputs=N * K * p,
        kept=2 * N * K * p,
        kept_bytes=4 * (N * K + K * p),
        last=N * d * K * p,
    )


def _cbsa(model: Any) -> Cost:
    """U and W_out, three products of m representatives with the tokens, two of them alone.

    V and O are kept, A, the attention of the representatives, and three arrays of these.
    """
    N, d, K, p = sizes(model)
    m = math.prod(pair(model.representatives))
    return Cost(
        products=2 * N * d * K * p,
        attention=(3 * N + 2 * m) * m * K * p,
        outputs=N * K * p,
        kept=(2 * N + 3 * m) * K * p + K * m * (N + m),
        last=N * d * K * p,
        scores=(N + m) * m * K * p,
    )


def _ista(model: Any) -> Cost:
    """A Dᵀ and E D of every step; E is kept, where a ReLU lets through, and A between two steps.

    A soft threshold has two ReLUs, and the gradient of a learned η asks for E D.
    """
    N, d, _, _ = sizes(model)
    steps = getattr(model, "ista_steps", 1)
    relus = 2 if getattr(model, "threshold", "relu") == "soft" else 1
    arrays = 1 if getattr(model, "step_sizes", "fixed") == "fixed" else 2
    return Cost(
        products=2 * steps * N * d * d,
        attention=0,
        outputs=2 * steps * N * d,
        kept=(arrays * steps + steps - 1) * N * d,
        kept_bytes=relus * steps * N * d,
        parts=(2 * steps - 1) * d * d,
    )


def _odl(model: Any) -> Cost:
    """Four products with m atoms; both codes and E are kept, and where the ReLUs let through."""
    N, d, _, _ = sizes(model)
    m = model.overcompleteness * d
    return Cost(
        products=4 * N * d * m,
        attention=0,
        outputs=N * (2 * m + d),
        kept=N * (2 * m + d),
        kept_bytes=2 * N * m,
        last=N * d * m,
        parts=(2 if model.decoupled else 3) * d * m,
    )


def _mlp(model: Any) -> Cost:
    """Two products with m hidden units, which are kept."""
    N, d, _, _ = sizes(model)
    m = model.mlp_ratio * d
    return Cost(2 * N * d * m, 0, outputs=N * m, kept=N * m, last=N * d * m)


def _bisoftmax(model: BlockModel) -> Cost:
    """X U and its way back; V, A and O are kept."""
    N, d, K, p = sizes(model)
    return Cost(
        products=2 * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=N * K * p,
        kept=2 * N * K * p + K * N * N,
        last=N * d * K * p,
        parts=d * K * p,
        scores=N * N * K * p,
    )


def _tied_mlp(model: Any) -> Cost:
    """X V with m hidden units, which are kept, and its way back."""
    return _mlp(model)._replace(parts=model.mlp_ratio * model.width**2)


def _steps(model: BlockModel) -> Cost:
    """One product with 2 d outputs, the factors on both halves, which are kept."""
    N, d, _, _ = sizes(model)
    return Cost(2 * N * d * d, 0, outputs=2 * N * d, kept=2 * N * d)


def _dictionary(model: BlockModel) -> Cost:
    """D Y, whose input is kept already."""
    N, d, _, _ = sizes(model)
    return Cost(N * d * d, 0, outputs=N * d, kept=0)


COSTS: dict[str, Callable[[Any], Cost]] = {
    "mssa": _mssa,
    "mhsa": _mhsa,
    "tssa": _tssa,
    "cbsa": _cbsa,
    "ista": _ista,
    "odl": _odl,
    "mlp": _mlp,
    "bisoftmax": _bisoftmax,
    "tied_mlp": _tied_mlp,
    "steps": _steps,
    "dictionary": _dictionary,
}


def sizes(model: BlockModel) -> tuple[int, int, int, int]:
    """N, d, K, p."""
    return model.num_tokens, model.width, model.num_heads, model.subspace_dim
