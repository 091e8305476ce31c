"""`train`: a run of a recipe. Its flags are absl's, and train.py takes the same."""

import sys
from typing import NoReturn

from absl import app, flags

from crate_jax.cli.arguments import Subparsers
from crate_jax.cli.flags import define_config_flag, parse_flags
from crate_jax.cli.recipes import DEFAULT, recipes
from crate_jax.cli.running import enable_compilation_cache, run_command
from crate_jax.config import TrainConfig, options
from crate_jax.options import option_of, rule

_HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort")


def add_train(subparsers: Subparsers) -> None:
    """`train`; its flags are left to `train`."""
    parser = subparsers.add_parser(
        "train", help="train a recipe, or go on: --config=RECIPE --workdir=DIR", add_help=False
    )
    parser.set_defaults(function=train)


def train(arguments: list[str]) -> NoReturn:
    """Train what the flags say, and end the process as `run_command` does.

    Args:
        arguments: of the command line: --config, --config.FIELD, --workdir, and absl's own.
    """
    argv = ["train", *arguments]
    config = define_config_flag(DEFAULT, argv)
    workdir = flags.DEFINE_string(
        "workdir", None, "The run's directory, gs:// or s3://…; default runs/<its name>."
    )
    if set(_HELP) & set(argv):
        parse_flags([argument for argument in argv if argument not in _HELP])
        sys.stdout.write(usage(config.value))
        sys.exit(0)

    def main(rest: list[str]) -> int:
        del rest
        return run_command(command, kept=True)

    def command():
        from crate_jax.training.loop import train  # after the flags: --help needs no libraries

        enable_compilation_cache()
        return train(config.value, workdir.value or f"runs/{config.value.name}")

    app.run(main, argv, flags_parser=parse_flags)


def usage(config: TrainConfig) -> str:
    """The flags, and every field of a config with its value, meaning and legal values."""
    lines = [
        "usage: python -m crate_jax train [--config=RECIPE] [--config.FIELD=VALUE] [--workdir=DIR]",
        "",
        "Train a recipe to its end. The same command again goes on where a run was stopped.",
        "In a clone, `python train.py` is the same.",
        "",
        f"--config=NAME[:VARIANT] or FILE.py[:VARIANT]: the recipe; default {DEFAULT}",
        f"    names: {', '.join(recipes())}",
        "--workdir=DIR: the run's directory, or gs://BUCKET/PATH or s3://BUCKET/PATH;",
        "    default runs/<name of the recipe>",
        "--flagfile=FILE: flags from a file, one a line",
        "--helpfull: also the flags of the libraries",
        "",
        "Fields of this recipe, with their values:",
    ]
    for path, section, field in options(config):
        value = getattr(section, field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"--config.{path}={text}: {option_of(field).help}; {rule(field)}")
    return "\n".join(lines) + "\n"
