"""What a model costs, by formula: parameters, multiply-adds, memory.

A layer costs what its two operators cost. Each has a row here, by the name it has in a block; a new
operator is a new row.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.models.block import Part
from crate_jax.models.parameters import Params
from crate_jax.models.stacked import BlockModel


class Cost(NamedTuple):
    """What an operator of one layer costs, for one example.

    Attributes:
        products: multiply-adds of its matrix products with weights.
        attention: multiply-adds of those of tokens with tokens.
        outputs: values that the products with weights give, as far as the backward pass needs them.
        kept: values that the backward pass keeps without remat, in the dtype of the computation.
        kept_bytes: bytes that it keeps besides.
        last: multiply-adds, of those with weights, of a last product that the backward pass never
            computes again: nothing but a sum comes after it.
        parts: values of gradients that come in parts, once for each part but the first: those of a
            weight that is in several products.
    """

    products: int
    attention: int
    outputs: int
    kept: int
    kept_bytes: int = 0
    last: int = 0
    parts: int = 0


def _mssa(model: BlockModel) -> Cost:
    """U and W_out, which one full subspace has not; V and O are kept.

    Besides them automatic differentiation keeps A, and the derived pass two numbers for each row.
    Where W_out is U again, the gradient of U comes in two parts.
    """
    N, d, K, p = _sizes(model)
    tied = getattr(model, "tied_output", False)
    maps, derived = 1 + (tied or (K, p) != (1, d)), model.backward == "derived"
    return Cost(
        products=maps * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=N * K * p + (maps - 1) * N * d,
        kept=maps * N * K * p + (0 if derived else K * N * N),
        kept_bytes=8 * K * N if derived else 0,
        parts=tied * d * K * p,
    )


def _mhsa(model: BlockModel) -> Cost:
    """Maps to queries, keys and values, and W_out; those three, A and O are kept."""
    N, d, K, p = _sizes(model)
    return Cost(
        products=4 * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=3 * N * K * p + N * d,
        kept=4 * N * K * p + K * N * N,
    )


def _ista(model: Any) -> Cost:
    """A Dᵀ and E D of every step; E is kept, where a ReLU lets through, and A between two steps.

    A soft threshold has two ReLUs, and the gradient of a learned η asks for E D.
    """
    N, d, _, _ = _sizes(model)
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
    N, d, _, _ = _sizes(model)
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
    N, d, _, _ = _sizes(model)
    m = model.mlp_ratio * d
    return Cost(2 * N * d * m, 0, outputs=N * m, kept=N * m, last=N * d * m)


def _bisoftmax(model: BlockModel) -> Cost:
    """X U and its way back; V, A and O are kept."""
    N, d, K, p = _sizes(model)
    return Cost(
        products=2 * N * d * K * p,
        attention=2 * N * N * K * p,
        outputs=N * K * p + N * d,
        kept=2 * N * K * p + K * N * N,
        parts=d * K * p,
    )


def _tied_mlp(model: Any) -> Cost:
    """X V with m hidden units, which are kept, and its way back."""
    return _mlp(model)._replace(parts=model.mlp_ratio * model.width**2)


def _steps(model: BlockModel) -> Cost:
    """One product with 2 d outputs, the factors on both halves, which are kept."""
    N, d, _, _ = _sizes(model)
    return Cost(2 * N * d * d, 0, outputs=2 * N * d, kept=2 * N * d)


COSTS: dict[str, Callable[[Any], Cost]] = {
    "mssa": _mssa,
    "mhsa": _mhsa,
    "ista": _ista,
    "odl": _odl,
    "mlp": _mlp,
    "bisoftmax": _bisoftmax,
    "tied_mlp": _tied_mlp,
    "steps": _steps,
}


def _sizes(model: BlockModel) -> tuple[int, int, int, int]:
    """N, d, K, p."""
    return model.num_tokens, model.width, model.num_heads, model.subspace_dim


def _layer(model: BlockModel) -> Cost:
    """One layer: its operators, and what is kept around them.

    Around them are the tokens before either LayerNorm and after it (4 N d), and in float32 the mean
    and the deviation of both (4 N); without LayerNorms the tokens before either half alone.
    """
    N, d, _, _ = _sizes(model)
    fields = model.block_fields()
    norms = fields.get("norm") != "none"
    found = [Cost(0, 0, outputs=0, kept=(4 if norms else 2) * N * d, kept_bytes=16 * N * norms)]
    found += [COSTS[part.name](model) for part in _parts(model)]
    layer = Cost(*map(sum, zip(*found, strict=True)))
    if fields.get("layer_scale") is None and not fields.get("modulation"):
        return layer
    # The factors' gradients need what they multiply, the last product's result too.
    outputs = layer.outputs + N * d * (layer.last > 0)
    return layer._replace(outputs=outputs, kept=layer.kept + 2 * N * d, last=0)


def _parts(model: BlockModel) -> list[Part]:
    """What a layer is made of, and what computes its factors."""
    modulation = model.block_fields().get("modulation")
    return [part for part in (model.attention_part, model.nonlinearity_part, modulation) if part]


def gradient_parts(model: BlockModel) -> int:
    """Values of the layers' gradients that come in parts, once for each part but the first.

    Where all layers share one set of parameters, each gives a part of the whole gradient.
    """
    parts = model.depth * _layer(model).parts
    if model.SHARED:
        shared = jax.tree.leaves(abstract_parameters(model)["block"])
        parts += (model.depth - 1) * sum(math.prod(leaf.shape) for leaf in shared)
    return parts


def sample_input(model: Any) -> Array:
    """One blank example, as a call takes it; what `init` needs.

    A module that is none of ours says its `input_shape` alone, and takes float32.
    """
    if isinstance(model, BlockModel):
        return model.sample_input()
    return jnp.zeros((1, *model.input_shape), jnp.float32)


def count_parameters(model: BlockModel) -> int:
    """Exact number of parameters, from the shapes of `init` (nothing is computed)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(model)))


