"""The section `model` of a config: a dataclass for each family, made of the family's fields.

Nothing here imports JAX.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar

from crate_jax.models.fields import FAMILIES, DType, ModelFields, Size, fields_of
from crate_jax.models.variants import find
from crate_jax.options import is_legal, option, option_of, unknown


def values_of(name: str) -> dict[str, object]:
    """The values behind a name: the defaults of its family, and the fields of its row."""
    variant = find(name)
    defaults = {
        field.name: field.default
        for field in fields_of(variant.family).values()
        if field.default is not dataclasses.MISSING
    }
    return {**defaults, **variant.fields}


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The model of a run, and its differences from its row in `VARIANTS`.

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
        return blank_section(family)

    def __reduce__(self) -> tuple[Any, ...]:
        """The family's class by the family's name: pickle would look for it in this module."""
        return blank_section, (self.family,), vars(self)

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, field: str) -> Any: ...


def blank_section(family: str) -> ModelConfig:
    """The section of a family, before `ModelConfig.__init__` fills it."""
    return object.__new__(_section(family, FAMILIES[family]))


@functools.cache
def _section(family: str, fields: type[ModelFields]) -> type[ModelConfig]:
    """The fields of a family, unset, and of the types that flags and JSON can state."""
    stated: dict[object, Any] = {Size: tuple[int, ...], DType: str}
    optional = []
    for field in dataclasses.fields(fields):
        told = dataclasses.replace(option_of(field), identity=True)
        unset = dataclasses.field(default=None, metadata={"option": told})
        optional.append((field.name, stated.get(field.type, field.type) | None, unset))
    return dataclasses.make_dataclass(
        "ModelConfig",
        optional,
        bases=(ModelConfig,),
        namespace={"family": family},
        kw_only=True,
    )


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
