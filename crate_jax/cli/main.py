"""The command line: `python -m crate_jax COMMAND`, and what every command has in common."""

import argparse
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

from crate_jax.cli import commands
from crate_jax.cli.flags import parse_config
from crate_jax.cli.mistakes import complain, raised_here, text
from crate_jax.config import IMAGENET_EVAL
from crate_jax.parallel import LostProcess

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; schedulers restart on any status but 0


def run_command(command: Callable[[], dict[str, Any]]) -> int:
    """Run a command: its result is the last line of stdout, a user's mistake one line of stderr.

    A mistake is an error that this project raises itself, or one of the operating system about a
    file; any other is a bug and keeps its trace.

    Returns:
        Exit status: 0; 1 if the result says that something is not ``within_tolerance`` or not
        ``intact``; 2 for a mistake; `TRY_AGAIN` for a run that was told to stop and is saved, 130
        for a command that was interrupted otherwise.
    """
    quiet_libraries()
    try:
        result = command()
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted; what was saved before is intact")
        return TRY_AGAIN if error.args else 130
    except LostProcess as error:
        complain(str(error))
        _leave(TRY_AGAIN)
    except Exception as error:
        mistake = isinstance(error, (ValueError, KeyError, OSError, FloatingPointError))
        if mistake and (isinstance(error, OSError) or raised_here(error)):
            status = complain(text(error))
        elif jax.distributed.is_initialized():
            traceback.print_exc()
            status = 1
        else:
            raise
        if jax.distributed.is_initialized():
            _leave(status)
        return status
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result.get("within_tolerance", True) and result.get("intact", True) else 1


def _leave(status: int) -> NoReturn:
    """End a process of several at once, which ends the others.

    On the way out JAX would wait for them, minutes, and they for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


def main(argv: list[str] | None = None) -> int:
    """`python -m crate_jax COMMAND …`; returns the exit status."""
    parser = _Parser(prog="python -m crate_jax", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    evaluate = subparsers.add_parser("evaluate", help="exact loss, top-1 and top-5 over a split")
    evaluate.add_argument("--workdir", help="a run; its newest checkpoint unless --step says else")
    evaluate.add_argument("--step", help="latest, best or a number (with --workdir)")
    evaluate.add_argument("--weights", help="a weights file or run (with --model and --dataset)")
    _add_model(evaluate)
    _add_data(evaluate)
    evaluate.set_defaults(function=commands.evaluate)

    convert = subparsers.add_parser("convert", help="weights from one kind of file to another")
    convert.add_argument(
        "--from", dest="source", required=True, help="a weights file, a run or one of its steps"
    )
    convert.add_argument(
        "--to", dest="target", required=True, help="FILE.safetensors, .npz, .pth or .pt"
    )
    _add_model(convert)
    convert.set_defaults(function=commands.convert)

    prepare = subparsers.add_parser(
        "prepare", help="a folder or ImageNet's tar files as a TFDS data set of array_record files"
    )
    prepare.add_argument(
        "--from", dest="source", required=True, help="holds a folder or a tar file for each split"
    )
    prepare.add_argument(
        "--to", dest="target", required=True, help="what data.data_dir will be; may be half done"
    )
    prepare.add_argument(
        "--name", help="what data.dataset will be, NAME or NAME:VERSION; ImageNet's own has one"
    )
    prepare.set_defaults(function=commands.prepare)

    _add_compare(subparsers)

    summary = subparsers.add_parser("summary", help="parameters, multiply-adds, tokens, memory")
    summary.add_argument("model", help="one of crate_jax.list_models()")
    summary.add_argument("--image_size", type=int, nargs="+", help="pixels: a side, or two")
    summary.add_argument("--num_classes", type=int)
    summary.set_defaults(function=commands.summary)

    report = subparsers.add_parser("report", help="draw a run's layer-wise objective")
    report.add_argument("--workdir", required=True, help="a run")
    report.add_argument("--step", default="latest", help="latest, best or a number")
    report.add_argument("--output", help="a picture file; default WORKDIR/layerwise.png")
    report.set_defaults(function=commands.report)

    checkpoints = subparsers.add_parser(
        "checkpoints", help="a run's checkpoints: steps, sizes, metrics, and whether each is intact"
    )
    checkpoints.add_argument("run", help="a run's directory")
    checkpoints.set_defaults(function=commands.checkpoints)

    plan = subparsers.add_parser(
        "plan", help="memory, communication and time of a training step on a mesh that is not here"
    )
    plan.add_argument("--config", required=True, help="a recipe, with --config.FIELD=VALUE")
    plan.add_argument("--mesh", required=True, help="such as data:256,fsdp:8")
    plan.set_defaults(function=lambda args: commands.plan(args, parse_config(args.config, rest)))

    args, rest = parser.parse_known_args(argv)
    if rest and not (args.command == "plan" and all(x.startswith("--config.") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return run_command(lambda: args.function(args))


def _add_compare(subparsers: Any) -> None:
    """The command with the most flags."""
    compare = subparsers.add_parser("compare", help="ours against PyTorch, layer by layer")
    compare.add_argument(
        "--weights", required=True, help="a weights file, a run or one of its steps"
    )
    compare.add_argument("--reference", help="PyTorch's weights; default: the same")
    _add_model(compare)
    compare.add_argument("--images", help="a folder of images; default: the run's, or seeded noise")
    _add_data(compare)
    compare.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of our computation"
    )
    compare.add_argument(
        "--train-steps", "--train_steps", type=int, default=10, help="of each optimizer; 0: none"
    )
    compare.add_argument(
        "--rate-scale",
        "--rate_scale",
        type=float,
        default=0.05,
        help="learning rates as a share of the official peak; default 1/20, as in the first epoch "
        "of the official schedule",
    )
    compare.add_argument(
        "--float64",
        action="store_true",
        help="also train PyTorch in float64: how far rounding alone carries a training",
    )
    compare.add_argument("--html", help="also write the comparison as a page to this file")
    compare.set_defaults(function=commands.compare)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how the weights are made to fit it."""
    parser.add_argument("--model", help="one of crate_jax.list_models()")
    parser.add_argument(
        "--model-kwargs",
        "--model_kwargs",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields that differ from --model, such as num_classes=10 image_size=32,32",
    )
    parser.add_argument(
        "--fit",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="what may differ between weights and model: head, image_size, patch_size, in_channels",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    """Which examples, and what happens to them."""
    parser.add_argument("--dataset", help="digits, folder, tar, synthetic or a TFDS name")
    parser.add_argument("--data_dir", help="where the data set is prepared, or a folder's root")
    parser.add_argument("--split", help="default: the run's, or test")
    parser.add_argument("--batch_size", type=int, help="examples per step over all devices")
    parser.add_argument(
        "--transforms", help="as data.eval_transforms; default: the run's, or " + IMAGENET_EVAL
    )


class _Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(f"{message}. See {self.prog} --help."))
