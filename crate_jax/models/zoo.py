"""Build the named models, and describe a model for a file."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from crate_jax.files import Json
from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate
from crate_jax.models.crate_alpha import CrateAlpha
from crate_jax.models.crate_bert import CrateBert
from crate_jax.models.crate_causal import CrateCausal, CrateLM
from crate_jax.models.crate_mae import CrateMae
from crate_jax.models.fields import FAMILIES, Size, fields_of
from crate_jax.models.hyper_set import HyperSet
from crate_jax.models.sections import ModelConfig, overrides
from crate_jax.models.stacked import BlockModel
from crate_jax.models.tost import ToST
from crate_jax.models.tost_lm import TostLM
from crate_jax.models.variants import VARIANTS, find
from crate_jax.models.vit import ViT
from crate_jax.options import check, did_you_mean, option_of, unknown

Model = BlockModel

CLASSES: dict[str, type[Model]] = {
    "crate": Crate,
    "crate_alpha": CrateAlpha,
    "vit": ViT,
    "crate_causal": CrateCausal,
    "crate_lm": CrateLM,
    "crate_bert": CrateBert,
    "tost_lm": TostLM,
    "hyper_set": HyperSet,
    "tost": ToST,
    "crate_mae": CrateMae,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, by family, of each the small ones first."""
    return fnmatch.filter(VARIANTS, pattern)


def create_model(name: str, **overrides: object) -> Model:
    """Build a model by name; it has no parameters yet.

    Args:
        name: one of `list_models`.
        **overrides: fields of the model's class that differ from the variant, such as
            ``num_classes=10``. Unless overridden, images are 224 pixels wide and classes 1000.

    Returns:
        A Flax module: ``model.init(key, images, train=False)`` makes its parameters.

    Raises:
        KeyError: no such model, or no such field; the nearest known name is suggested.
        ValueError: a value is of another type, or not among the legal ones.
    """
    variant = find(name)
    _check_fields(overrides, variant.family, name)
    values = {**FAMILIES[variant.family].USUAL, **variant.fields, **overrides}
    return _build(variant.family, values)


def build_model(config: ModelConfig) -> Model:
    """`create_model` from a config section; fields that are None keep the variant's value."""
    return create_model(config.name, **overrides(config))


def section_of(model: Model) -> ModelConfig:
    """The config section that builds the model again, by the name of the nearest variant.

    What says only how to compute it is left out, see `architecture`.

    Raises:
        ValueError: the model is of no known family.
    """
    stated = {k: tuple(v) if isinstance(v, list) else v for k, v in architecture(model).items()}
    family = stated.pop("family")
    # In a section None stands for the variant's value, so that value must be None as well.
    agreeing = {
        name: sum(stated[f] in (value, (value, value)) for f, value in variant.fields.items())
        for name, variant in VARIANTS.items()
        if variant.family == family and all(stated[field] is not None for field in variant.fields)
    }
    name = max(agreeing, key=lambda name: agreeing[name])
    return ModelConfig(name=name, **stated)


def altered(model: Model, overrides: Mapping[str, object]) -> Model:
    """A model with other values in some of its fields.

    Raises:
        KeyError, ValueError: see `create_model`.
    """
    family = family_of(model)
    _check_fields(overrides, family, type(model).__name__)
    values = {name: getattr(model, name) for name in fields_of(family)}
    return _build(family, {**values, **overrides})


def _check_fields(names: Iterable[str], family: str, owner: str) -> None:
    """Refuse a name that is no field of a family's models."""
    known = fields_of(family)
    for name in names:
        if name not in known:
            raise unknown(f"model.{name}", name, known, owner)


def family_of(model: object) -> str:
    """The family of a model, by its class or one that it extends.

    Raises:
        ValueError: it is of none.
    """
    for family, cls in CLASSES.items():
        if isinstance(model, cls):
            return family
    raise ValueError(
        f"model must be of a known family, {', '.join(CLASSES)}; got {type(model).__name__}. "
        "Use one of these, or a subclass."
    )


def has_family(model: object) -> bool:
    """True if `family_of` knows the model."""
    return isinstance(model, tuple(CLASSES.values()))


def architecture(model: Model) -> Json:
    """The family and the fields that decide a model's results, as JSON values.

    What says only how to compute it (dropout, dtype, backward, attention_kernel, remat,
    scan_unroll) is left out.

    Raises:
        ValueError: the model is of no known family.
    """
    family = family_of(model)
    fields: Json = {"family": family}
    for name, field in fields_of(family).items():
        if not option_of(field).how:
            value = getattr(model, name)
            fields[name] = list(pair(value)) if field.type == Size else value
    return fields | {"head_dim": model.subspace_dim}


def from_architecture(fields: object) -> Model:
    """Build the model of `architecture`, from values that came out of a file.

    A file without a family is older than the second one. A field with a default may be missing.

    Raises:
        ValueError: they are not the fields of a model, or one is of another type.
    """
    values = dict(fields) if isinstance(fields, dict) else {}
    family = values.pop("family", "crate")
    if family not in CLASSES:
        raise ValueError(
            f"the model in a file must be of a known family; got {family}. "
            + did_you_mean(str(family), CLASSES)
        )
    stated = {name: f for name, f in fields_of(family).items() if not option_of(f).how}
    required = {name for name, f in stated.items() if f.default is dataclasses.MISSING}
    if not required <= set(values) <= set(stated):
        raise ValueError(
            f"the model in a file must be stated by {', '.join(stated)}; got {fields}. "
            "Another version may have written it: name the model, and convert from .npz or .pth."
        )
    return _build(family, values)


def _build(family: str, values: Mapping[str, object]) -> Model:
    """A model of checked values, so that no wrong one ends in a trace from deep within JAX."""
    for name, value in values.items():
        check(f"model.{name}", fields_of(family)[name], value, "Change it.")
    # A model with a list in it could not be hashed, which jax.jit's static arguments need.
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if "dtype" in fields:
        fields["dtype"] = jnp.dtype(fields["dtype"]).type
    return CLASSES[family](**fields)
