"""The command line: `python -m crate_jax COMMAND`."""

import argparse
import sys
from typing import NoReturn

from crate_jax.cli.compare import add_compare
from crate_jax.cli.doctor import add_doctor
from crate_jax.cli.export import add_export
from crate_jax.cli.figures import add_figure
from crate_jax.cli.generate import add_generate
from crate_jax.cli.layerwise import add_layerwise
from crate_jax.cli.mistakes import complain
from crate_jax.cli.models import add_convert, add_plan, add_summary
from crate_jax.cli.prepare import add_prepare
from crate_jax.cli.probe import add_knn, add_probe
from crate_jax.cli.reconstruct import add_reconstruct
from crate_jax.cli.report import add_report
from crate_jax.cli.running import run_command
from crate_jax.cli.runs import add_checkpoints, add_evaluate
from crate_jax.cli.segment import add_segment
from crate_jax.cli.train import add_train, train
from crate_jax.streams import secure_streams

# In the order in which --help lists them.
COMMANDS = (
    add_train,
    add_evaluate,
    add_convert,
    add_export,
    add_prepare,
    add_compare,
    add_summary,
    add_report,
    add_figure,
    add_layerwise,
    add_segment,
    add_knn,
    add_probe,
    add_reconstruct,
    add_generate,
    add_checkpoints,
    add_plan,
    add_doctor,
)

# Their work is in files when they end; a result that nobody can write down loses nothing.
WRITERS = (
    *("train", "convert", "export", "prepare", "report", "figure", "reconstruct", "segment"),
)


def main(argv: list[str] | None = None) -> int:
    """`python -m crate_jax COMMAND …`; returns the exit status."""
    secure_streams()
    args = parse(argv)
    if args.function is train:  # absl's, as it ends the process itself
        train(args.config_flags)
    return run_command(lambda: args.function(args), kept=args.command in WRITERS)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command, and its ``function``; a mistake ends the process with one line."""
    parser = _Parser(prog="python -m crate_jax", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for add in COMMANDS:
        add(subparsers)
    args, rest = parser.parse_known_args(argv)
    own_flags = args.command == "train"
    fields = args.command == "plan" and all(x.startswith("--config.") for x in rest)
    if rest and not (own_flags or fields):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config_flags = rest
    return args


class _Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(f"{message}. See {self.prog} --help."))
