"""The command line: `python -m crate_jax COMMAND`, and what every command has in common."""

import argparse
import dataclasses
import json
import os
import platform
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import absl.flags
import absl.logging
import jax

from crate_jax.config import (
    IMAGENET_EVAL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    TrainConfig,
    did_you_mean,
    from_dict,
    get_field,
)
from crate_jax.models.crate import pair

PACKAGE = Path(__file__).parent


def run_command(command: Callable[[], dict[str, Any]]) -> int:
    """Run a command: its result is the last line of stdout, a user's mistake one line of stderr.

    A mistake is an error that this project raises itself, or one of the operating system about a
    file; any other is a bug and keeps its trace.

    Returns:
        Exit status: 0, or 2 for a mistake or an interruption.
    """
    quiet_libraries()
    try:
        result = command()
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted; what was saved before is intact")
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        if not isinstance(error, OSError) and not _raised_here(error):
            raise
        return _complain(_text(error))
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _text(error: Exception) -> str:
    """What an error says; str() of a KeyError would quote it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _complain(message: str) -> int:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return 2


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents


def quiet_libraries() -> None:
    """Only errors of Orbax, Grain and TFDS reach the terminal, unless --verbosity asks for more."""
    if absl.flags.FLAGS.is_parsed() and absl.flags.FLAGS["verbosity"].present:
        return
    absl.logging.set_verbosity(absl.logging.ERROR)


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where.

    One folder for each kind of processor: code compiled for one may not run on another that
    shares the home directory.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        features = sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
        kind = f"{platform.machine()}-{zlib.crc32(repr(features).encode()):08x}"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "crate_jax" / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def define_config_flag(default: str) -> Any:
    """Define the absl flag --config, and --config.FIELD for every field of `TrainConfig`.

    A mistake in these ends the process with one line and status 2.

    Args:
        default: path of the recipe when --config is not given.

    Returns:
        The flag's holder; its ``value`` is the resolved config.
    """
    from ml_collections import config_flags

    _exit_if_wrong(lambda: _check_config_flags(sys.argv, default))
    return config_flags.DEFINE_config_file("config", default, "Recipe: FILE.py[:VARIANT].")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse absl flags, for `absl.app.run`; a mistake ends the process with one line."""

    def parse() -> list[str]:
        rest = absl.flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"the command line must hold flags alone; got {rest[1]}. See --help.")
        return rest

    return _exit_if_wrong(parse)


