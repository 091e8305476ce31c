"""The features that a model lacks, and the facts that the name of a file states."""

from collections.abc import Mapping
from pathlib import Path

from crate_jax.files import Json
from crate_jax.interop.convert import layouts_of
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.stacked import BlockModel


def optional(model: object) -> Mapping[str, tuple[str, ...]]:
    """Groups of parameters that a model may go without, by field; of any module the head."""
    return getattr(model, "OPTIONAL", ImageClassifier.OPTIONAL)


def lacking(model: object) -> dict[str, tuple[str, ...]]:
    """The entries that it lacks."""
    known = optional(model).items()
    return {field: groups for field, groups in known if getattr(model, field, None) == 0}


def told_by_name(path: Path, model: BlockModel) -> Json:
    """Fields of the model that the file's name tells, as official files of its family do."""
    return {k: v for layout in layouts_of(model) for k, v in layout.told_by(path.name).items()}


def check_told(told: Json, model: BlockModel, path: Path) -> None:
    """A number that the file's name tells must be the model's."""
    for field, value in told.items():
        if (ours := getattr(model, field)) != value:
            raise ValueError(
                f"model.{field} must be {value}, as the name of {path} says; got {ours}. "
                f"Set model.{field}, or ask to fit: {field}."
            )
