"""A trained model alone, without the data that it was trained on."""

import argparse
from typing import NamedTuple

from crate_jax.cli.arguments import default_data, named_model, saved_run
from crate_jax.config import DataConfig
from crate_jax.files import located
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.parameters import Variables
from crate_jax.models.stacked import BlockModel


class Alone(NamedTuple):
    """The result of `open_alone`.

    Attributes:
        model: a model of images or of text.
        variables: what ``model.apply`` takes.
        data: how its images are normalised; None of a model of text.
        step: of a run's checkpoint; None: the weights are of a file.
        class_names: the names of its outputs, in their order; () where none are known.
    """

    model: BlockModel
    variables: Variables
    data: DataConfig | None
    step: int | None
    class_names: tuple[str, ...]


class Frozen(NamedTuple):
    """The result of `open_frozen`.

    Attributes:
        model: a model of images.
        variables: what ``model.apply`` takes.
        data: how its images are normalised.
        step: of a run's checkpoint; None: the weights are of a file.
    """

    model: ImageClassifier
    variables: Variables
    data: DataConfig
    step: int | None


def open_frozen(args: argparse.Namespace, command: str) -> Frozen:
    """`open_alone` of a model of images.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    from crate_jax.models.classifier import of_images

    alone = open_alone(args, command)
    model = of_images(alone.model)
    return Frozen(model, alone.variables, alone.data or default_data(model, args), alone.step)


def open_alone(args: argparse.Namespace, command: str) -> Alone:
    """The model of --workdir and --step, or of --weights and --model.

    Args:
        args: the arguments of a command with the flags of `crate_jax.cli.runs.add_source`, --model
            and --model-kwargs.
        command: for errors.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    from crate_jax.checkpoint.folder import FOLDER
    from crate_jax.interop import load_fitted

    if bool(args.workdir) == bool(args.weights):
        raise ValueError(f"{command} must get one of --workdir and --weights. See --help.")
    if args.workdir and args.model:
        raise ValueError("--model must go with --weights; a run knows its own. Leave it out.")
    if args.weights and args.step:
        raise ValueError("--step must go with --workdir. Leave it out.")
    path, step, data = args.weights, None, None
    if args.workdir:
        config, _, step = saved_run(args.workdir, args.step or "latest")
        data = config.data
        path = str(located(args.workdir, "--workdir") / FOLDER / str(step))
    loaded = load_fitted(path, named_model(args, args.weights))
    variables = {"params": loaded.params, **loaded.extra}
    model = loaded.model
    data = (data or default_data(model, args)) if isinstance(model, ImageClassifier) else None
    return Alone(model, variables, data, step, loaded.class_names)
