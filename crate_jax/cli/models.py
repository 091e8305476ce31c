"""Commands about a model alone: `convert`, `summary`, `plan`."""

import argparse
import sys
from typing import TYPE_CHECKING

from crate_jax.cli.arguments import (
    Subparsers,
    add_model,
    add_model_kwargs,
    model_kwargs,
    named_model,
    path,
    resize_method,
    saved_metrics,
    saved_run,
)
from crate_jax.cli.flags import parse_config
from crate_jax.columns import in_columns
from crate_jax.files import Json
from crate_jax.streams import tolerant
from crate_jax.waiting import counting

if TYPE_CHECKING:  # imported where it is used, with JAX
    from crate_jax.models.stacked import BlockModel


def add_convert(subparsers: Subparsers) -> None:
    """The flags of `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="weights from one kind of file to another",
        epilog="convert --from=runs/digits --to=digits.safetensors\n"
        "convert --from=crate_small.pth --to=crate_small.npz",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=path,
        required=True,
        help="a weights file of any kind, a run, one of its steps, a tree of Orbax, or a folder "
        "of the Hub",
    )
    parser.add_argument(
        "--to",
        dest="target",
        type=path,
        required=True,
        help="a file of .safetensors or .npz; of PyTorch .pth, .pt or .bin (a bare state dict), "
        ".ckpt (Lightning's), or .pth.tar (the official scripts'); or FOLDER/, for the Hub",
    )
    parser.add_argument(
        "--layout",
        help="layout to write: official for most families; frame_cbsa, frame_tssa or "
        "frame_mssa for CBSA's frame; torch, jax or clipa for CRATE-α; timm, crate_baseline, "
        "dinov2, simdino or simdinov2 for ViT; transformers for CRATE-BERT; "
        "default: our own paths, and in PyTorch files the first that fits",
    )
    parser.add_argument(
        "--which",
        default="",
        help="the weights to take where there are several, such as student; default: averaged "
        "ones first, such as a teacher",
    )
    parser.add_argument(
        "--license", help="licence of a FOLDER/, as the hub abbreviates it, such as mit"
    )
    add_model(parser)
    parser.set_defaults(function=convert)


def convert(args: argparse.Namespace) -> Json:
    """Weights from one kind of file to another, through a model that they fit."""
    from crate_jax.interop import load_fitted, save_weights
    from crate_jax.interop.hub_folder import names_folder
    from crate_jax.interop.save import holds_class_names
    from crate_jax.models.cost import count_parameters

    method, to_folder = resize_method(args), names_folder(args.target)
    if args.license and not to_folder:
        raise ValueError("--license must go with --to FOLDER/. End the path in a slash.")
    with counting("read the weights"):
        loaded = load_fitted(
            args.source,
            named_model(args, args.source),
            fit=args.fit,
            method=method,
            which=args.which,
        )
    fitted, names = loaded.report, loaded.class_names
    variables = {"params": loaded.params, **loaded.extra}
    if names and not holds_class_names(args.target):
        fitted = [*fitted, f"left aside the names of {len(names)} classes, for a bare state dict"]
        names = ()
    said = _said_of(args, loaded.model) if to_folder else {}
    how = dict(layout=args.layout, class_names=names, **said)
    with counting("write the weights"):
        save_weights(args.target, variables, loaded.model, **how)
    return {
        "from": args.source,
        "to": args.target,
        "parameters": count_parameters(loaded.model),
        "fitted": fitted,
    }


def _said_of(args: argparse.Namespace, model: "BlockModel") -> Json:
    """The files of a hub folder besides its weights: preprocessing and model card."""
    from crate_jax.interop import ModelCard, find_run, is_run
    from crate_jax.interop.addresses import fetched
    from crate_jax.interop.pictures import of_data
    from crate_jax.interop.pretrained import prepared_for
    from crate_jax.models.classifier import ImageClassifier

    source, pictures = fetched(args.source, "--from"), isinstance(model, ImageClassifier)
    card: Json = {"title": args.model or "", "licence": args.license or ""}
    if not (source.is_dir() and is_run(source)):
        prepared = prepared_for(model, args.source, args.model or "") if pictures else None
        return {"preprocessing": prepared, "card": ModelCard(**card)}
    workdir, step = find_run(source)
    config, _, number = saved_run(workdir, step)
    measured = {name.rpartition("/")[2]: v for name, v in saved_metrics(workdir, number).items()}
    card["metrics"] = {name: v for name, v in measured.items() if name != "examples"}
    if pictures:
        card["dataset"] = f"{config.data.dataset}, {config.data.eval_split}"
    prepared = of_data(config.data, model) if pictures else None
    return {"preprocessing": prepared, "card": ModelCard(**card)}


def add_summary(subparsers: Subparsers) -> None:
    """The flags of `summary`."""
    parser = subparsers.add_parser(
        "summary",
        help="the size of a model: parameters, multiply-adds, memory",
        epilog="summary crate_base_patch16_224\nsummary crate_tiny_patch16_224 --num_classes=10",
    )
    parser.add_argument("model", help="a model of the zoo; crate_jax.list_models() names them")
    parser.add_argument("--image_size", type=int, nargs="+", help="pixels: a side, or two")
    parser.add_argument("--num_classes", type=int, help="classes of a model of images")
    parser.add_argument(
        "--context_length", type=int, help="tokens that a model of text sees at once"
    )
    parser.add_argument("--vocab_size", type=int, help="vocabulary of a model of text")
    add_model_kwargs(parser)
    parser.set_defaults(function=summary)


def summary(args: argparse.Namespace) -> Json:
    """Print the cost of a model, by formula."""
    from crate_jax.models import cost
    from crate_jax.models.classifier import ImageClassifier
    from crate_jax.models.language import LanguageModel
    from crate_jax.models.zoo import create_model

    fields = ("image_size", "num_classes", "context_length", "vocab_size")
    stated = {name: getattr(args, name) for name in fields}
    overrides = {name: value for name, value in stated.items() if value is not None}
    model = create_model(args.model, **model_kwargs(args) | overrides)
    takes: Json = {}
    example = "example"
    if isinstance(model, ImageClassifier):
        takes, example = {"image_size": list(model.input_shape[:2])}, "image"
    elif isinstance(model, LanguageModel):
        takes = {"context_length": model.context_length, "vocab_size": model.vocab_size}
        example = "text"
    sizes = {
        **takes,
        "tokens": model.num_tokens,
        "parameters": cost.count_parameters(model),
        "gmacs": round(cost.multiply_adds(model) / 1e9, 3),
        f"activation_mib_per_{example}": round(cost.activation_bytes(model) / 2**20, 1),
    }
    sys.stdout.write(_sizes(args.model, sizes))
    return {"model": args.model, **sizes}


# The names of the sizes, and their units, for people.
_WORDS = {
    "image_size": "image, pixels",
    "context_length": "longest text, tokens",
    "vocab_size": "vocabulary, tokens",
    "gmacs": "multiply-adds of a forward pass, 10⁹",
    **{f"activation_mib_per_{x}": f"activations of one {x}, MiB" for x in ("image", "text")},
}


def _sizes(name: str, sizes: Json) -> str:
    """The sizes of a model, one a line."""
    rows = [
        (
            f"  {_WORDS.get(key, key)}",
            " x ".join(map(str, value)) if key == "image_size" else f"{value:,}",
        )
        for key, value in sizes.items()
    ]
    return "\n".join([name, *in_columns(rows)]) + "\n"


def add_plan(subparsers: Subparsers) -> None:
    """The flags of `plan`; those of the recipe's fields are left to `parse_config`."""
    parser = subparsers.add_parser(
        "plan",
        help="memory and time of a training step on other hardware",
        epilog="plan --config=imagenet1k:base --mesh=data:256,fsdp:8\n"
        "plan --config=imagenet1k:base --topology=v5e:4x4",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help="a recipe, with --config.FIELD=VALUE as `train` takes them",
    )
    parser.add_argument("--mesh", help="such as data:256,fsdp:8; with --topology default: data:-1")
    parser.add_argument(
        "--topology", help="hardware to compile for, such as v5e:4x4 or h100; default: CPU devices"
    )
    parser.set_defaults(function=plan)


def plan(args: argparse.Namespace) -> Json:
    """Estimate a training step on hardware that you do not have."""
    if not (args.mesh or args.topology):
        raise ValueError("plan must get --mesh, --topology or both. See --help.")
    import jax

    from crate_jax.planning.plan import mesh_size, plan, plan_on
    from crate_jax.planning.report import table
    from crate_jax.planning.topology import find_topology

    config = parse_config(args.config, args.config_flags)
    jax.config.update("jax_platforms", "cpu")
    if args.topology:
        topology = find_topology(args.topology)
        with counting("plan: lower and compile"):
            found = plan_on(config, args.mesh or "data:-1", topology, _say)
    else:
        jax.config.update("jax_num_cpu_devices", mesh_size(args.mesh))
        with counting("plan: lower and compile"):
            found = plan(config, args.mesh)
    sys.stdout.write(table(found))
    return found


def _say(text: str) -> None:
    """A line for whoever waits."""
    stream = tolerant(sys.stderr)
    stream.write(text + "\n")
    stream.flush()
