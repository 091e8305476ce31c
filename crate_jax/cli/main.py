"""The command line: `python -m crate_jax COMMAND`, or `crate_jax COMMAND`."""

import argparse
import itertools
import sys
from typing import Any

from crate_jax.cli.compare import add_compare
from crate_jax.cli.doctor import add_doctor
from crate_jax.cli.evaluate import add_evaluate
from crate_jax.cli.export import add_export
from crate_jax.cli.fields import add_config
from crate_jax.cli.figures import add_figure
from crate_jax.cli.flags import joined
from crate_jax.cli.generate import add_generate
from crate_jax.cli.layerwise import add_layerwise
from crate_jax.cli.models import add_convert, add_plan, add_summary
from crate_jax.cli.parser import Commands, Parser, program
from crate_jax.cli.prepare import add_prepare
from crate_jax.cli.probe import add_knn, add_probe
from crate_jax.cli.reconstruct import add_reconstruct
from crate_jax.cli.report import add_report
from crate_jax.cli.running import run_command
from crate_jax.cli.runs import add_checkpoints
from crate_jax.cli.segment import add_segment
from crate_jax.cli.train import add_train, train
from crate_jax.options import did_you_mean
from crate_jax.streams import secure_streams
from crate_jax.version import VERSION

# By what one wants to do, in the order in which --help lists them.
GROUPS = {
    "Train": (add_train, add_config, add_checkpoints),
    "Measure": (add_evaluate, add_knn, add_probe),
    "Look inside": (
        *(add_report, add_figure, add_layerwise, add_segment, add_reconstruct, add_generate),
    ),
    "Weights and models": (add_convert, add_export, add_compare, add_summary),
    "Data": (add_prepare,),
    "Machine": (add_doctor, add_plan),
}
COMMANDS = tuple(itertools.chain.from_iterable(GROUPS.values()))

# Their work is in files when they end; a result that nobody can write down loses nothing.
WRITERS = ("train", "convert", "export", "prepare", "report", "figure", "reconstruct", "segment")
# They take a recipe's fields beside their own flags.
OF_RECIPES = ("plan", "config")
EXAMPLES = """\
train --config=digits
report --workdir=runs/digits"""


def main(argv: list[str] | None = None) -> int:
    """`python -m crate_jax COMMAND …`; returns the exit status."""
    secure_streams()
    args = parse(argv)
    if args.function is train:  # absl's, as it ends the process itself
        train(args.config_flags)
    return run_command(lambda: args.function(args), kept=args.command in WRITERS)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command, and its ``function``; a mistake ends the process with one line.

    ``config_flags`` are those that are left: of `train` all, of others a recipe's fields.
    """
    words = sys.argv[1:] if argv is None else argv
    parser, commands = _parsers()
    name = words[0] if words else ""
    if name == "train":
        return argparse.Namespace(command=name, function=train, config_flags=words[1:])
    if name and not name.startswith("-") and name not in commands.choices:
        remedy = did_you_mean(name, commands.choices)
        parser.error(f"the command must be one that there is; got {name}. {remedy}")
    words = joined(words)
    fields = [w for w in words if w.startswith(("--config.", "--noconfig."))]
    fields = fields if name in OF_RECIPES else []
    words = [word for word in words if word not in fields]
    of_command = commands.choices.get(name, parser)
    of_command.check_flags(words)
    args = parser.parse_args(words)
    args.config_flags = fields
    return args


def _parsers() -> tuple[Parser, Commands]:
    """The parser of the program, and those of its commands."""
    parser = Parser(prog=program(), epilog=EXAMPLES)
    parser.add_argument(
        "--version",
        action="version",
        version=f"crate_jax {VERSION}",
        help="print the version",
    )
    added: Any = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, action=Commands, metavar="COMMAND"
    )
    commands: Commands = added
    names = {}
    for heading, group in GROUPS.items():
        for add in group:
            add(commands)
        names[heading] = list(commands.choices)[-len(group) :]
    lines = ["Train white-box transformers, measure them, and look inside."]
    lines += [f"{parser.prog} COMMAND --help explains a command and its flags."]
    parser.description = "\n".join([*lines, "", commands.overview(names)])
    commands.help = argparse.SUPPRESS
    return parser, commands
