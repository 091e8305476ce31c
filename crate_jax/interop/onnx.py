"""A model of images, its weights and the scaling of its pixels as ONNX, by jax2onnx."""

import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import jaxpr_as_fun

from crate_jax.errors import first_line
from crate_jax.interop.export import applied, check_export
from crate_jax.models.classifier import ImageClassifier, of_images
from crate_jax.models.parameters import Params


def export_onnx(
    model: ImageClassifier,
    params: Params,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: str = "uint8",
) -> bytes:
    """A model of images with its weights as the bytes of an ONNX file; see `export_model`.

    The number of images is open. jax2onnx, which converts, does not know every operation: its
    version 0.13 has none for CBSA and Hyper-SET.

    Args:
        model: of images.
        params: its parameters; of a model with running statistics its variables.
        mean: as of `crate_jax.export_model`, and so are the others.
        std: likewise.
        pixels: likewise.

    Raises:
        ValueError: an argument breaks a rule, jax2onnx is missing, or does not convert the model.
    """
    to_onnx = _converter()
    check_export(of_images(model), params, mean, std, pixels)
    compute = applied(model, params, mean, std)
    height_width_c = model.input_shape
    dtype = jnp.dtype("float32" if mean is None else pixels)
    (B,) = jax.export.symbolic_shape("B")
    # Traced before the converter comes: while it traces, it puts functions of its own into JAX,
    # which Flax's scan does not take.
    traced = jax.make_jaxpr(compute)(jax.ShapeDtypeStruct((B, *height_width_c), dtype))

    def evaluate(inputs: Array) -> Array:
        return jaxpr_as_fun(traced)(inputs)[0]

    taken = types.SimpleNamespace(shape=("B", *height_width_c), dtype=dtype)
    try:
        found = to_onnx(evaluate, [taken], model_name="crate_jax")
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"model must be one that jax2onnx converts; {type(model).__name__} is not "
            f"({first_line(error)}). Use export_model, or a newer jax2onnx."
        ) from error
    return found.SerializeToString()


def _converter() -> Callable[..., Any]:
    """jax2onnx's function, which must be installed."""
    import jax.export  # noqa: F401, which `import jax` does not do

    try:
        return importlib.import_module("jax2onnx").to_onnx
    except ImportError as error:
        raise ValueError(
            "export_onnx must have jax2onnx, which converts; it is missing. "
            "Install it: pip install 'crate-jax[onnx]'"
        ) from error
