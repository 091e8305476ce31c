"""The families of models, a dataclass of fields each, and the named models, a row each.

The section `model` of a config, which is made here, and the Flax module read the same fields.
Nothing here imports JAX.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from crate_jax.options import did_you_mean, is_legal, option, option_of, unknown

Size = int | tuple[int, ...]
DType = str | type | np.dtype


@dataclasses.dataclass(eq=False, repr=False)
class ImageFields:
    """What every image classifier has. Sizes in pixels are a side, or (height, width)."""

    image_size: Size = option(..., "pixels: a side, or height and width", low=1, lengths=(1, 2))
    patch_size: Size = option(..., "pixels, likewise; divides image_size", low=1, lengths=(1, 2))
    num_classes: int = option(
        ..., "Y, the number of logits; of the data set if unset; 0: no head, features", low=0
    )
    width: int = option(..., "d, the length of a token", low=1)
    depth: int = option(..., "L, the number of layers", low=1)
    num_heads: int = option(..., "K, the number of subspaces", low=1)
    head_dim: int | None = option(None, "p, of a subspace; width / num_heads if unset", low=1)
    pool: str = option(
        "cls", "the token that the head reads, or their mean", choices=("cls", "mean")
    )
    in_channels: int = option(3, "channels; 1 (grey) or 3 (RGB) for decoded images", low=1)
    dropout: float = option(0.0, "share dropped while training", low=0, below=1, how=True)
    dtype: DType = option(
        np.float32, "of the computation", choices=("float32", "bfloat16"), how=True
    )
    backward: str = option(
        "derived",
        "the backward pass of LayerNorms and of MSSA; forward mode (jax.jvp) needs autodiff",
        choices=("derived", "autodiff"),
        how=True,
    )
    remat: str = option(
        "none",
        "what the backward pass computes again; dots: all but matrix products",
        choices=("none", "dots", "full"),
        how=True,
    )
    scan_unroll: int | None = option(
        None,
        "layers per iteration of the compiled loop; if unset, all on GPUs without remat, else one",
        low=1,
        how=True,
    )


@dataclasses.dataclass(eq=False, repr=False)
class SubspaceFields(ImageFields):
    """What every model with MSSA has."""

    attention_kernel: str = option(
        "auto",
        "by whom MSSA is computed; auto: by a kernel where the device has one",
        choices=("auto", "xla", "pallas", "cudnn"),
        how=True,
    )

    @property
    def kernel(self) -> str | None:
        """By whom MSSA is computed; None: by the plain function, which JAX differentiates."""
        return self.attention_kernel if self.backward == "derived" else None


@dataclasses.dataclass(eq=False, repr=False)
class CrateFields(SubspaceFields):
    """CRATE, arXiv 2306.01129, and the operators that its ablations put in place of its own."""

    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.1, "sparsity weight of ISTA", low=0)
    attention: str = option("mssa", "the first half of a layer", choices=("mssa", "mhsa"))
    nonlinearity: str = option("ista", "the second half of a layer", choices=("ista", "mlp"))


@dataclasses.dataclass(eq=False, repr=False)
class AlphaFields(SubspaceFields):
    """CRATE-α, arXiv 2405.20299, with a switch for each step of its ablation."""

    pool: str = option("cls", "the token that the head reads", choices=("cls",))
    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.1, "sparsity weight of ISTA", low=0)
    nonlinearity: str = option("odl", "the second half of a layer", choices=("odl", "ista"))
    overcompleteness: int = option(4, "of odl: atoms of the dictionary over the width", low=1)
    decoupled: bool = option(True, "of odl: whether the code is read with a dictionary of its own")
    residual: bool = option(True, "whether the second half's output is added to the tokens")
    layer_scale: float | None = option(None, "start of learned factors on both halves", above=0)
    drop_path: float = option(0.0, "stochastic depth of the last layer", low=0, below=1, how=True)


@dataclasses.dataclass(eq=False, repr=False)
class VitFields(ImageFields):
    """The ViT of arXiv 2010.11929, as timm builds it and as CRATE's repository trains it."""

    pool: str = option(
        "cls", "the token that the head reads", choices=("cls", "patches", "patches_twice")
    )
    mlp_ratio: int = option(4, "hidden units of the MLP over the width", low=1)


