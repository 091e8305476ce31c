"""`compare`: ours against PyTorch on the same weights and inputs."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from crate_jax.cli.arguments import (
    KEYS,
    Subparsers,
    add_data,
    add_model,
    default_data,
    named_model,
    override_data,
    path,
    resize_method,
    saved_run,
)
from crate_jax.config import DataConfig
from crate_jax.files import Json
from crate_jax.waiting import counting

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.data.images.labelled import LabelledImages
    from crate_jax.models.classifier import ImageClassifier
    from crate_jax.parity.difference import Comparison


def add_compare(subparsers: Subparsers) -> None:
    """The flags of `compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="our numbers against PyTorch's, layer by layer",
        epilog="compare --weights=crate_small.pth --train-steps=0\n"
        "compare --weights=runs/digits --html=digits.html",
    )
    parser.add_argument(
        "--weights", type=path, required=True, help="a weights file, a run or one of its steps"
    )
    parser.add_argument("--reference", type=path, help="PyTorch's weights; default: the same")
    add_model(parser)
    parser.add_argument(
        "--images", type=path, help="a folder of images; default: the run's, or noise"
    )
    add_data(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of our computation",
    )
    parser.add_argument(
        "--train-steps",
        "--train_steps",
        type=int,
        default=10,
        help="steps of each optimizer; default: 10; 0: none",
    )
    parser.add_argument(
        "--rate-scale",
        "--rate_scale",
        type=float,
        default=0.05,
        help="learning rates as a share of the official peak; default: 0.05",
    )
    parser.add_argument(
        "--float64",
        action="store_true",
        help="also train PyTorch in float64, which shows what rounding does",
    )
    parser.add_argument("--html", type=path, help="a page to write, with all numbers and a plot")
    parser.set_defaults(function=compare)


def compare(args: argparse.Namespace) -> Json:
    """Ours against PyTorch on the same weights and inputs: a table, perhaps a page, a verdict."""
    from crate_jax.files import written_aside

    _check_compare(args)
    try:
        from crate_jax.parity.compare import TOLERANCES
        from crate_jax.parity.comparison import page, table
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ValueError(
            "compare must have PyTorch; it is missing. Install it: pip install 'crate-jax[torch]'"
        ) from None
    with written_aside(args.html) if args.html else contextlib.nullcontext() as aside:
        with counting("compare"):
            found, conditions = _compare(args)
        sys.stdout.write(table(found))
        if aside is not None:
            aside.write_text(page(found, conditions), encoding="utf-8")
    tolerances = TOLERANCES if args.dtype == "float32" else None
    return conditions | _result(found) | {"tolerances": tolerances}


def _check_compare(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, and a page that cannot be drawn."""
    if args.train_steps < 0 or args.rate_scale <= 0:
        raise ValueError("--train-steps must be >= 0 and --rate-scale > 0. See --help.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be >= 1; got {args.batch_size}. The default is 8.")
    for package in ("matplotlib", "jinja2") if args.html else ():
        if find_spec(package) is None:
            raise ValueError(
                f"--html must have {package}. Install it: pip install 'crate-jax[report]'"
            )


def _compare(args: argparse.Namespace) -> "tuple[Comparison, Json]":
    """The results, and the conditions of the comparison."""
    import jax
    import jax.numpy as jnp

    from crate_jax.cli.steps import autoencoder_steps, classifier_steps, hidden_loss, text_steps
    from crate_jax.cli.texts import random_texts
    from crate_jax.interop import load_fitted
    from crate_jax.models.classifier import of_images
    from crate_jax.models.language import LanguageModel
    from crate_jax.parity.compare import SMOOTHING
    from crate_jax.parity.compare import compare as compare_both
    from crate_jax.parity.crate_mae import hiding
    from crate_jax.parity.runs import without_chance
    from crate_jax.tasks.losses import cross_entropy, token_cross_entropy

    fits = functools.partial(load_fitted, fit=args.fit, method=resize_method(args))
    loaded = fits(args.weights, named_model(args, args.weights))
    params, model, fitted, classes, extra = loaded
    variables = {"params": params, **extra}
    autoencodes = bool(getattr(model, "decoder_depth", 0))
    if getattr(model, "num_classes", None) == 0 and not autoencodes:
        raise ValueError(
            "model.num_classes must be at least 1 for its PyTorch twin; got 0, features. Set it by "
            "--model and --model-kwargs."
        )
    reference = variables
    if args.reference:
        theirs = fits(args.reference, model)
        reference = {"params": theirs.params, **theirs.extra}
    if isinstance(model, LanguageModel):
        images, labels, inputs = random_texts(args, model)
        loss, steps = token_cross_entropy, text_steps
    elif autoencodes:
        model: Any = hiding(model)
        images, _, inputs = _inputs(args, model, classes)
        labels, loss, steps = images, functools.partial(hidden_loss, model), autoencoder_steps
    else:
        images, labels, inputs = _inputs(args, of_images(model), classes)
        loss, steps = functools.partial(cross_entropy, label_smoothing=SMOOTHING), classifier_steps
    model = without_chance(model).clone(dtype=jnp.dtype(args.dtype))
    found = compare_both(
        model,
        variables,
        images,
        labels,
        loss=loss,
        train=functools.partial(steps, model),
        train_steps=args.train_steps,
        rate_scale=args.rate_scale,
        float64=args.float64,
        reference_params=reference,
    )
    conditions = {
        "weights": args.weights,
        "reference": args.reference or args.weights,
        "model": args.model or "as the weights state",
        "fitted": fitted,
        "inputs": inputs,
        "dtype": args.dtype,
        "device": f"{jax.devices()[0].device_kind} (PyTorch: cpu)",
        "rate_scale": args.rate_scale,
    } | {name: version(name) for name in ("jax", "flax", "optax", "torch")}
    return found, conditions


def _result(found: "Comparison") -> Json:
    """The results as JSON values."""
    return {
        found.examples: found.images,
        "relative": {row.name: float(f"{row.relative:.3g}") for row in found.rows},
        "losses": found.losses,
        f"gradient_{found.examples}": found.gradient_images,
        "training": found.training,
        "top1_agreement": found.top1_agreement,
        f"{found.examples}_per_s": {k: round(v, 1) for k, v in found.images_per_s.items()},
        "first_difference": found.first_difference,
        "within_tolerance": found.first_difference is None,
    }


def _inputs(
    args: argparse.Namespace, model: "ImageClassifier", classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Normalised images (B, H, W, c), labels (B,), and what they are in words."""
    from crate_jax.interop import find_run, is_run
    from crate_jax.interop.addresses import fetched

    if args.images and args.dataset:
        raise ValueError("compare must get one of --images and --dataset. Leave one out.")
    weights = fetched(args.weights, "--weights")
    data, of_run = default_data(model, args), weights.is_dir() and is_run(weights)
    _check_heeded(args, of_run)
    if of_run:
        data = saved_run(*find_run(args.weights))[0].data
    override_data(data, args)
    if args.images or args.dataset or of_run:
        return _stored_images(args, model, data, classes)
    rng, batch_size = np.random.default_rng(0), args.batch_size or 8
    images = rng.normal(size=(batch_size, *model.input_shape)).astype(np.float32)
    labels = rng.integers(0, model.num_classes or 1, batch_size)
    return images, labels, "seeded normal noise"


def _check_heeded(args: argparse.Namespace, of_run: bool) -> None:
    """Refuse flags about a data set where none is read: for a folder of images, and for noise."""
    if args.dataset or (of_run and not args.images):
        return
    own = () if args.images else ("transforms",)
    for flag in ("data_dir", "split", *KEYS, *own):
        if getattr(args, flag) is not None:
            read = "--images has none" if args.images else "compare draws noise without one"
            raise ValueError(f"--{flag} must go with --dataset; {read}. Leave it out.")


def _stored_images(
    args: argparse.Namespace,
    model: "ImageClassifier",
    data: DataConfig,
    classes: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, str]:
    """The same for --images, or for the first of a split."""
    import jax.numpy as jnp

    from crate_jax.data.images.labelled import open_labelled_images
    from crate_jax.data.loader import eval_batches
    from crate_jax.tasks.pixels import normalized

    if args.images:
        rows = _folder_rows(args.images, model, data)
    else:
        rows = open_labelled_images(
            data,
            data.eval_split,
            train=False,
            image_shape=model.input_shape,
            num_classes=model.num_classes,
            classes=classes,
            labelled=bool(model.num_classes),
        )
    if model.num_classes and rows.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes must equal the {rows.num_classes} classes of {rows.name}; got "
            f"{model.num_classes}. Choose another --dataset."
        )
    batch_size = min(args.batch_size or 8, len(rows))
    batch = next(eval_batches(rows, data, batch_size=batch_size))
    pixels = jnp.asarray(batch["image"])
    images = normalized(pixels, mean=tuple(data.mean), std=tuple(data.std))
    return np.asarray(images), np.asarray(batch["label"], np.int64), rows.name


def _folder_rows(folder: str, model: "ImageClassifier", data: DataConfig) -> "LabelledImages":
    """The images anywhere below a folder, with labels that only have to be the same for both."""
    from crate_jax.data.images.labelled import LabelledImages
    from crate_jax.data.images.pipeline import make_pipeline
    from crate_jax.data.stores.folders import FolderImages, folder_images
    from crate_jax.data.stores.sources import Source

    found = folder_images(folder, _no_label)
    if not len(found):
        raise ValueError(f"--images must be a folder with images; got {folder}. Choose another.")
    classes = model.num_classes or 1
    labels = np.random.default_rng(0).integers(0, classes, len(found)).astype(np.int32)
    source = Source(folder, FolderImages(folder, found.names, labels), classes)
    return LabelledImages(source, make_pipeline(data, model.input_shape, train=False))


def _no_label(path: str) -> int:
    del path
    return 0
