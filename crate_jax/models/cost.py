"""The cost of a model by formula: parameters, multiply-adds, memory.

A layer costs what its two operators cost: `crate_jax.models.operator_cost`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.models.block import Part
from crate_jax.models.language import LanguageModel
from crate_jax.models.operator_cost import COSTS, Cost, sizes
from crate_jax.models.parameters import Params, Variables
from crate_jax.models.stacked import BlockModel


def _layer(model: BlockModel) -> Cost:
    """One layer: its operators, and what is kept around them.

    Around each half are the tokens before its LayerNorm and after it (2 N d), and in float32 their
    mean and deviation (2 N); without a LayerNorm the tokens before it alone.
    """
    N, d, _, _ = sizes(model)
    fields, parts = model.block_fields(), _parts(model)
    norms = fields.get("norm") != "none"
    scaled = fields.get("layer_scale") is not None or bool(fields.get("modulation"))
    halves = 1 + (model.nonlinearity_part is not None)
    if unknown := [part.name for part in parts if part.name not in COSTS]:
        raise ValueError(
            f"{unknown[0]} must have a formula of its cost; it has none. Add it to COSTS in "
            "crate_jax/models/operator_cost.py."
        )
    found = [COSTS[part.name](model) for part in parts]
    # The part after a half needs its last product; the gradients of the factors need both.
    for i, cost in enumerate(found if scaled else found[:-1]):
        found[i] = cost._replace(last=0, outputs=cost.outputs + N * d * (cost.last > 0))
    kept = (1 + norms + scaled) * N * d
    around = Cost(0, 0, outputs=0, kept=kept, kept_bytes=8 * N * norms)
    return Cost(*map(sum, zip(*found, *[around] * halves, strict=True)))


def _parts(model: BlockModel) -> list[Part]:
    """The parts of a layer, and the part that computes its factors."""
    modulation = model.block_fields().get("modulation")
    return [part for part in (model.attention_part, model.nonlinearity_part, modulation) if part]


def gradient_parts(model: BlockModel) -> int:
    """Values of the gradients that come in parts, once for each part but the first.

    Where all layers share one set of parameters, each gives a part of the whole gradient. A table
    of tokens that is the head too has one part of each.
    """
    parts = model.depth * _layer(model).parts
    if model.SHARED:
        shared = jax.tree.leaves(abstract_parameters(model)["block"])
        parts += (model.depth - 1) * sum(math.prod(leaf.shape) for leaf in shared)
    if isinstance(model, LanguageModel) and model.tied:
        parts += model.vocab_size * model.width
    return parts


def sample_input(model: Any) -> Array:
    """One blank example, as a call takes it; `init` needs it.

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
    return abstract_variables(model)["params"]


def abstract_variables(model: BlockModel) -> Variables:
    """All collections as `jax.ShapeDtypeStruct` leaves: parameters, and running statistics if any.

    Raises:
        ValueError: the model's fields do not fit together.
    """

    def init(key: Array) -> Variables:
        return model.init(key, sample_input(model), train=False)

    return jax.eval_shape(init, jax.random.key(0))


def has_formula(model: object) -> bool:
    """True if the functions here know the operators of a model."""
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
    the layers, or with "dots" their attention. The embedding's input needs no gradient.
    """
    layer = _layer(model)
    whole = layer.products + layer.attention - layer.last
    of_layer = {"none": layer.scores, "dots": layer.attention, "full": whole}[model.remat]
    again = model.depth * of_layer + model.head_again
    return 6 * multiply_adds(model) + 2 * (again - model.first_products)


def activation_bytes(model: BlockModel) -> int:
    """Bytes per example that a model saves for the backward pass, by formula."""
    outside = jnp.dtype(model.dtype).itemsize * model.kept_outside
    return model.depth * layer_bytes(model) + outside


def layer_bytes(model: BlockModel) -> int:
    """Bytes per example that a layer saves for the backward pass, by formula.

    Without recomputation a layer keeps what `crate_jax.models.block.KEPT` names, and its input.
    With remat "dots" it keeps its input and the products with weights; with "full", its input
    alone. Dropout and taps are left out.
    """
    layer, itemsize = _layer(model), jnp.dtype(model.dtype).itemsize
    tokens = model.num_tokens * model.width
    kept = {"none": layer.kept, "dots": tokens + layer.outputs, "full": tokens}[model.remat]
    besides = layer.kept_bytes if model.remat == "none" else 0
    return itemsize * kept + besides
