"""The command `export`: a model with its weights as a program that needs this package no more."""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crate_jax.cli.alone import Alone, open_alone
from crate_jax.cli.arguments import Subparsers, add_model_kwargs, path
from crate_jax.cli.runs import add_source
from crate_jax.files import Json, check_folder, check_writable, located, written_aside
from crate_jax.interop.export import PIXELS, PLATFORMS, USUAL
from crate_jax.version import VERSION
from crate_jax.waiting import counting

if TYPE_CHECKING:  # imported where it is used, with flatbuffers
    from jax.export import Exported

SUFFIX = ".stablehlo"
# The tolerance of the program's outputs against the model's, relative to the largest.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}

PAGE = """\
# {name}

This program is {what}. It needs JAX alone: `pip install jax flatbuffers`.

```python
import jax.export, numpy as np
with open("{file}", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
inputs = np.zeros({shape}, np.{dtype})  # {values}
outputs = program.call(inputs)  # {outputs}
```

`{facts}` says which model it is, {more}.
"""


class Output(NamedTuple):
    """The files of an export.

    Attributes:
        program: of `crate_jax.export_model`.
        facts: JSON; what the program is.
        page: how it is called.
    """

    program: Path
    facts: Path
    page: Path


def add_export(subparsers: Subparsers) -> None:
    """The flags of `export`."""
    parser = subparsers.add_parser(
        "export",
        help="a model with its weights as StableHLO, to run without us",
        epilog="export --workdir=runs/digits --step=best",
    )
    add_source(parser)
    parser.add_argument("--model", metavar="NAME", help="a model of the zoo, unless --weights says")
    add_model_kwargs(parser)
    parser.add_argument(
        "--output",
        type=path,
        help=f"a file that ends in {SUFFIX}, or a folder; default: WORKDIR/export, or export here",
    )
    parser.add_argument(
        "--pixels",
        choices=PIXELS,
        help="input of a model of images: uint8, 0 … 255 (the default); or float32, in [0, 1]",
    )
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=PLATFORMS,
        default=list(USUAL),
        metavar="NAME",
        help=f"platforms, of {', '.join(PLATFORMS)}; default: {' '.join(USUAL)}",
    )
    parser.set_defaults(function=export)


def export(args: argparse.Namespace) -> Json:
    """Write the program, its facts and a page; compare it with the model where it can run here."""
    from crate_jax.interop.export import make_program, require_flatbuffers
    from crate_jax.models.classifier import ImageClassifier

    require_flatbuffers()
    output = _output(args)
    opened = open_alone(args, "export")
    of_images = isinstance(opened.model, ImageClassifier)
    if args.pixels and not of_images:
        raise ValueError(
            f"--pixels must go with a model of images; got a {type(opened.model).__name__}. "
            "Leave it out."
        )
    data: Any = opened.data
    how: Any = dict(pixels=args.pixels or PIXELS[0], platforms=args.platforms)
    how |= dict(mean=data.mean, std=data.std) if of_images else dict(mean=None, std=None)
    with counting("export"):
        program = make_program(opened.model, opened.variables, **how)
    content = bytes(program.serialize())
    facts = _facts(args, opened, program) | _identity(content, output)
    output.program.parent.mkdir(parents=True, exist_ok=True)
    for file, written in (
        (output.program, content),
        (output.facts, json.dumps(facts, indent=2).encode() + b"\n"),
        (output.page, _page(output, facts).encode()),
    ):
        with written_aside(file) as aside:
            aside.write_bytes(written)
    told = {"output": str(output.program), "bytes": len(content), "step": opened.step}
    return told | _compared(opened, content, of_images)


def _output(args: argparse.Namespace) -> Output:
    """The folder of the output. Refuse now any path that would be refused later.

    Raises:
        ValueError, OSError: a mistake that the user can correct.
    """
    given = located(args.output or f"{args.workdir or '.'}/export", "--output")
    if given.suffix == SUFFIX:
        check_writable(given)
        return Output(given, given.with_suffix(".json"), given.with_suffix(".md"))
    if re.fullmatch(r"\.[a-z]+", given.suffix) and not given.is_dir():
        raise ValueError(
            f"--output must be a file that ends in {SUFFIX}, or a folder; got {given}. Rename it."
        )
    check_folder(given, "--output")
    return Output(given / f"model{SUFFIX}", given / "model.json", given / "README.md")


