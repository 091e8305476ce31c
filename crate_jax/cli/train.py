"""`train`: a run of a recipe. Its flags are absl's, and train.py takes the same."""

import sys
from typing import NoReturn

from absl import app, flags

from crate_jax.cli.arguments import Subparsers
from crate_jax.cli.flags import define_config_flag, joined, parse_flags
from crate_jax.cli.parser import Parser, program
from crate_jax.cli.recipes import DEFAULT, recipes
from crate_jax.cli.running import enable_compilation_cache, run_command

_HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort")


def add_train(subparsers: Subparsers) -> None:
    """`train`; its flags are left to `train`."""
    parser = subparsers.add_parser(
        "train", help="train a recipe, or go on with its run", add_help=False
    )
    parser.set_defaults(function=train)


def train(arguments: list[str]) -> NoReturn:
    """Train what the flags say, and end the process as `run_command` does.

    Args:
        arguments: the arguments of the command line: --config, --config.FIELD, --workdir, and
            absl's own.
    """
    if set(_HELP) & set(arguments):
        sys.stdout.write(usage())
        sys.exit(0)
    argv = ["train", *joined(arguments)]
    config = define_config_flag(DEFAULT, argv)
    workdir = flags.DEFINE_string(
        "workdir", None, "The run's directory, gs:// or s3://…; default runs/<its name>."
    )

    def main(rest: list[str]) -> int:
        del rest
        return run_command(command, kept=True)

    def command():
        from crate_jax.training.loop import train  # after the flags: --help needs no libraries

        enable_compilation_cache()
        return train(config.value, workdir.value or f"runs/{config.value.name}")

    app.run(main, argv, flags_parser=parse_flags)


def usage() -> str:
    """The flags of `train` on one screen; `config` lists the fields of a recipe."""
    parser = Parser(
        prog=f"{program()} train",
        description="Train a recipe to its end. The same command again goes on where a run was "
        "stopped. In a clone, `python train.py` is the same.",
        epilog="train --config=digits\n"
        "train --config=imagenet1k:small --config.optim.lr=1e-4 --workdir=runs/a\n"
        "config digits",
    )
    names = ", ".join(recipes())
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"NAME[:VARIANT] or FILE.py[:VARIANT]; default: {DEFAULT}. Names: {names}",
    )
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        help="another value of a field; `config RECIPE` lists the fields of a recipe",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run's directory, or gs://BUCKET/PATH or s3://BUCKET/PATH; default: runs/<name of "
        "the recipe>",
    )
    parser.add_argument("--flagfile", metavar="FILE", help="flags from a file, one a line")
    parser.add_argument(
        "--verbosity", metavar="N", help="logs of the libraries: -1 warnings, 0 all; default: -2"
    )
    return parser.format_help()
