"""Open a run or a weights file for a command; and `checkpoints`."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from crate_jax.cli.arguments import (
    KEYS,
    Subparsers,
    default_data,
    model_kwargs,
    named_model,
    override_data,
    path,
    resize_method,
    saved_run,
)
from crate_jax.cli.generate import TASK as NEXT_TOKEN
from crate_jax.cli.parser import indented
from crate_jax.config import ModelConfig, TextConfig, TrainConfig
from crate_jax.files import Json, located
from crate_jax.waiting import counting

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.models.stacked import BlockModel
    from crate_jax.tasks.task import Extra, Params
    from crate_jax.training.run import Run

WEIGHTS = "in place of --workdir: a file, a folder, or hf://…; with --model unless it states one"
_TEXTS = 16  # of an evaluation step, unless --batch_size says: logits of many texts are large


def add_source(parser: argparse.ArgumentParser) -> None:
    """A run, or weights."""
    parser.add_argument(
        "--workdir",
        type=path,
        help="a run, here or in a bucket",
    )
    parser.add_argument(
        "--step", help="checkpoint of --workdir: latest (default), best or a number"
    )
    parser.add_argument("--weights", type=path, help=WEIGHTS)


class Opened(NamedTuple):
    """The result of `open_trained`.

    Attributes:
        run: with "eval" rows.
        params: the parameters of its task.
        extra: the extra of its task.
        step: of a run's checkpoint; None: they are of a weights file.
        fitted: what was made to fit, one line each.
    """

    run: "Run"
    params: "Params"
    extra: "Extra"
    step: int | None
    fitted: list[str]


def open_trained(
    args: argparse.Namespace,
    command: str,
    *,
    task: str | None = None,
    change: Callable[[TrainConfig], None] | None = None,
) -> Opened:
    """Open the run or weights of `add_source`, `add_model` and `add_data`, on its evaluation split.

    Args:
        args: the arguments of the command.
        command: for errors.
        task: what it must have been trained for; None: for whatever a run was, and a weights file
            for the default.
        change: writes what the command's own flags say into the config.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    from crate_jax.training.run import set_up

    _check_source(args, command)
    step: int | None = None
    if args.workdir:
        config, facts, step = saved_run(args.workdir, args.step or "latest")
    else:
        config, facts = _config_of_model(args, command), _stated_facts(args)
        config.task = task or config.task
    if task not in (None, config.task):
        raise ValueError(
            f"{command} must get a run of the task {task}; {args.workdir} is one of {config.task}. "
            "Choose another --workdir."
        )
    _check_heeded(config, args)
    override_data(config.data, args)
    _use_tokenizer(config, getattr(args, "tokenizer", None))
    config.eval_batch_size = args.batch_size or config.eval_batch_size
    if change is not None:
        change(config)
    run = set_up(config, "eval", facts=facts)
    if step is None:
        params, extra, fitted = _load_weights(args, run)
    else:
        params, extra, fitted = *restored(args.workdir, run, step), []
    return Opened(run, params, extra, step, fitted + _by_number(facts, run))


def _check_source(args: argparse.Namespace, command: str) -> None:
    """Refuse flags that do not go together."""
    if bool(args.workdir) == bool(args.weights):
        raise ValueError(f"{command} must get one of --workdir and --weights. See --help.")
    if args.weights and not args.dataset:
        raise ValueError(f"{command} --weights must get --dataset too. See --help.")
    if args.workdir and (args.model or args.model_kwargs or args.fit):
        raise ValueError(
            "--model, --model-kwargs and --fit must go with --weights; a run knows its own model. "
            "Leave them out."
        )
    resize_method(args)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be >= 1; got {args.batch_size}. Leave it out.")
    if args.weights and args.step:
        raise ValueError("--step must go with --workdir. Leave it out.")


def _check_heeded(config: TrainConfig, args: argparse.Namespace) -> None:
    """Refuse flags about images where texts are read."""
    for flag in (*KEYS, "transforms"):
        if getattr(args, flag) is not None and config.task == NEXT_TOKEN:
            raise ValueError(
                f"--{flag} must go with a model of images; got one of the task {config.task}. "
                "Leave it out."
            )


def _use_tokenizer(config: TrainConfig, tokenizer: str | None) -> None:
    """Write --tokenizer into a config, if it is given, and refuse it where nothing reads it."""
    if tokenizer and config.task != NEXT_TOKEN:
        raise ValueError(
            f"--tokenizer must go with a model of text; got one of the task {config.task}. "
            "Leave it out."
        )
    config.text.tokenizer = tokenizer or config.text.tokenizer


