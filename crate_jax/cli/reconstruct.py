"""The command `reconstruct`: what an autoencoder makes of images of which it sees a part."""

import argparse
import math

import numpy as np

from crate_jax.cli.arguments import Subparsers, add_data, add_model, path
from crate_jax.cli.runs import add_source, open_trained
from crate_jax.config import TrainConfig
from crate_jax.files import Json, located
from crate_jax.waiting import counting

TASK, PICTURES = "masked_autoencoding", "reconstruction"


def add_reconstruct(subparsers: Subparsers) -> None:
    """The flags of `reconstruct`."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="images: original, masked, and reconstructed by an autoencoder",
        epilog="reconstruct --workdir=runs/mae --output=mae.png",
    )
    add_source(parser)
    parser.add_argument(
        "--output", type=path, help="a picture; default: WORKDIR/reconstruction.png, or here"
    )
    parser.add_argument(
        "--ratio", type=float, help="share of patches to hide; default: the run's, or 0.75"
    )
    parser.add_argument(
        "--not-normalized",
        "--not_normalized",
        action="store_true",
        help="for --weights that predict pixels, not deviations in a patch",
    )
    add_model(parser)
    add_data(parser)
    parser.set_defaults(function=reconstruct)


def reconstruct(args: argparse.Namespace) -> Json:
    """The first images of the evaluation split, a row each, and their exact error by `evaluate`."""
    import jax

    from crate_jax.analysis.report import draw_rows
    from crate_jax.tasks.masked_autoencoding import SHOWN
    from crate_jax.training.run import inspect_split

    if args.not_normalized and args.workdir:
        raise ValueError("--not-normalized must go with --weights; a run knows. Leave it out.")

    def change(config: TrainConfig) -> None:
        config.masking.normalize &= not args.not_normalized
        if args.ratio is not None:
            config.masking.ratio = args.ratio
        if args.batch_size is None:  # no more than are shown, by whole rows of devices
            config.eval_batch_size = math.ceil(SHOWN / jax.device_count()) * jax.device_count()

    opened = open_trained(args, "reconstruct", task=TASK, change=change)
    with counting("reconstruct"):
        _, images = inspect_split(opened.run, opened.params, opened.extra)
    pictures, data = np.asarray(images[PICTURES]), opened.run.config.data
    output = args.output or str(located(args.workdir or ".", "--output") / f"{PICTURES}.png")
    draw_rows(np.asarray(pictures), output)
    inputs = {"dataset": data.dataset, "split": data.eval_split}
    return inputs | {
        "step": opened.step,
        "fitted": opened.fitted,
        "images": len(pictures),
        "output": output,
    }
