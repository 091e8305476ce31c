"""The command `evaluate`: once, or at each checkpoint of a run that another process trains."""

import argparse
import sys

from crate_jax.cli.arguments import Subparsers, add_data, add_model, path
from crate_jax.cli.detail import CLASSIFY, add_detail, asks_detail, detail, table
from crate_jax.cli.following import EVERY_S
from crate_jax.cli.runs import add_source, open_trained
from crate_jax.cli.watching import watch
from crate_jax.files import Json


def add_evaluate(subparsers: Subparsers) -> None:
    """The flags of `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="exact metrics over a split, such as top-1",
        epilog="evaluate --workdir=runs/digits --step=best --detail\n"
        "evaluate --workdir=runs/digits --watch\n"
        "evaluate --weights=crate.pth --model=crate_small_patch16_224 --dataset=folder",
    )
    add_source(parser)
    add_model(parser)
    add_data(parser)
    parser.add_argument(
        "--tokenizer",
        type=path,
        help="tokenizer of a text: bytes, a tokenizer.json, or the Hub's name",
    )
    add_detail(parser)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="evaluate each checkpoint of --workdir as it comes, until the last",
    )
    parser.add_argument(
        "--interval", type=float, help=f"seconds between looks of --watch; default: {EVERY_S:g}"
    )
    parser.add_argument(
        "--output", type=path, help="folder for --watch; default: WORKDIR/evaluations"
    )
    parser.set_defaults(function=evaluate)


def evaluate(args: argparse.Namespace) -> Json:
    """Exact metrics of a run or of a weights file."""
    from crate_jax.training.run import evaluate_split

    if args.watch:
        return watch(args)
    for name in ("interval", "output"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} must go with --watch. Leave it out, or add --watch.")
    opened = open_trained(args, "evaluate", task=CLASSIFY if asks_detail(args) else None)
    data = opened.run.config.data
    inputs = {"dataset": data.dataset, "split": data.eval_split}
    inputs |= {"step": opened.step, "fitted": opened.fitted}
    more = detail(args, *opened[:3])  # first, as it may refuse a file
    found = inputs | evaluate_split(opened.run, opened.params, opened.extra) | more
    if args.detail:
        sys.stdout.write(table(found))
    return found
