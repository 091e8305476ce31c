"""The command `report`: a run, or two side by side, as one page that needs no other file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.cli.following import follow, say
from crate_jax.cli.looking import LATEST, NAMED_STEPS, add_looking, check_looking, open_runs
from crate_jax.files import Json, check_folder, located
from crate_jax.interrupts import answered

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.checkpoint.manager import Checkpointer
    from crate_jax.cli.page import Page


def add_report(subparsers: Subparsers) -> None:
    """The flags of `report`."""
    parser = subparsers.add_parser(
        "report",
        help="a page about a run: curves, objective by layer, pictures",
        epilog="report --workdir=runs/digits\nreport --workdir=runs/a --against=runs/b --watch",
    )
    add_looking(parser)
    parser.add_argument(
        "--output", type=path, help="a folder for index.html and data; default: WORKDIR/report"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write the page anew at each new checkpoint, until Ctrl-C",
    )
    parser.set_defaults(function=report)


def report(args: argparse.Namespace) -> Json:
    """A page about a run; with --watch anew at each checkpoint of a run that trains."""
    output = located(args.output or f"{args.workdir}/report", "--output")
    _check(args, output)
    if not args.watch:
        return _result(_written(args, output), output, pages=1)
    return _watch(args, output)


def _check(args: argparse.Namespace, output: Path) -> None:
    """Refuse, before anything is opened or waited for, what would be refused later.

    Raises:
        ValueError, OSError: a mistake that the user can correct.
    """
    from crate_jax.analysis.figures import check_matplotlib
    from crate_jax.cli.page import linked
    from crate_jax.pages import templates

    check_matplotlib()
    templates()
    if args.watch and args.step not in (None, *NAMED_STEPS):
        raise ValueError(
            f"--step must be {' or '.join(NAMED_STEPS)} with --watch, for a page that is renewed; "
            f"got {args.step}. Leave one out."
        )
    check_folder(output, "--output" if args.output else "--workdir")
    linked(output)
    check_looking(args)


def _watch(args: argparse.Namespace, output: Path) -> Json:
    """Write the page whenever there is a newer checkpoint; an interruption ends it."""
    newest: list[Page] = []  # one at most
    pages = 0

    def newer(reader: "Checkpointer") -> list[int]:
        step = reader.resolve(args.step or LATEST)
        return [] if newest and step == newest[0].runs[0].step else [step]

    try:
        for _ in follow(args.workdir, newer):
            newest[:] = [page := _written(args, output, refresh=True)]
            pages += 1
            say(f"step {page.runs[0].step}: {output / 'index.html'}")
    except KeyboardInterrupt:
        if not newest:
            raise
        answered()
    newest[0].write(refresh=False)
    return _result(newest[0], output, pages=pages)


def _written(args: argparse.Namespace, output: Path, *, refresh: bool = False) -> "Page":
    """The page of what there is now."""
    from crate_jax.cli.page import Page

    page = Page(open_runs(args), output)
    page.draw()
    page.write(refresh=refresh)
    return page


def _result(page: "Page", output: Path, *, pages: int) -> Json:
    """The result of the command: the page, and the measures of the first run on its test split."""
    found = page.measures
    return {
        "step": page.runs[0].step,
        "output": str(output / "index.html"),
        "pages": pages,
        "figures": page.count,
        "left_out": page.left_out,
        **{name: [round(float(v), 4) for v in measured.mean] for name, measured in found.items()},
    }