def _exit_if_wrong(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (absl.flags.Error, ValueError, KeyError, OSError) as error:
        if not isinstance(error, absl.flags.Error | OSError) and not _raised_here(error):
            raise
        sys.exit(_complain(_text(error)))


def _check_config_flags(argv: list[str], default_config: str) -> None:
    """Name what is wrong with --config and --config.field before config_flags trips over it."""
    path = default_config
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, separator, value = flag.lstrip("-").partition("=")
        if not flag.startswith("-"):
            continue
        if name == "config":
            path = (value if separator else following).split(":")[0]
        elif name.startswith("config."):
            field = name.removeprefix("config.")
            if dataclasses.is_dataclass(get_field(TrainConfig(), field)):
                raise ValueError(f"{name} must be a field, not a section. Set {name}.FIELD=VALUE.")
    if not Path(path).is_file():
        recipes = [str(Path(path).parent / p.name) for p in Path(path).parent.glob("*.py")]
        raise FileNotFoundError(
            f"--config must be a recipe file; got {path}. " + did_you_mean(path, recipes)
        )


def main(argv: list[str] | None = None) -> int:
    """`python -m crate_jax COMMAND …`; returns the exit status."""
    parser = _Parser(prog="python -m crate_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    evaluate = commands.add_parser("evaluate", help="exact loss, top-1 and top-5 over a split")
    evaluate.add_argument("--workdir", help="a run; its newest checkpoint unless --step says else")
    evaluate.add_argument("--step", help="latest, best or a number (with --workdir)")
    evaluate.add_argument("--weights", help="a weights file or run (with --model and --dataset)")
    evaluate.add_argument("--model", help="one of crate_jax.list_models() (with --weights)")
    evaluate.add_argument("--dataset", help="digits, folder, synthetic or a TFDS name")
    evaluate.add_argument("--data_dir", help="where the data set is prepared, or a folder's root")
    evaluate.add_argument("--split", help="default: the run's, or test")
    evaluate.add_argument("--batch_size", type=int, help="examples per step over all devices")
    evaluate.add_argument(
        "--transforms", help="as data.eval_transforms; default: the run's, or " + IMAGENET_EVAL
    )
    evaluate.set_defaults(function=_evaluate)

    summary = commands.add_parser("summary", help="parameters, multiply-adds, tokens, memory")
    summary.add_argument("model", help="one of crate_jax.list_models()")
    summary.add_argument("--image_size", type=int, nargs="+", help="pixels: a side, or two")
    summary.add_argument("--num_classes", type=int)
    summary.set_defaults(function=_summary)

    report = commands.add_parser("report", help="draw a run's layer-wise objective")
    report.add_argument("--workdir", required=True, help="a run")
    report.add_argument("--step", default="latest", help="latest, best or a number")
    report.add_argument("--output", help="a picture file; default WORKDIR/layerwise.png")
    report.set_defaults(function=_report)

    args = parser.parse_args(argv)
    return run_command(lambda: args.function(args))


class _Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(f"{message}. See {self.prog} --help."))


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Exact metrics of a run or of a weights file."""
    from crate_jax.checkpoint import restore_params
    from crate_jax.evaluation.classify import evaluate_split
    from crate_jax.interop import load_weights
    from crate_jax.models.cost import abstract_parameters

    if bool(args.workdir) == bool(args.weights):
        raise ValueError("evaluate must get one of --workdir and --weights. See --help.")
    if args.weights and not (args.model and args.dataset):
        raise ValueError("evaluate --weights must get --model and --dataset too. See --help.")
    if args.workdir and args.model:
        raise ValueError("--model must go with --weights; a run knows its own. Leave it out.")
    if args.weights and args.step:
        raise ValueError("--step must go with --workdir. Leave it out.")
    step: int | None = None
    if args.workdir:
        config, step = _saved_config(args.workdir, args.step or "latest")
    else:
        config = TrainConfig(
            model=ModelConfig(name=args.model),
            data=DataConfig(eval_transforms=IMAGENET_EVAL, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        )
    for target, field, value in (
        (config.data, "dataset", args.dataset),
        (config.data, "data_dir", args.data_dir),
        (config.data, "eval_transforms", args.transforms),
        (config.data, "eval_split", args.split),
        (config, "eval_batch_size", args.batch_size),
    ):
        if value is not None:
            setattr(target, field, value)

    def load(model: Any) -> Any:
        if step is None:
            return load_weights(args.weights, model)
        return restore_params(args.workdir, abstract_parameters(model), step)[0]

    metrics = evaluate_split(config, config.data.eval_split, load)
    return {"dataset": config.data.dataset, "split": config.data.eval_split, "step": step} | metrics


def _summary(args: argparse.Namespace) -> dict[str, Any]:
    """What a model costs, by formula."""
    from crate_jax.models import cost
    from crate_jax.models.zoo import create_model

    overrides = {k: getattr(args, k) for k in ("image_size", "num_classes") if getattr(args, k)}
    model: Any = create_model(args.model, **overrides)
    return {
        "model": args.model,
        "image_size": list(pair(model.image_size)),
        "tokens": cost.num_tokens(model),
        "parameters": cost.count_parameters(model),
        "gmacs": round(cost.multiply_adds(model) / 1e9, 3),
        "activation_mib_per_image": round(cost.activation_bytes(model) / 2**20, 1),
    }


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """The layer-wise objective of a run on its evaluation split, as numbers and as a picture."""
    from crate_jax.analysis.report import draw_layerwise
    from crate_jax.checkpoint import restore_params
    from crate_jax.evaluation.classify import layerwise_split
    from crate_jax.models.cost import abstract_parameters

    config, step = _saved_config(args.workdir, args.step)

    def load(model: Any) -> Any:
        return restore_params(args.workdir, abstract_parameters(model), step)[0]

    values = layerwise_split(config, config.data.eval_split, load)
    output = args.output or str(Path(args.workdir) / "layerwise.png")
    split = f"{config.data.dataset}/{config.data.eval_split}"
    draw_layerwise(values, output, title=f"{config.name}, step {step}, on {split}")
    rounded = {name: [round(float(v), 4) for v in array] for name, array in values.items()}
    return rounded | {"step": step, "output": output}


def _saved_config(workdir: str, step: str) -> tuple[TrainConfig, int]:
    """The config in a run's checkpoint, and the number of that checkpoint."""
    from crate_jax.checkpoint import Checkpointer

    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        return from_dict(reader.restore_record(number)["config"]), number
    finally:
        reader.close()
