"""The named models: one row each, and how to build them."""

import dataclasses
import fnmatch
import numbers
from typing import Any

import jax.numpy as jnp

from crate_jax.config import ModelConfig, did_you_mean
from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate

# Sizes from arXiv 2306.01129, and the 8-pixel models of arXiv 2308.16271.
VARIANTS: dict[str, dict[str, Any]] = {
    "crate_tiny_patch16_224": dict(patch_size=16, width=384, depth=12, num_heads=6),
    "crate_small_patch16_224": dict(patch_size=16, width=576, depth=12, num_heads=12),
    "crate_base_patch16_224": dict(patch_size=16, width=768, depth=12, num_heads=12),
    "crate_large_patch16_224": dict(patch_size=16, width=1024, depth=24, num_heads=16),
    "crate_small_384_patch8_224": dict(patch_size=8, width=384, depth=12, num_heads=6),
    "crate_base_patch8_224": dict(patch_size=8, width=768, depth=12, num_heads=12),
}

ARCHITECTURE = (
    "image_size",
    "patch_size",
    "num_classes",
    "width",
    "depth",
    "num_heads",
    "head_dim",
    "pool",
    "in_channels",
    "eta",
    "lmbda",
)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def create_model(name: str, **overrides: Any) -> Crate:
    """Build a model by name; it holds no parameters yet.

    Args:
        name: one of `list_models`.
        **overrides: fields of the model's class that differ from the variant, such as
            ``num_classes=10``. Unless overridden, images are 224 pixels wide and classes 1000.

    Returns:
        A Flax module: ``model.init(key, images, train=False)`` makes its parameters.

    Raises:
        KeyError: no such model, or no such field; the nearest known name is suggested.
    """
    if name not in VARIANTS:
        raise KeyError(
            f"model.name must be a known model; got {name}. " + did_you_mean(name, VARIANTS)
        )
    fields = [f.name for f in dataclasses.fields(Crate) if f.name not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            raise KeyError(
                f"model.{field} must name a field of {name}. " + did_you_mean(field, fields)
            )
        _check_type(field, overrides[field])
    # A model with a list in it could not be hashed, which jax.jit's static arguments need.
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    values: dict[str, Any] = {"image_size": 224, "num_classes": 1000} | VARIANTS[name] | overrides
    return Crate(**values)


def architecture(model: Crate) -> dict[str, Any]:
    """The fields that decide what a model computes, as JSON values: ``Crate(**architecture(m))``.

    What says only how to compute it (dropout, dtype, backward, remat, scan_unroll) is left out.
    """
    fields = {name: getattr(model, name) for name in ARCHITECTURE}
    sizes = {name: list(pair(fields[name])) for name in ("image_size", "patch_size")}
    return fields | sizes | {"head_dim": model.subspace_dim}


def from_architecture(fields: Any) -> Crate:
    """The model of `architecture`, from values that came out of a file.

    Raises:
        ValueError: they are not the fields of a model, or one is of another type.
    """
    if not isinstance(fields, dict) or set(fields) != set(ARCHITECTURE):
        raise ValueError(
            f"the model in a file must be stated by {', '.join(ARCHITECTURE)}; got {fields}. "
            "Another version may have written it: name the model, and convert from .npz or .pth."
        )
    for name, value in fields.items():
        _check_type(name, value)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Crate(**values)


def _check_type(field: str, value: Any) -> None:
    """A number where a number belongs; other wrong types end in a trace from deep within JAX."""
    counts = ("num_classes", "width", "depth", "num_heads", "in_channels", "scan_unroll")
    if field in ("image_size", "patch_size"):
        sides = value if isinstance(value, tuple | list) else (value,)
        rule = "one or two positive sizes in pixels"
        good = len(sides) in (1, 2) and all(_is_count(side) for side in sides)
    elif field in counts or (field == "head_dim" and value is not None):
        rule, good = "a positive whole number", _is_count(value)
    elif field in ("eta", "lmbda", "dropout"):
        rule = "a number"
        good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    else:
        return
    if not good:
        raise ValueError(f"model.{field} must be {rule}; got {value!r}. Change it.")


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def build_model(config: ModelConfig) -> Crate:
    """`create_model` from a config section; fields that are None keep the variant's value."""
    overrides = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    name, dtype = overrides.pop("name"), overrides.pop("dtype")
    return create_model(name, dtype=jnp.dtype(dtype), **overrides)
