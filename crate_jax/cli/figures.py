"""The command `figure`: one figure of the papers, of one run or of several."""

import argparse

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.cli.drawings import FIGURES, OF_ONE_HEAD, OF_ONE_LAYER, Asked
from crate_jax.cli.looking import add_looking, open_specimen
from crate_jax.files import Json


def add_figure(subparsers: Subparsers) -> None:
    """The flags of `figure`."""
    width = max(map(len, FIGURES))
    listed = "\n".join(f"  {n:{width}}  {(f.__doc__ or '').strip()}" for n, f in FIGURES.items())
    parser = subparsers.add_parser(
        "figure",
        help="one figure of the papers, of a run: " + ", ".join(FIGURES),
        description="The figures:\n" + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=FIGURES, metavar="NAME", help="which figure")
    add_looking(parser, several=True)
    parser.add_argument("--layer", type=int, help="counted from 1; default: the last, or all")
    parser.add_argument(
        "--size", type=int, help="pixels of a side of the pictures' images; default: the model's"
    )
    parser.add_argument("--head", type=int, help="counted from 1; default: all")
    parser.add_argument(
        "--output", type=path, help=".svg, .png or .pdf; its data goes beside it; default NAME.svg"
    )
    parser.set_defaults(function=figure)


def figure(args: argparse.Namespace) -> Json:
    """Draw one figure, and write its data as CSV beside it."""
    from crate_jax.analysis.figures import save

    how = dict(examples=args.examples, images=args.images, side=args.size)
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size must be >= 1; got {args.size}. Leave it out.")
    for flag, names in {"layer": OF_ONE_LAYER, "head": OF_ONE_HEAD}.items():
        if getattr(args, flag) is not None and args.name not in names:
            raise ValueError(
                f"--{flag} is for {', '.join(names)}; the figure {args.name} shows all. "
                "Leave it out."
            )
    runs = [open_specimen(args.workdir, args.step, **how)]
    runs += [open_specimen(workdir, **how) for workdir in args.against]
    picture = FIGURES[args.name](runs, Asked(args.layer, args.head))
    output = args.output or f"{args.name}.svg"
    table = save(picture, output)
    steps = [run.step for run in runs]
    return {
        "figure": args.name,
        "step": steps[0],
        "output": output,
        "data": str(table),
        "alt": picture.alt,
    }
