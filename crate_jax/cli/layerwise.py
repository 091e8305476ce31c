"""The command `layerwise`: what every layer does to its objective, on train and test."""

import argparse
import itertools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from crate_jax.analysis.measured import DEFINITIONS, GEOMETRY, Measured, measured_of
from crate_jax.analysis.verdict import verdict
from crate_jax.cli.arguments import Subparsers, add_data, add_model
from crate_jax.cli.examples import parts, split_examples
from crate_jax.cli.parser import indented
from crate_jax.cli.runs import add_source, open_trained
from crate_jax.columns import WIDTH
from crate_jax.files import Json
from crate_jax.waiting import counted

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.tasks.task import Extra, Params
    from crate_jax.training.run import Run

INITIAL = "initial"  # in the place of a step: the parameters before the first one


def add_layerwise(subparsers: Subparsers) -> None:
    """The flags of `layerwise`."""
    parser = subparsers.add_parser(
        "layerwise",
        help="measures of every layer: compression, sparsity",
        epilog="layerwise --workdir=runs/digits --geometry",
    )
    add_source(parser)
    parser.add_argument(
        "--initial",
        action="store_true",
        help="the run's parameters before its first step",
    )
    parser.add_argument("--decoder", action="store_true", help="the decoder of an autoencoder")
    parser.add_argument(
        "--images", type=int, default=256, help="largest number of examples; default: 256"
    )
    parser.add_argument(
        "--definition", choices=DEFINITIONS, default=DEFINITIONS[0], help="default: paper"
    )
    parser.add_argument(
        "--geometry",
        action="store_true",
        help="also ranks, angles, entropy and coherence, which cost more",
    )
    add_model(parser)
    add_data(parser)
    parser.set_defaults(function=layerwise)


def layerwise(args: argparse.Namespace) -> Json:
    """A table of every measure by layer, a verdict, and the numbers as JSON."""
    if args.images < 1:
        raise ValueError(f"--images must be at least 1; got {args.images}. The default is 256.")
    if args.initial and (args.weights or args.step):
        raise ValueError("--initial must go with --workdir and without --step. Leave one out.")
    if args.geometry and args.definition != DEFINITIONS[0]:
        raise ValueError(
            f"--geometry must go with --definition {DEFINITIONS[0]}; {args.definition} defines "
            "none. Leave one out."
        )
    opened = open_trained(args, "layerwise")
    params, extra = opened.params, opened.extra
    if args.initial:
        from crate_jax.checkpoint.reading import read_facts
        from crate_jax.training.beginning import before_training

        params, extra = before_training(opened.run, read_facts(args.workdir))
    found = measure_split(
        opened.run,
        params,
        extra,
        images=args.images,
        definition=args.definition,
        geometry=args.geometry,
        decoder=args.decoder,
    )
    told = "\n".join(indented(line, first="") for line in verdict(found))
    sys.stdout.write(f"{table(found)}\n\n{told}\n")
    data = opened.run.config.data
    return {
        "dataset": data.dataset,
        "split": data.eval_split,
        "step": INITIAL if args.initial else opened.step,
        "fitted": opened.fitted,
        "definition": args.definition,
        "images": next(iter(found.values())).count,
        "layers": {name: _rounded(values.mean) for name, values in found.items()},
        "deviations": {name: _rounded(values.std) for name, values in found.items()},
        "verdict": verdict(found),
    }


def measure_split(
    run: "Run",
    params: "Params",
    extra: "Extra",
    *,
    images: int,
    definition: str = DEFINITIONS[0],
    geometry: bool = False,
    decoder: bool = False,
) -> dict[str, Measured]:
    """`crate_jax.analysis.measure` of the first examples of a run's evaluation split.

    Args:
        run: with "eval" rows.
        params: the parameters of its task, on the host.
        extra: the extra of its task, on the host.
        images: how many examples, at most.
        definition: the definition of `crate_jax.analysis.measure`.
        geometry: whether ranks, angles, entropy and coherence are measured too.
        decoder: whether to measure the layers of a decoder, in the place of the encoder's.

    Raises:
        ValueError: the task's model has no layers of the family, or no decoder; or no example can
            be read.
    """
    from crate_jax.analysis.decoder import DecoderLayers
    from crate_jax.analysis.measure import measure

    examples = (run.task.inside(params, extra, rows) for rows in split_examples(run, images))
    first = next(examples)
    model = first.model
    if decoder:
        if not getattr(model, "decoder_depth", 0):
            raise ValueError(
                "--decoder must go with a model that has a decoder; got a "
                f"{type(model).__name__} without one. Leave it out."
            )
        model = DecoderLayers(model)
    known = measured_of(model, definition=definition)
    names = [name for name in known if geometry or name not in GEOMETRY]
    batches = itertools.chain.from_iterable(map(parts, itertools.chain([first], examples)))
    of_images = counted(batches, "layerwise", images, "examples", size=len)
    return measure(model, first.variables, of_images, names, definition=definition)


def table(found: Mapping[str, Measured]) -> str:
    """A line a layer, a column a measure: means over the examples, in tables of 80 columns."""
    depth = len(next(iter(found.values())).mean)
    columns = [[name, *(f"{mean:.4g}" for mean in values.mean)] for name, values in found.items()]
    layers = ["layer", *map(str, range(1, depth + 1))]
    tables, beside = [], [layers]
    for column in columns:
        if sum(_width(each) for each in [*beside, column]) > WIDTH:
            tables.append(beside)
            beside = [layers]
        beside.append(column)
    return "\n\n".join(_lines(each) for each in [*tables, beside])


def _width(cells: list[str]) -> int:
    return max(map(len, cells)) + 2


def _lines(columns: list[list[str]]) -> str:
    padded = [[cell.rjust(_width(cells)) for cell in cells] for cells in columns]
    return "\n".join("".join(row) for row in zip(*padded, strict=True))


def _rounded(values_L: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values_L]
