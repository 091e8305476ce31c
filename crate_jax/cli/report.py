"""The command `report`: a run, or two side by side, as one page that needs no other file."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.cli.looking import add_looking, open_specimen
from crate_jax.files import Json, located
from crate_jax.streams import tolerant

if TYPE_CHECKING:
    from crate_jax.cli.page import Page

_EVERY = 5.0  # seconds between two looks for a newer checkpoint


def add_report(subparsers: Subparsers) -> None:
    """The flags of `report`."""
    parser = subparsers.add_parser(
        "report", help="a page about a run: equations, curves, objective by layer, pictures"
    )
    add_looking(parser)
    parser.add_argument(
        "--output", type=path, help="a folder for index.html and data; default WORKDIR/report"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it anew at each new checkpoint, until Ctrl-C"
    )
    parser.set_defaults(function=report)


def report(args: argparse.Namespace) -> Json:
    """A page about a run; with --watch anew at each checkpoint of a run that trains."""
    output = located(args.output or f"{args.workdir}/report", "--output")
    if not args.watch:
        return _result(_written(args, output), output, pages=1)
    return _watch(args, output, time.sleep)


def _watch(args: argparse.Namespace, output: Path, wait: Callable[[float], None]) -> Json:
    """Write the page whenever there is a newer checkpoint; an interruption ends it."""
    page, pages = None, 0
    try:
        while True:
            if _is_newer(args, page):
                page = _written(args, output, refresh=True)
                pages += 1
                said = f"step {page.runs[0].step}: {output / 'index.html'}\n"
                tolerant(sys.stdout).write(said)
                sys.stdout.flush()
            wait(_EVERY)
    except KeyboardInterrupt:
        if page is None:
            raise
        page.write(refresh=False)
        return _result(page, output, pages=pages)


def _is_newer(args: argparse.Namespace, page: "Page | None") -> bool:
    """Whether there is a checkpoint that the page does not show; a run may have none yet."""
    from crate_jax.checkpoint.manager import Checkpointer

    try:
        reader = Checkpointer(args.workdir, read_only=True)
    except FileNotFoundError:
        return False
    try:
        return page is None or reader.resolve(args.step) != page.runs[0].step
    finally:
        reader.close()


def _written(args: argparse.Namespace, output: Path, *, refresh: bool = False) -> "Page":
    """The page of what there is now."""
    from crate_jax.cli.page import Page

    how = dict(examples=args.examples, images=args.images)
    runs = [open_specimen(args.workdir, args.step, **how)]
    if args.against:
        runs.append(open_specimen(args.against, **how))
    page = Page(runs, output)
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