def abstract_parameters(model: BlockModel) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves.

    Raises:
        ValueError: the model's fields do not fit together.
    """

    def init(key: Array) -> Params:
        return model.init(key, sample_input(model), train=False)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def has_formula(model: object) -> bool:
    """Whether the functions here know what a model computes."""
    return isinstance(model, BlockModel) and all(part.name in COSTS for part in _parts(model))


def multiply_adds(model: BlockModel) -> int:
    """Multiply-adds of the matrix products of one forward pass for one example.

    Embedding, layers and head; norms, softmax and thresholds are left out, and what is computed
    once for all examples, such as a code of the depths.
    """
    layer = _layer(model)
    layers = model.depth * (layer.products + layer.attention)
    return model.embedding_products + layers + model.head_products


def step_flops(model: BlockModel) -> int:
    """Operations of the matrix products of a training step, for one example.

    Two for each multiply-add; the backward pass takes twice the forward pass. The derived one of
    MSSA computes the scores again and leaves out one of the four other products, so it has four.
    Automatic differentiation computes the scores once more. What remat computes again is counted:
    the layers, or with "dots" their attention. Patches that no LayerNorm stands before need no
    gradient.
    """
    layer = _layer(model)
    product = model.depth * layer.attention  # operations of one of the two products of attention
    layers = 2 * model.depth * (layer.products + layer.attention - layer.last)
    again = {"none": 0, "dots": 2 * product, "full": layers}[model.remat]
    if model.remat == "none" and not (
        model.attention_part.name == "mssa" and model.backward == "derived"
    ):
        again += product
    if "patch_norm" not in abstract_parameters(model)["embedding"]:
        again -= 2 * model.embedding_products
    return 6 * multiply_adds(model) + again


def activation_bytes(model: BlockModel) -> int:
    """Bytes per example that the layers keep for the backward pass, by formula.

    Without recomputation a layer keeps what `crate_jax.models.block.KEPT` names, and its input.
    With remat "dots" it keeps its input and the products with weights; with "full", its input
    alone. Dropout and taps are left out.
    """
    layer, itemsize = _layer(model), jnp.dtype(model.dtype).itemsize
    tokens = model.num_tokens * model.width
    kept = {"none": layer.kept, "dots": tokens + layer.outputs, "full": tokens}[model.remat]
    besides = layer.kept_bytes if model.remat == "none" else 0
    return model.depth * (itemsize * kept + besides)