def _facts(args: argparse.Namespace, opened: Alone, program: "Exported") -> Json:
    """The facts about the program, its inputs and its outputs."""
    import jax

    from crate_jax.models.zoo import architecture

    (taken,), (returned,) = program.in_avals, program.out_avals
    source = {"workdir": args.workdir, "step": opened.step} if args.workdir else {}
    source |= {"weights": args.weights, "model": args.model} if args.weights else {}
    facts: Json = {
        "model": architecture(opened.model),
        "source": source,
        "input": {"shape": _shape(taken), "dtype": str(taken.dtype)},
        "output": {"shape": _shape(returned), "dtype": str(returned.dtype)},
    }
    if opened.data is not None:
        facts["preprocessing"] = _preprocessing(opened)
    if opened.class_names:
        facts["classes"] = list(opened.class_names)
    versions: Json = {"crate_jax": VERSION, "jax": jax.__version__}
    versions |= {"calling_convention": program.calling_convention_version}
    return facts | {"platforms": list(program.platforms), "versions": versions}


def _identity(content: bytes, output: Output) -> Json:
    """The file that the facts belong to."""
    digest = hashlib.sha256(content).hexdigest()
    return {"file": output.program.name, "bytes": len(content), "sha256": digest}


def _shape(array: Any) -> list[int | str]:
    """The axes of an array; symbols as text."""
    return [side if isinstance(side, int) else str(side) for side in array.shape]


def _preprocessing(opened: Alone) -> Json:
    """The preprocessing of a picture: before the program, and within it."""
    from crate_jax.data.images.transform_spec import parse_transforms

    model: Any = opened.model
    data: Any = opened.data
    steps = parse_transforms(data.eval_transforms, "data.eval_transforms")
    before = [{"name": step.func.__name__, **step.keywords} for step in steps]
    found: Json = {"image_size": list(model.input_shape[:2]), "before": before}
    if [step["name"] for step in before] == ["resize_shorter", "center_crop"]:
        found["crop_share"] = before[1]["size"] / before[0]["size"]
    return found | {"inside": {"mean": list(data.mean), "std": list(data.std)}}


def _page(output: Output, facts: Json) -> str:
    """The page on the use of the program."""
    taken, returned = facts["input"], facts["output"]
    of_images, classes = "preprocessing" in facts, facts["model"].get("num_classes", 0)
    order = ", RGB" if taken["shape"][-1] == 3 else ""
    ranges = {"uint8": f"pixels in 0 … 255{order}", "float32": f"pixels in [0, 1]{order}"}
    what = "logits" if classes or not of_images else "features"
    return PAGE.format(
        name=output.program.name,
        what=f"a {facts['model']['family']} model with its weights",
        file=output.program.name,
        shape=(2, *taken["shape"][1:]) if of_images else (2, 1),
        dtype=taken["dtype"],
        values=ranges[taken["dtype"]] if of_images else "token ids; texts of any one length",
        outputs=f"{what} ({', '.join(map(str, returned['shape']))})",
        facts=output.facts.name,
        more="how a picture is resized and cut before, and what the outputs mean"
        if of_images
        else "and which versions wrote it",
    )


def _compared(opened: Alone, content: bytes, of_images: bool) -> Json:
    """The difference of the written program's outputs from the model's, on random inputs."""
    import jax
    import numpy as np

    from crate_jax.interop.export import scaled

    program = jax.export.deserialize(bytearray(content))
    platform = placed if (placed := jax.default_backend()) != "gpu" else "cuda"
    if platform not in program.platforms:
        return {"compared": False}
    model, rng, data = opened.model, np.random.default_rng(0), opened.data
    (taken,) = program.in_avals
    if of_images:
        inputs = rng.integers(0, 256, (2, *taken.shape[1:])).astype(taken.dtype)
        inputs = inputs if taken.dtype == np.uint8 else inputs / np.float32(255)
    else:
        sizes: Any = model
        inputs = rng.integers(0, sizes.vocab_size, (2, sizes.context_length)).astype(np.int32)

    def compute(inputs: Any) -> Any:
        images = scaled(inputs, tuple(data.mean), tuple(data.std)) if data is not None else inputs
        return model.apply(opened.variables, images, train=False)

    ours, theirs = (np.asarray(f(inputs)) for f in (jax.jit(compute), program.call))
    difference = float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))
    most = TOLERANCE[np.dtype(model.dtype).name]
    return {"compared": True, "difference": difference, "within_tolerance": difference <= most}
