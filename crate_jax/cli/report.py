"""The command `report`: a run, or two side by side, as one page that needs no other file."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.cli.looking import LATEST, NAMED_STEPS, add_looking, check_looking, open_runs
from crate_jax.files import Json, check_folder, located
from crate_jax.streams import tolerant

if TYPE_CHECKING:
    from crate_jax.cli.page import Page

_EVERY = 5.0  # seconds between two looks for a newer checkpoint


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
        "--watch", action="store_true", help="write it anew at each new checkpoint, until Ctrl-C"
    )
    parser.set_defaults(function=report)


def report(args: argparse.Namespace) -> Json:
    """A page about a run; with --watch anew at each checkpoint of a run that trains."""
    output = located(args.output or f"{args.workdir}/report", "--output")
    _check(args, output)
    if not args.watch:
        return _result(_written(args, output), output, pages=1)
    return _watch(args, output, time.sleep)


def _check(args: argparse.Namespace, output: Path) -> None:
    """Refuse, before anything is opened or waited for, what would be refused later.

    Raises:
        ValueError, OSError: what the user can mend.
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


def _watch(args: argparse.Namespace, output: Path, wait: Callable[[float], None]) -> Json:
    """Write the page whenever there is a newer checkpoint; an interruption ends it."""
    page, pages, waits = None, 0, False
    try:
        while True:
            if _is_newer(args, page):
                page = _written(args, output, refresh=True)
                pages += 1
                _say(f"step {page.runs[0].step}: {output / 'index.html'}")
            elif page is None and not waits:
                waits = True
                _say(f"waiting for the first checkpoint of a run in {args.workdir}")
            wait(_EVERY)
    except KeyboardInterrupt:
        if page is None:
            raise
        page.write(refresh=False)
        return _result(page, output, pages=pages)


def _say(line: str) -> None:
    """A line of what is done, at once."""
    tolerant(sys.stdout).write(line + "\n")
    sys.stdout.flush()


def _is_newer(args: argparse.Namespace, page: "Page | None") -> bool:
    """Whether there is a checkpoint that the page does not show; a run may have none yet."""
    from crate_jax.checkpoint.manager import Checkpointer

    try:
        reader = Checkpointer(args.workdir, read_only=True)
    except FileNotFoundError:
        return False
    try:
        return page is None or reader.resolve(args.step or LATEST) != page.runs[0].step
    finally:
        reader.close()


def _written(args: argparse.Namespace, output: Path, *, refresh: bool = False) -> "Page":
    """The page of what there is now."""
    from crate_jax.cli.page import Page

    page = Page(open_runs(args), output)
    page.draw()
    page.write(refresh=refresh)
    return page


def _result(page: "Page", output: Path, *, pages: int) -> Json:
    """What the command says: the page, and the measures of the first run on its test split."""
    found = page.measures
    return {
        "step": page.runs[0].step,
        "output": str(output / "index.html"),
        "pages": pages,
        "figures": page.count,
        "left_out": page.left_out,
        **{name: [round(float(v), 4) for v in measured.mean] for name, measured in found.items()},
    }