FAMILIES: dict[str, type[ImageFields]] = {
    "crate": CrateFields,
    "crate_alpha": AlphaFields,
    "vit": VitFields,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: its family, and the fields that the name stands for."""

    family: str
    fields: Mapping[str, object]


# width, depth, number of heads
_ALPHA = {
    "tiny": (192, 12, 3),
    "small": (576, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_VIT = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}


def _variant(
    family: str, patch_size: int, width: int, depth: int, num_heads: int, **fields: object
) -> Variant:
    sizes = dict(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
    return Variant(family, sizes | fields)


_crate = functools.partial(_variant, "crate")


# Sizes from arXiv 2306.01129, and the 8-pixel models of arXiv 2308.16271.
VARIANTS: dict[str, Variant] = {
    "crate_tiny_patch16_224": _crate(16, width=384, depth=12, num_heads=6),
    "crate_small_patch16_224": _crate(16, width=576, depth=12, num_heads=12),
    "crate_base_patch16_224": _crate(16, width=768, depth=12, num_heads=12),
    "crate_large_patch16_224": _crate(16, width=1024, depth=24, num_heads=16),
    "crate_small_384_patch8_224": _crate(8, width=384, depth=12, num_heads=6),
    "crate_base_patch8_224": _crate(8, width=768, depth=12, num_heads=12),
}
# The other three models of arXiv 2308.16271, section 4.3: {MSSA, MHSA} x {ISTA, MLP}.
for _name, _operators in {
    "crate_mhsa": dict(attention="mhsa"),
    "crate_mlp": dict(nonlinearity="mlp"),
    "crate_mhsa_mlp": dict(attention="mhsa", nonlinearity="mlp"),
}.items():
    VARIANTS[f"{_name}_small_384_patch8_224"] = _crate(8, 384, 12, 6, **_operators)
# arXiv 2405.20299: of each size all patches that its configurations know.
VARIANTS |= {
    f"crate_alpha_{size}_patch{patch}_224": _variant("crate_alpha", patch, *shape)
    for size, shape in _ALPHA.items()
    for patch in (32, 16, 14, 8)
}
VARIANTS |= {f"vit_{size}_patch16_224": _variant("vit", 16, *shape) for size, shape in _VIT.items()}


def find(name: str) -> Variant:
    """The variant of a name.

    Raises:
        KeyError: there is none; the nearest is suggested.
    """
    if name not in VARIANTS:
        raise KeyError(
            f"model.name must be a known model; got {name}. " + did_you_mean(name, VARIANTS)
        )
    return VARIANTS[name]


def fields_of(family: str) -> dict[str, dataclasses.Field]:
    """The fields of a family by name."""
    return {field.name: field for field in dataclasses.fields(FAMILIES[family])}


def values_of(name: str) -> dict[str, object]:
    """What a name stands for: the defaults of its family, and the fields of its row."""
    variant = find(name)
    defaults = {
        field.name: field.default
        for field in fields_of(variant.family).values()
        if field.default is not dataclasses.MISSING
    }
    return {**defaults, **variant.fields}


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Which model, and what differs from its row in `VARIANTS`.

    ``ModelConfig(name=…)`` is the section of that model's family and has the family's fields. A
    field left at None keeps the variant's value.

    Raises:
        KeyError: there is no such model, or its family has no such field.
    """

    name: str = option("crate_small_patch16_224", "one of crate_jax.list_models()", identity=True)
    family: ClassVar[str]

    def __new__(cls, **values: Any) -> "ModelConfig":
        """An object of the family's class, which `__init__` fills."""
        if cls is not ModelConfig:  # the section of a family, as a copy makes it
            return object.__new__(cls)
        name = values.pop("name", cls.name)
        known = fields_of(family := find(name).family)
        for field in values:
            if field not in known:
                raise unknown(f"model.{field}", field, known, name)
        return object.__new__(_SECTIONS[family])

    def __reduce__(self) -> tuple[Any, ...]:
        """The family's class by the family's name: pickle would look for it in this module."""
        return _blank_section, (self.family,), vars(self)

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, field: str) -> Any: ...


def _section(family: str) -> type[ModelConfig]:
    """The fields of a family, unset, and of the types that flags and JSON can state."""
    stated: dict[object, Any] = {Size: tuple[int, ...], DType: str}
    optional = []
    for name, field in fields_of(family).items():
        told = dataclasses.replace(option_of(field), identity=True)
        unset = dataclasses.field(default=None, metadata={"option": told})
        optional.append((name, stated.get(field.type, field.type) | None, unset))
    return dataclasses.make_dataclass(
        "ModelConfig",
        optional,
        bases=(ModelConfig,),
        namespace={"family": family},
        kw_only=True,
    )


_SECTIONS = {family: _section(family) for family in FAMILIES}


def _blank_section(family: str) -> ModelConfig:
    return object.__new__(_SECTIONS[family])


def check_family(model: ModelConfig) -> None:
    """Refuse the section of one family under the name of another's model.

    Raises:
        KeyError: there is no model of this name.
        ValueError: the model is of another family.
    """
    if find(model.name).family != model.family:
        raise ValueError(
            f"model.name must be a model of the section's family, {model.family}; got {model.name}."
            f" Build ModelConfig(name={model.name!r})."
        )


def renamed(model: ModelConfig, name: str) -> ModelConfig:
    """The section of another model, with what this one sets, as far as it is legal there.

    A field that both families share keeps its value even if that breaks its rule, so that the
    mistake is still found.
    """
    theirs, ours = fields_of(find(name).family), fields_of(model.family)
    kept = {
        field: value
        for field, value in overrides(model).items()
        if field in theirs and (theirs[field] is ours[field] or is_legal(theirs[field], value))
    }
    return ModelConfig(name=name, **kept)


def overrides(model: ModelConfig) -> dict[str, object]:
    """The fields that a section sets."""
    values = dataclasses.asdict(model)
    return {
        field: values[field] for field in values if field != "name" and values[field] is not None
    }