def _config_of_model(args: argparse.Namespace, command: str) -> TrainConfig:
    """The config that --model stands for, or the model that --weights state."""
    from crate_jax.models.classifier import of_images
    from crate_jax.models.language import LanguageModel

    model = named_model(args, args.weights)
    if model is None:
        raise ValueError(
            f"{command} --weights must get --model too, for {args.weights} states no model. "
            "Name it; a run is given as --workdir."
        )
    section = _section(args, model)
    if isinstance(model, LanguageModel):
        text = TextConfig(tokenizer=None)
        return TrainConfig(task=NEXT_TOKEN, eval_batch_size=_TEXTS, model=section, text=text)
    return TrainConfig(model=section, data=default_data(of_images(model), args))


def _section(args: argparse.Namespace, model: "BlockModel") -> ModelConfig:
    """The section of --model and --model-kwargs, or that of the model that --weights state."""
    from crate_jax.models.sections import overrides
    from crate_jax.models.zoo import section_of

    kwargs = model_kwargs(args)
    for name in {"image_size", "patch_size"} & set(kwargs):
        sides = kwargs[name]
        kwargs[name] = (sides, sides) if isinstance(sides, int) else tuple(sides)
    if args.model:
        return ModelConfig(name=args.model, **kwargs)
    stated = overrides(section := section_of(model))
    if "head" in args.fit or not stated.get("num_classes"):  # the data says how many there are
        stated.pop("num_classes", None)
    return ModelConfig(name=section.name, **stated | kwargs)


def _stated_facts(args: argparse.Namespace) -> Json:
    """The facts of --weights about its outputs, unless they are to be new."""
    from crate_jax.interop import read_class_names
    from crate_jax.tasks.task import CLASSES

    return {} if "head" in args.fit else {CLASSES: read_class_names(args.weights)}


def _load_weights(args: argparse.Namespace, run: "Run") -> "tuple[Params, Extra, list[str]]":
    """Parameters and extra of --weights, and what was made to fit."""
    from crate_jax.interop import load_fitted

    model: Any = run.task.model  # whatever the task trains
    loaded = load_fitted(args.weights, model, fit=args.fit, method=resize_method(args))
    wanted: Any = _abstract(run)[1]
    if missing := [name for name in wanted if name not in loaded.extra]:
        raise ValueError(
            f"--weights must hold all that {type(model).__name__} evaluates with; its "
            f"{', '.join(missing)} are in no weights file. Give a run: --workdir=DIR."
        )
    return loaded.params, loaded.extra or (), loaded.report


def _by_number(facts: Json, run: "Run") -> list[str]:
    """A notice that labels are taken as they are, if weights or data do not name the classes."""
    from crate_jax.tasks.task import CLASSES

    if not getattr(run.task.model, "num_classes", 0):
        return []
    named = {
        "the weights": facts.get(CLASSES),
        "the data": run.task.facts(run.rows["eval"]).get(CLASSES),
    }
    silent = [what for what, names in named.items() if not names]
    return [f"classes by number: {' and '.join(silent)} name none"] if silent else []


def restored(workdir: str, run: "Run", step: int) -> "tuple[Params, Extra]":
    """Parameters and extra of a run's checkpoint."""
    from crate_jax.checkpoint.reading import restore_trained

    return restore_trained(workdir, *_abstract(run), step)[:2]


def _abstract(run: "Run") -> "tuple[Params, Extra]":
    """Shapes of the task's parameters and extra."""
    import jax

    return jax.eval_shape(run.task.init, run.key)


def add_checkpoints(subparsers: Subparsers) -> None:
    """The flags of `checkpoints`."""
    parser = subparsers.add_parser(
        "checkpoints",
        help="the checkpoints of a run, and whether each is intact",
        epilog="checkpoints runs/digits",
    )
    parser.add_argument("run", type=path, help="a run's directory")
    parser.set_defaults(function=checkpoints)


def checkpoints(args: argparse.Namespace) -> Json:
    """Every checkpoint of a run, read and compared with its digest; those set aside by name."""
    from crate_jax.checkpoint.folder import DAMAGED, FOLDER
    from crate_jax.checkpoint.reading import inspect

    with counting("read and check"):
        found = inspect(args.run)
    words = {True: "intact", False: "DAMAGED", None: "readable, saved without a digest"}
    for row in found:
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in sorted(row["metrics"].items()))
        best = "  best" if row["best"] else ""
        start = f"step {row['step']:>8}  {row['mib']:9.2f} MiB  {words[row['intact']]}{best}"
        below = filter(None, (metrics, row.get("problem")))
        sys.stdout.write("\n".join([start, *map(indented, below)]) + "\n")
    aside = sorted(p.name for p in (located(args.run, "the run") / FOLDER).glob(f"{DAMAGED}*"))
    intact = all(row["intact"] is not False for row in found)
    return {"workdir": args.run, "intact": intact, "checkpoints": found, "set_aside": aside}
