"""The command `figure`: one figure of the papers, of one run or of several."""

import argparse

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.cli.drawings import FIGURES, HEEDED_BY, Asked
from crate_jax.cli.looking import add_looking, check_looking, open_runs
from crate_jax.cli.parser import beside
from crate_jax.files import Json
from crate_jax.waiting import counting


def add_figure(subparsers: Subparsers) -> None:
    """The flags of `figure`."""
    column = max(map(len, FIGURES)) + 4
    lines = [beside(n, (f.__doc__ or "").strip(), column) for n, f in FIGURES.items()]
    listed = "\n".join(line for each in lines for line in each)
    parser = subparsers.add_parser(
        "figure",
        help="one figure of the papers, of a run or of several",
        description="The figures:\n" + listed,
        epilog="figure objective --workdir=runs/digits --output=objective.png",
    )
    parser.add_argument("name", choices=FIGURES, metavar="NAME", help="one of the figures above")
    add_looking(parser, several=True)
    parser.add_argument("--layer", type=int, help="counted from 1; default: the last, or all")
    parser.add_argument("--size", type=int, help="pixels of a picture's side; default: the model's")
    parser.add_argument("--head", type=int, help="counted from 1; default: all")
    parser.add_argument(
        "--output", type=path, help=".svg, .png or .pdf, with data beside it; default: NAME.svg"
    )
    parser.set_defaults(function=figure)


def figure(args: argparse.Namespace) -> Json:
    """Draw one figure, and write its data as CSV beside it."""
    from crate_jax.analysis.figures import check_output, save

    _check_heeded(args)
    output = args.output or f"{args.name}.svg"
    check_output(output)
    check_looking(args)
    runs = open_runs(args, side=args.size)
    with counting(f"figure {args.name}"):
        picture = FIGURES[args.name](runs, Asked(args.layer, args.head))
    table = save(picture, output)
    steps = [run.step for run in runs]
    return {
        "figure": args.name,
        "step": steps[0],
        "output": output,
        "data": str(table),
        "alt": picture.alt,
    }


def _check_heeded(args: argparse.Namespace) -> None:
    """Refuse flags that the figure would not heed.

    Raises:
        ValueError: one is given, or is out of range.
    """
    for flag, names in HEEDED_BY.items():
        if getattr(args, flag) is not None and args.name not in names:
            raise ValueError(
                f"--{flag} must go with {', '.join(names)}; the figure {args.name} does not heed "
                "it. Leave it out."
            )
    if args.images and args.examples:
        raise ValueError(
            "--examples must go without --images, of which the first are drawn. Leave one out."
        )
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size must be >= 1; got {args.size}. Leave it out.")
