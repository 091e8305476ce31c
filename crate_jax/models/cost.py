"""What a model costs, by formula: parameters, multiply-adds, tokens, memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate


def num_tokens(model: Crate) -> int:
    """N: patches and the class token."""
    (H, W), (h, w) = pair(model.image_size), pair(model.patch_size)
    return (H // h) * (W // w) + 1


def sample_images(model: Crate) -> Array:
    """One blank image of the size the model takes, (1, H, W, c) float32; what `init` needs."""
    return jnp.zeros((1, *pair(model.image_size), model.in_channels))


def count_parameters(model: Crate) -> int:
    """Exact number of parameters, from the shapes of `init` (nothing is computed)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(model)))


def abstract_parameters(model: Crate) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves.

    Raises:
        ValueError: the model's fields do not fit together.
    """
    init = lambda key: model.init(key, sample_images(model), train=False)["params"]  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def multiply_adds(model: Crate) -> int:
    """Multiply-adds of the matrix products of one forward pass for one image.

    Per layer: N d K p for the subspace tokens, 2 N² K p for the attention, N K p d for W_out
    (absent with one full subspace), and 2 N d² for ISTA. Norms, softmax and thresholds are left
    out.
    """
    N, d, K, p = num_tokens(model), model.width, model.num_heads, model.subspace_dim
    h, w = pair(model.patch_size)
    layer = N * d * K * p + 2 * N * N * K * p + _has_output(model) * N * K * p * d + 2 * N * d * d
    return (N - 1) * h * w * model.in_channels * d + model.depth * layer + d * model.num_classes


def step_flops(model: Crate) -> int:
    """Operations of the matrix products of a training step, for one image.

    Two for each multiply-add; the backward pass takes twice the forward pass, less one of the four
    products of attention if it is the derived one. What remat computes again is counted: the
    layers, or with "dots" their attention.
    """
    forward = 2 * multiply_adds(model)
    N, K, p = num_tokens(model), model.num_heads, model.subspace_dim
    product = 2 * model.depth * N * N * K * p
    layers = forward - 2 * multiply_adds(model.clone(depth=0))
    again = {"none": 0, "dots": 2 * product, "full": layers}[model.remat]
    return 3 * forward + again - (product if model.backward == "derived" else 0)


def activation_bytes(model: Crate) -> int:
    """Bytes per image that the layers keep for the backward pass, by formula.

    Without recomputation a layer keeps in its dtype the tokens before either LayerNorm (2 N d); the
    inputs of the matrix products, which are the two normalised tokens and Y − D Y (3 N d) and the
    subspace tokens before and after attention (2 N K p); and the attention (K N²). Mean and
    deviation of a LayerNorm are float32 (4 N), and where ISTA thresholded is a byte an entry
    (N d). With backward "autodiff" it keeps, in float32 whatever its dtype, three arrays of either
    LayerNorm (6 N d) in place of its input, the exponentials of the softmax (K N²) and the
    statistics of both (4 N and 2 K N). With remat "dots" it keeps its input and the products by U,
    W_out, Dᵀ and D (4 N d + N K p); with "full", its input alone. With one full subspace there is
    no W_out, nor the array that it would keep. Dropout and taps are left out.
    """
    N, d, K, p = num_tokens(model), model.width, model.num_heads, model.subspace_dim
    merged, itemsize = _has_output(model), jnp.dtype(model.dtype).itemsize
    float32_values, values = 4 * N, 3 * N * d + (1 + merged) * N * K * p + K * N * N
    if model.backward == "derived":
        values += 2 * N * d
    else:
        float32_values += 6 * N * d + K * N * N + 2 * K * N
    layer = {
        "none": 4 * float32_values + itemsize * values + N * d,
        "dots": itemsize * ((3 + merged) * N * d + N * K * p),
        "full": itemsize * N * d,
    }[model.remat]
    return model.depth * layer


def _has_output(model: Crate) -> bool:
    """Whether MSSA has W_out and b_out: not when one subspace fills the space."""
    return (model.num_heads, model.subspace_dim) != (1, model.width)
