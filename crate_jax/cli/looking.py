"""The arguments of commands that look inside a run, and the way they open it."""

import argparse
from pathlib import Path
from typing import Any

from crate_jax.cli.arguments import path, saved_run
from crate_jax.cli.examples import folder_images
from crate_jax.cli.specimen import Specimen
from crate_jax.config import TrainConfig

EXAMPLES = 256
LATEST = "latest"
NAMED_STEPS = (LATEST, "best")


def add_looking(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The flags of what is opened."""
    parser.add_argument("--workdir", type=path, required=True, help="a run, here or in a bucket")
    parser.add_argument("--step", help="latest (default), best or a number")
    whose = "other runs" if several else "another run"
    parser.add_argument(
        "--against",
        type=path,
        nargs="+" if several else None,
        help=f"{whose}, to stand beside it; always at the latest checkpoint",
    )
    parser.add_argument(
        "--images", type=path, help="a folder for the pictures; default: the test split"
    )
    parser.add_argument(
        "--examples", type=int, help=f"examples of each split, for measures; default: {EXAMPLES}"
    )


def check_looking(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything of --workdir is read, or is there.

    Raises:
        ValueError, KeyError, OSError: a mistake that the user can correct.
    """
    if args.examples is not None and args.examples < 1:
        raise ValueError(
            f"--examples must be >= 1; got {args.examples}. The default is {EXAMPLES}."
        )
    for workdir in _others(args):
        saved_run(workdir, LATEST)
    if args.images:
        folder_images(args.images, TrainConfig(), (1, 1, 3), resized=True)


def open_runs(args: argparse.Namespace, *, side: int | None = None) -> list[Specimen]:
    """--workdir at its --step, then the runs of --against at their latest checkpoints.

    Args:
        args: the arguments of `add_looking`.
        side: of --size, if the command has it.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    how: dict[str, Any] = dict(examples=args.examples or EXAMPLES, images=args.images, side=side)
    runs = [open_specimen(args.workdir, args.step or LATEST, **how)]
    runs += [open_specimen(workdir, **how) for workdir in _others(args)]
    for flag, value in {"images": args.images, "size": side}.items():
        if value is not None and not any(run.of_images for run in runs):
            raise ValueError(
                f"--{flag} must go with a run of images; {args.workdir} has none. Leave it out."
            )
    return runs


def _others(args: argparse.Namespace) -> list[str]:
    """The runs of --against, which takes one or several."""
    return [args.against] if isinstance(args.against, str) else args.against or []


def open_specimen(
    workdir: str,
    step: str = LATEST,
    *,
    examples: int = EXAMPLES,
    images: str | None = None,
    side: int | None = None,
) -> Specimen:
    """A run's checkpoint, to be looked at.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    import jax

    from crate_jax.checkpoint.reading import restore_trained
    from crate_jax.training.run import set_up

    config, facts, number = saved_run(workdir, step)
    run = set_up(config, "eval", facts=facts)
    abstract_params, abstract_extra = jax.eval_shape(run.task.init, run.key)
    params, extra, _ = restore_trained(workdir, abstract_params, abstract_extra, number)
    name = Path(workdir).name or config.name
    return Specimen(name, workdir, number, run, params, extra, examples, images, side)
