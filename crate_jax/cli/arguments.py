"""Arguments that several commands share: the run, the model, the examples."""

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING

from crate_jax.config import (
    DataConfig,
    ParallelConfig,
    TrainConfig,
    from_dict,
)
from crate_jax.files import Json, expanded

if TYPE_CHECKING:  # imported where it is used, with JAX
    from crate_jax.models.classifier import ImageClassifier
    from crate_jax.models.stacked import BlockModel

KEYS = ("image_key", "label_key")  # flags that name features of a data set
Subparsers = argparse._SubParsersAction  # what `add_subparsers` gives; argparse hides its name


def path(text: str) -> str:
    """The type of a flag that names a file or folder: ~ is the home directory."""
    if not text:  # of a shell's variable that is not set
        raise argparse.ArgumentTypeError("the path must name a file or folder; got nothing")
    try:
        return expanded(text, "the path")
    except ValueError as error:  # of which argparse would not tell the words
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """Add the flag for differences from the named model."""
    parser.add_argument(
        "--model-kwargs",
        "--model_kwargs",
        nargs="+",
        default=[],
        metavar="F=V",
        help="fields that differ from --model's, as num_classes=10",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a model and fit weights to it."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a model of the zoo, as crate_jax.list_models() names it; default: as weights state",
    )
    add_model_kwargs(parser)
    parser.add_argument(
        "--fit",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="parts that the weights may lack or have in another size: head, image_size, "
        "patch_size, in_channels, pool, eta, lmbda",
    )
    parser.add_argument(
        "--method",
        help="resizing by --fit: right (default), crate_alpha, official_maps",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose examples and prepare them."""
    parser.add_argument(
        "--dataset", metavar="NAME", help="digits, folder, tar, synthetic, or TFDS's name"
    )
    parser.add_argument("--data_dir", type=path, help="folder of the data set")
    parser.add_argument(
        "--split", metavar="NAME", help="split to evaluate; default: the run's, or test"
    )
    parser.add_argument("--image_key", help="TFDS's name of the image; default: image")
    parser.add_argument("--label_key", help="TFDS's name of the label; default: label")
    parser.add_argument("--batch_size", type=int, help="examples per step over all devices")
    parser.add_argument(
        "--transforms",
        metavar="SPEC",
        help="transforms as data.eval_transforms; default: the run's",
    )


def named_model(args: argparse.Namespace, weights: str | None) -> "BlockModel | None":
    """The model of --model and --model-kwargs, or the one that weights state; None: neither does.

    Args:
        args: the arguments of a command with these flags, and perhaps --fit.
        weights: of which the model is; None: of a run, which states its own elsewhere.

    Raises:
        KeyError, ValueError: there is no such model, its fields are malformed, or it is not the
            model that the weights state.
        FileNotFoundError, OSError: there are no such weights.
    """
    from crate_jax.interop.pretrained import stated_by
    from crate_jax.models.zoo import altered, create_model

    kwargs = model_kwargs(args)
    named = create_model(args.model, **kwargs) if args.model else None
    stated = stated_by(weights) if weights else None
    if stated is None:
        if kwargs and named is None:
            raise ValueError("--model-kwargs must go with --model. See --help.")
        return named
    model = altered(stated, kwargs) if named is None else named
    _check_stated(args, kwargs, model, stated)
    return model


def _check_stated(
    args: argparse.Namespace, kwargs: Json, model: "BlockModel", stated: "BlockModel"
) -> None:
    """Refuse a model that is another than weights state, but for what is to be fitted.

    How many classes there are the data may say, and a model may go without its head.
    """
    from crate_jax.interop.fit import FITS
    from crate_jax.models.zoo import architecture

    parts, ours, theirs = {"num_classes": "head"}, architecture(model), architecture(stated)
    fit: list[str] = getattr(args, "fit", [])
    differ = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    free = {name for name in differ if parts.get(name, name) in fit}
    free |= {"image_size"} if "patch_size" in fit else set()
    free |= set() if kwargs.get("num_classes") else {"num_classes"}
    other = ["family"] if "family" in differ else [name for name in differ if name not in free]
    if other:
        flag = "--model" if args.model else "--model-kwargs"
        got = [f"{name} {ours.get(name)} in the place of {theirs.get(name)}" for name in other[:3]]
        remedy = f"Leave {flag} out"
        lacks = [parts.get(name, name) for name in other]
        if "fit" in args and set(lacks) <= set(FITS):
            remedy += f", or add --fit {' '.join([*fit, *lacks])}"
        raise ValueError(
            f"{flag} must be the model that the weights state; got {', '.join(got)}. {remedy}."
        )


def model_kwargs(args: argparse.Namespace) -> Json:
    """--model-kwargs as a dict.

    Raises:
        ValueError: one is not FIELD=VALUE.
    """
    kwargs = {}
    for text in args.model_kwargs:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--model-kwargs must be FIELD=VALUE …; got {text}. See --help.")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value  # a word, such as pool=mean
    return kwargs


def resize_method(args: argparse.Namespace) -> str:
    """--method, or the default.

    Raises:
        ValueError: nothing is to be fitted.
    """
    if args.method and not args.fit:
        raise ValueError("--method must go with --fit. Leave it out, or see --help.")
    return args.method or "right"


def default_data(model: "ImageClassifier", args: argparse.Namespace) -> DataConfig:
    """Set the preparation of images for --weights: as they state, or as is usual for --model."""
    from crate_jax.interop.pretrained import prepared_for

    prepared = prepared_for(model, args.weights or "", args.model or "")
    return DataConfig(eval_transforms=prepared.transforms, mean=prepared.mean, std=prepared.std)


def override_data(data: DataConfig, args: argparse.Namespace) -> None:
    """Write what the flags say of the data set and its preparation into a config section.

    Raises:
        ValueError: a flag names a feature of a data set that has none.
    """
    if args.dataset not in (None, data.dataset):  # keys are those of one data set
        data.image_key, data.label_key = DataConfig.image_key, DataConfig.label_key
    for field, value in (
        ("dataset", args.dataset),
        ("data_dir", args.data_dir),
        ("eval_transforms", args.transforms),
        ("eval_split", args.split),
        ("image_key", args.image_key),
        ("label_key", args.label_key),
    ):
        if value is not None:
            setattr(data, field, value)
    for flag in KEYS:
        if getattr(args, flag) is not None and _has_no_features(data.dataset):
            raise ValueError(
                f"--{flag} must go with a data set of TFDS; {data.dataset} names no features. "
                "Leave it out."
            )


def _has_no_features(dataset: str) -> bool:
    from crate_jax.data.stores.sources import STORES  # it takes a while

    return dataset in STORES


def saved_run(workdir: str | Path, step: str) -> tuple[TrainConfig, Json, int]:
    """The config in a run's checkpoint, the facts of its task, and the number of the checkpoint.

    Raises:
        FileNotFoundError, ValueError, KeyError: there is none, or it cannot be read.
    """
    from crate_jax.checkpoint.manager import Checkpointer
    from crate_jax.checkpoint.reading import read_facts

    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        config = from_dict(reader.restore_record(number)["config"])
        config.parallel = ParallelConfig()  # of the machine it was trained on
        return config, read_facts(workdir), number
    finally:
        reader.close()


def saved_metrics(workdir: str | Path, number: int) -> dict[str, float]:
    """The metrics of a run's checkpoint; empty if it was not evaluated.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    from crate_jax.checkpoint.manager import Checkpointer

    reader = Checkpointer(workdir, read_only=True)
    try:
        return reader.metrics(number)
    finally:
        reader.close()
