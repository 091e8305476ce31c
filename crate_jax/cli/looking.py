"""What commands that look inside a run ask for, and how they open it."""

import argparse
from pathlib import Path
from typing import Any

from crate_jax.cli.arguments import path, saved_run
from crate_jax.cli.specimen import Specimen


def add_looking(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The flags of what is opened."""
    parser.add_argument("--workdir", type=path, required=True, help="a run, here or in a bucket")
    parser.add_argument("--step", default="latest", help="latest, best or a number")
    how: dict[str, Any] = dict(nargs="+", default=[]) if several else {}
    parser.add_argument("--against", type=path, help="another run, to stand beside it", **how)
    parser.add_argument(
        "--images", type=path, help="a folder of images for the pictures; default: the test split's"
    )
    parser.add_argument(
        "--examples", type=int, default=256, help="of each split, that measures take"
    )


def open_specimen(
    workdir: str,
    step: str = "latest",
    *,
    examples: int = 256,
    images: str | None = None,
    side: int | None = None,
) -> Specimen:
    """A run's checkpoint, to be looked at.

    Raises:
        ValueError, KeyError, FileNotFoundError: what the user can mend.
    """
    import jax

    from crate_jax.checkpoint.reading import restore_trained
    from crate_jax.training.run import set_up

    if examples < 1:
        raise ValueError(f"--examples must be >= 1; got {examples}. The default is 256.")
    config, facts, number = saved_run(workdir, step)
    run = set_up(config, "eval", facts=facts)
    abstract_params, abstract_extra = jax.eval_shape(run.task.init, run.key)
    params, extra, _ = restore_trained(workdir, abstract_params, abstract_extra, number)
    name = Path(workdir).name or config.name
    return Specimen(name, workdir, number, run, params, extra, examples, images, side)
