"""The typed schema of a training run, and the rules its values obey.

A recipe in ``configs/`` builds a `TrainConfig`; flags may change any field of it; `validate` then
checks it, once. Nothing here reads a file or imports JAX.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Which model, and what differs from its row in `crate_jax.models.zoo.VARIANTS`.

    A field left at None keeps the variant's value.
    """

    name: str = "crate_small_patch16_224"  # one of crate_jax.list_models()
    num_classes: int | None = None  # None: as many as the data set has
    image_size: tuple[int, ...] | None = None  # pixels: (height, width), or (side,)
    patch_size: tuple[int, ...] | None = None  # pixels: (height, width), or (side,)
    width: int | None = None  # d, the length of a token
    depth: int | None = None  # L, the number of layers
    num_heads: int | None = None  # K, the number of subspaces
    head_dim: int | None = None  # p, the dimension of a subspace; None: width / num_heads
    pool: str | None = None  # "cls" or "mean"
    in_channels: int | None = None  # 1 (grey) or 3 (RGB) for decoded images
    eta: float | None = None  # ISTA's step size, > 0
    lmbda: float | None = None  # ISTA's sparsity weight, >= 0
    dropout: float | None = None  # share of entries dropped while training, [0, 1)
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"
    backward: str | None = None  # the backward pass: "derived" or, for jax.jvp, "autodiff"
    remat: str | None = None  # what the backward pass recomputes: "none", "dots" or "full"
    scan_unroll: int | None = None  # layers per iteration of the compiled loop, >= 1


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Where the examples come from and what happens to each on its way to the device."""

    dataset: str = "digits"  # "digits", "folder", "tar", "synthetic", or any TFDS name
    data_dir: str | None = None  # TFDS directory or folder root; None: TFDS's own default
    train_split: str = "train"  # TFDS split syntax, or a folder under data_dir
    eval_split: str = "test"  # likewise
    download: bool = False  # whether TFDS may download and prepare a missing data set
    train_transforms: str = ""  # "name(arguments)|name(arguments)", see data/augment.py
    eval_transforms: str = ""  # likewise, without randomness
    mean: tuple[float, ...] = (0.5,)  # subtracted from pixels in [0, 1]: one, or one a channel
    std: tuple[float, ...] = (0.5,)  # then divided by, > 0
    num_workers: int = 0  # loader processes; 0: threads of this process
    num_threads: int = 4  # reading threads per loader process, >= 1
    prefetch_mib: int = 256  # host memory for images made ahead, over all workers, MiB, >= 1
    mixup_alpha: float = 0.0  # Beta(α, α) of blended images, >= 0; 0: none
    cutmix_alpha: float = 0.0  # Beta(α, α) of pasted boxes, >= 0; 0: none
    mix_switch: float = 0.5  # how often CutMix, where both are on, [0, 1]
    on_bad_example: str = "raise"  # or "skip": the next good one instead (evaluation: left out)
    max_bad_share: float = 0.01  # of the examples that may be skipped, [0, 1]
    check_crc: bool = False  # whether TFRecord checksums are verified at each read
    index_dir: str | None = None  # where indices of TFRecord and tar files are kept; None: beside


@dataclasses.dataclass(kw_only=True)
class OptimConfig:
    """The optax chain and its schedule."""

    optimizer: str = "adamw"  # "adamw" or "lion"
    lr: float = 1e-3  # peak learning rate, > 0
    weight_decay: float = 0.05  # decoupled, >= 0
    no_decay: tuple[str, ...] = ()  # parameter names without decay; (): decay on every one
    b1: float = 0.9  # [0, 1)
    b2: float = 0.999  # [0, 1)
    eps: float = 1e-8  # AdamW's denominator, > 0
    mu_dtype: str = "float32"  # of the first moment: "bfloat16" halves its memory
    schedule: str = "cosine"  # "cosine" (per step) or "official_readme" (per epoch)
    warmup_epochs: float = 0.0  # linear warm-up, >= 0
    label_smoothing: float = 0.0  # [0, 1)
    clip_norm: float = 0.0  # largest global gradient norm; 0: no clipping
    accumulate_steps: int = 1  # micro-batches per optimizer step, >= 1
    ema_decay: float = 0.0  # of the averaged parameters, [0, 1); 0: none kept


@dataclasses.dataclass(kw_only=True)
class ParallelConfig:
    """How the devices are laid out."""

    mesh: str = "data:-1"  # "axis:size,…" of data and fsdp; one size may be -1: what is left
    coordinator: str | None = None  # "host:port" of process 0; "auto": TPU pod, SLURM, …; None: one
    num_processes: int | None = None  # with host:port: how many there are, >= 1
    process_id: int | None = None  # with host:port: which one this is, >= 0
    heartbeat_timeout_seconds: int = 30  # a process that is silent for longer ends the others


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """One run, whole: what `training.loop.train` takes and what a workdir records."""

    name: str = "digits"  # of the recipe; the default workdir is runs/<name>
    seed: int = 0  # of parameters, data order, augmentation and dropout, >= 0
    batch_size: int = 128  # examples per optimizer step over all devices
    eval_batch_size: int = 256  # examples per evaluation step over all devices
    total_epochs: float = 1.0  # length of the run, > 0
    total_steps: int | None = None  # the same in optimizer steps; overrides total_epochs
    init_weights: str | None = None  # start from this file or run; None: from scratch
    init_fit: tuple[str, ...] = ()  # of init_weights: head, image_size, patch_size, in_channels, …
    log_every_steps: int = 50  # >= 1
    log_objective_every_steps: int = 0  # layer-wise R^c and sparsity; 0: never
    eval_every_steps: int = 0  # 0: at the end only
    checkpoint_every_steps: int = 0  # 0: at each evaluation and at the end
    keep_latest: int = 2  # newest checkpoints kept, >= 1
    keep_best: int = 1  # checkpoints of highest test/top1 kept besides, >= 0
    on_failed_save: str = "stop"  # or "continue": say so, and try again at the next save
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


# The usual evaluation geometry on ImageNet, and the statistics of its pixels in [0, 1].
IMAGENET_EVAL = "resize_shorter(256)|center_crop(224)"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What a started run may not change: another value would make it another run.
IDENTITY = (
    "name",
    "seed",
    "batch_size",
    "model",
    "data.dataset",
    "data.train_split",
    "data.train_transforms",
    "data.mixup_alpha",
    "data.cutmix_alpha",
    "data.mix_switch",
    "optim.optimizer",
    "optim.schedule",
    "optim.ema_decay",
    "optim.clip_norm",
    "optim.no_decay",
    "optim.mu_dtype",
)

_CHOICES = {
    "model.pool": (None, "cls", "mean"),
    "model.dtype": ("float32", "bfloat16"),
    "model.backward": (None, "derived", "autodiff"),
    "model.remat": (None, "none", "dots", "full"),
    "optim.optimizer": ("adamw", "lion"),
    "optim.mu_dtype": ("float32", "bfloat16"),
    "optim.schedule": ("cosine", "official_readme"),
    "data.on_bad_example": ("raise", "skip"),
    "on_failed_save": ("stop", "continue"),
}

# field: (lowest, bound); the bound itself is excluded.
_INF = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32),
    "batch_size": (1, _INF),
    "eval_batch_size": (1, _INF),
    "total_steps": (1, _INF),
    "log_every_steps": (1, _INF),
    "log_objective_every_steps": (0, _INF),
    "eval_every_steps": (0, _INF),
    "checkpoint_every_steps": (0, _INF),
    "keep_latest": (1, _INF),
    "keep_best": (0, _INF),
    "model.num_classes": (1, _INF),
    "model.width": (1, _INF),
    "model.depth": (1, _INF),
    "model.num_heads": (1, _INF),
    "model.head_dim": (1, _INF),
    "model.in_channels": (1, _INF),
    "model.lmbda": (0, _INF),
    "model.dropout": (0, 1),
    "model.scan_unroll": (1, _INF),
    "data.num_workers": (0, _INF),
    "data.num_threads": (1, _INF),
    "data.prefetch_mib": (1, _INF),
    "data.mixup_alpha": (0, _INF),
    "data.cutmix_alpha": (0, _INF),
    "parallel.num_processes": (1, _INF),
    "parallel.process_id": (0, _INF),
    "parallel.heartbeat_timeout_seconds": (1, _INF),
    "optim.weight_decay": (0, _INF),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.warmup_epochs": (0, _INF),
    "optim.label_smoothing": (0, 1),
    "optim.clip_norm": (0, _INF),
    "optim.accumulate_steps": (1, _INF),
    "optim.ema_decay": (0, 1),
}
_SHARES = ("data.mix_switch", "data.max_bad_share")  # 0 and 1 included
_POSITIVE = ("total_epochs", "model.eta", "optim.lr", "optim.eps")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."


def choose(arg: str | None, recipes: dict[str, Any], default: str) -> Any:
    """The recipe that ``--config=file.py:arg`` asks for.

    Raises:
        KeyError: there is no such recipe; the nearest is suggested.
    """
    name = arg or default
    if name not in recipes:
        raise KeyError(f"the recipe must be known; got {name}. {did_you_mean(name, recipes)}")
    return recipes[name]


def get_field(config: Any, path: str) -> Any:
    """The value at a dotted path, such as ``optim.lr``.

    Raises:
        KeyError: a part of the path names no field; the nearest field is suggested.
    """
    for i, part in enumerate(parts := path.split(".")):
        known = [f.name for f in dataclasses.fields(config)] if _is_section(config) else []
        if part not in known:
            prefix = "".join(p + "." for p in parts[:i])
            if not known:
                raise KeyError(f"{path} must name a field; {prefix[:-1]} has none below it.")
            raise KeyError(f"{path} must name a field. {did_you_mean(part, known)}")
        config = getattr(config, part)
    return config


def validate(config: TrainConfig) -> TrainConfig:
    """Check every rule that needs nothing but the config, and return the config.

    Names that a flag gave as one string, ``a,b``, become several.

    Raises:
        ValueError: a field breaks its rule; the message names it, the rule, the value and the
            remedy.
    """
    config.init_fit = _split(config.init_fit)
    config.optim.no_decay = _split(config.optim.no_decay)
    for path, choices in _CHOICES.items():
        value = get_field(config, path)
        if value not in choices:
            names = [c for c in choices if c is not None]
            raise ValueError(
                f"{path} must be one of {', '.join(names)}; got {value}. "
                + did_you_mean(str(value), names)
            )
    for path, (low, high) in _RANGES.items():
        value = get_field(config, path)
        if value is not None and not (low <= value < high):
            rule = f">= {low}" + (f" and < {high}" if high < _INF else "")
            raise ValueError(f"{path} must be {rule}; got {value}. Set --config.{path}.")
    for path in _POSITIVE:
        value = get_field(config, path)
        if value is not None and not 0 < value < _INF:
            raise ValueError(f"{path} must be > 0; got {value}. Set --config.{path}.")
    for path in _SHARES:
        value = get_field(config, path)
        if not 0 <= value <= 1:
            raise ValueError(f"{path} must be in [0, 1]; got {value}. Set --config.{path}.")
    for path in ("model.image_size", "model.patch_size"):
        value = get_field(config, path)
        if value is not None and (len(value) not in (1, 2) or min(value) < 1):
            raise ValueError(
                f"{path} must be one or two positive sizes in pixels; got {value}. "
                f"Set --config.{path}=HEIGHT,WIDTH."
            )
    if not all(value > 0 for value in config.data.std):
        raise ValueError(f"data.std must be > 0; got {config.data.std}. Set --config.data.std.")
    if config.batch_size % config.optim.accumulate_steps:
        raise ValueError(
            f"batch_size must be a multiple of optim.accumulate_steps; got {config.batch_size} and "
            f"{config.optim.accumulate_steps}. Change one of them."
        )
    return config


def _split(names: tuple[str, ...]) -> tuple[str, ...]:
    """("a,b", "c") as ("a", "b", "c"): ml_collections reads ``--field=a,b`` as one name."""
    return tuple(part.strip() for name in names for part in name.split(",") if part.strip())


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`.

    Raises:
        KeyError: a key names no field, for example one of another version of this project.
    """

    def build(cls, values, prefix=""):
        fields = {f.name: f for f in dataclasses.fields(cls)}
        kwargs = {}
        for key, value in values.items():
            if key not in fields:
                raise KeyError(f"{prefix}{key} must name a field. {did_you_mean(key, fields)}")
            if isinstance(value, dict):
                value = build(fields[key].default_factory, value, f"{prefix}{key}.")
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    return build(TrainConfig, values)


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path of each field whose value differs, with the old and the new value."""
    a, b = _flatten(to_dict(old)), _flatten(to_dict(new))
    return {path: (a[path], b[path]) for path in a if a[path] != b[path]}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
