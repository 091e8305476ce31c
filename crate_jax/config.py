"""The typed schema of a training run, and the rules its values obey.

A recipe in ``configs/`` builds a `TrainConfig`; flags may change any field of it; `validate` then
checks it, once. Nothing here reads a file or imports JAX. A field stands in one place: its type,
default, comment and legal values, and whether another value makes a run another run (identity).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from crate_jax.files import Json, expanded
from crate_jax.models.sections import ModelConfig, check_family, values_of
from crate_jax.models.sections import overrides as overrides
from crate_jax.models.sections import renamed as renamed
from crate_jax.options import check, did_you_mean, option, option_of, unknown
from crate_jax.sections import DataConfig as DataConfig
from crate_jax.sections import MaskingConfig as MaskingConfig
from crate_jax.sections import Mcr2Config as Mcr2Config
from crate_jax.sections import OptimConfig as OptimConfig
from crate_jax.sections import ParallelConfig as ParallelConfig
from crate_jax.sections import PenaltyConfig as PenaltyConfig
from crate_jax.sections import SimDinoConfig as SimDinoConfig
from crate_jax.sections import TextConfig as TextConfig

_Recipe = TypeVar("_Recipe")


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """The whole config of one run: `training.loop.train` takes it, and a workdir records it."""

    name: str = option(
        "digits", "name of the recipe; the default workdir is runs/<name>", identity=True
    )
    task: str = option("classify", "task, one of crate_jax.tasks.TASKS", identity=True)
    seed: int = option(
        0,
        "seed of parameters, data order, augmentation and dropout",
        low=0,
        below=2**32,
        identity=True,
    )
    batch_size: int = option(128, "examples per optimizer step, all devices", low=1, identity=True)
    eval_batch_size: int = option(256, "examples per evaluation step over all devices", low=1)
    total_epochs: float = option(1.0, "length of the run, epochs", above=0)
    total_steps: int | None = option(
        None, "length of the run, optimizer steps; overrides total_epochs", low=1
    )
    init_weights: str | None = option(None, "file or run to start from; unset: scratch", path=True)
    init_fit: tuple[str, ...] = option(
        (), "parts of init_weights that may differ: head, image_size, patch_size, …"
    )
    init_method: str = option(
        "right",
        "resizing of init_weights' kernels and positions; crate_alpha: as its official "
        "fine-tuning; official_maps: positions as behind the published attention maps",
        choices=("right", "crate_alpha", "official_maps"),
    )
    log_every_steps: int = option(50, "steps between two lines of metrics", low=1)
    log_objective_every_steps: int = option(
        0,
        "steps between measures of the layers and pictures (objective, reconstructions); 0: never",
        low=0,
    )
    loggers: tuple[str, ...] = option(
        (), "programs that collect runs, beside the run's own files: wandb, trackio"
    )
    profile_steps: str | None = option(None, "first:last, profiled for TensorBoard; unset: none")
    eval_every_steps: int = option(0, "steps between evaluations; 0: at the end only", low=0)
    checkpoint_every_steps: int = option(
        0, "steps between checkpoints; 0: at each evaluation and at the end", low=0
    )
    keep_latest: int = option(2, "newest checkpoints kept", low=1)
    keep_best: int = option(
        1, "best checkpoints kept besides, by the task's headline metric", low=0
    )
    on_failed_save: str = option(
        "stop",
        "continue reports it, and tries again at the next save",
        choices=("stop", "continue"),
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    penalty: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    mcr2: Mcr2Config = dataclasses.field(default_factory=Mcr2Config)
    simdino: SimDinoConfig = dataclasses.field(default_factory=SimDinoConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


Section = (
    ModelConfig
    | DataConfig
    | TextConfig
    | OptimConfig
    | PenaltyConfig
    | MaskingConfig
    | Mcr2Config
    | SimDinoConfig
    | ParallelConfig
)

# The usual evaluation geometry on ImageNet, and the statistics of its pixels in [0, 1].
IMAGENET_EVAL = "resize_shorter(256)|center_crop(224)"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def choose(arg: str | None, recipes: Mapping[str, _Recipe], default: str) -> _Recipe:
    """The recipe that ``--config=file.py:arg`` asks for.

    Raises:
        KeyError: there is no such recipe; the nearest is suggested.
    """
    name = arg or default
    if name not in recipes:
        raise KeyError(
            f"the variant of a recipe must be known; got {name}. {did_you_mean(name, recipes)}"
        )
    return recipes[name]


def options(
    config: TrainConfig | Section, prefix: str = ""
) -> Iterator[tuple[str, TrainConfig | Section, dataclasses.Field]]:
    """Every field of a config and of its sections: its dotted path, its section, the field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Section):
            yield from options(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, config, field


def get_field(config: TrainConfig | Section, path: str) -> object:
    """The value at a dotted path, such as ``optim.lr``.

    Raises:
        KeyError: a part of the path names no field; the nearest field is suggested.
    """
    parts, value = path.split("."), config
    for i, part in enumerate(parts):
        if not isinstance(value, TrainConfig | Section):
            raise KeyError(f"{path} must name a field; {'.'.join(parts[:i])} has none below it.")
        known = [field.name for field in dataclasses.fields(value)]
        if part not in known:
            owner = value.name if isinstance(value, ModelConfig) else ""
            raise unknown(path, part, known, owner)
        value = getattr(value, part)
    return value


def validate(config: TrainConfig) -> TrainConfig:
    """Check every rule that needs nothing but the config, and return the config.

    Names given as one string, ``a,b``, become several, and ``~`` in a path the home directory.

    Raises:
        ValueError: a field breaks its rule; the message names it, the rule, the value and the
            remedy.
        KeyError: there is no model of this name.
    """
    for path, section, field in options(config):
        value = getattr(section, field.name)
        check(path, field, value, f"Set --config.{path}.")
        if field.type == tuple[str, ...]:
            setattr(section, field.name, _split(value))
        if option_of(field).path and value is not None:
            setattr(section, field.name, expanded(value, path))
    check_family(config.model)
    _check_schedule(config.optim)
    if config.task == "mcr2":
        _check_mcr2(config.mcr2)
    if config.batch_size % config.optim.accumulate_steps:
        raise ValueError(
            f"batch_size must be a multiple of optim.accumulate_steps; got {config.batch_size} and "
            f"{config.optim.accumulate_steps}. Change one of them."
        )
    if config.data.repeats > config.batch_size:
        raise ValueError(
            f"data.repeats must be at most batch_size; got {config.data.repeats} and "
            f"{config.batch_size}. Set --config.data.repeats."
        )
    return config


def _check_schedule(optim: OptimConfig) -> None:
    """Refuse fields that the schedule would not read, and a warm-up that goes down."""
    for name in ("end_lr", "warmup_lr", "cooldown_epochs"):
        if optim.schedule == "official_readme" and getattr(optim, name):
            raise ValueError(
                f"optim.{name} must be 0 if optim.schedule is official_readme; got "
                f"{getattr(optim, name)}. Set --config.optim.{name}=0, or choose the schedule "
                "cosine."
            )
    if optim.warmup_lr > optim.lr:
        raise ValueError(
            f"optim.warmup_lr must be at most optim.lr; got {optim.warmup_lr} and {optim.lr}. "
            "Set --config.optim.warmup_lr."
        )
    if optim.warmup_lr and not optim.warmup_epochs:
        raise ValueError(
            f"optim.warmup_lr must be 0 if optim.warmup_epochs is 0; got {optim.warmup_lr}. "
            "Set --config.optim.warmup_lr=0."
        )


def _check_mcr2(mcr2: Mcr2Config) -> None:
    """Refuse views that are none, and factors that the theory of λ does not know."""
    if mcr2.mode == "self_supervised" and mcr2.views < 2:
        raise ValueError(
            "mcr2.views must be at least 2 if mcr2.mode is self_supervised; got "
            f"{mcr2.views}. Set --config.mcr2.views."
        )
    if mcr2.regularizer and (mcr2.gamma1, mcr2.gamma2) != (1, 1):
        raise ValueError(
            "mcr2.gamma1 and mcr2.gamma2 must be 1 if mcr2.regularizer is set; got "
            f"{mcr2.gamma1} and {mcr2.gamma2}. Set --config.mcr2.regularizer=0, or these to 1."
        )


def _split(names: tuple[str, ...]) -> tuple[str, ...]:
    """("a,b", "c") as ("a", "b", "c"): ml_collections reads ``--field=a,b`` as one name."""
    return tuple(part.strip() for name in names for part in name.split(",") if part.strip())


def to_dict(config: TrainConfig) -> Json:
    """The config as plain JSON values (tuples become lists)."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def from_dict(values: Json) -> TrainConfig:
    """The inverse of `to_dict`. What is missing has its default: an older version wrote it.

    Raises:
        KeyError: a key names no field, for example one of another version of this project.
    """

    def build(section: Any, values: Json, prefix: str = "") -> Any:
        known = {field.name: field.type for field in dataclasses.fields(section)}
        kwargs = {}
        for key, value in values.items():
            if key not in known and section is not ModelConfig:  # which knows its own
                raise unknown(prefix + key, key, known)
            if isinstance(value, dict):
                value = build(known[key], value, f"{prefix}{key}.")
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        return section(**kwargs)

    return build(TrainConfig, values)


def differences(
    old: TrainConfig, new: TrainConfig, *, identity: bool = False
) -> dict[str, tuple[object, object]]:
    """Dotted path of each field whose value differs, with the old and the new value.

    Args:
        old: a config.
        new: another.
        identity: whether to name those fields alone that make a run what it is.
    """
    a, b = ({path: value for path, value in _values(c, identity)} for c in (old, new))
    return {path: (a.get(path), b.get(path)) for path in a | b if a.get(path) != b.get(path)}


def _values(config: TrainConfig, identity: bool) -> Iterator[tuple[str, object]]:
    """Paths and plain values; what the section of the model leaves unset, the variant says."""
    variant = values_of(config.model.name)
    for path, section, field in options(config):
        value = getattr(section, field.name)
        if value is None and section is config.model:
            value = variant.get(field.name)
        if option_of(field).identity or not identity:
            yield path, _plain(value)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, type):  # a dtype
        return np.dtype(value).name
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
