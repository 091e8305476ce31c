"""The command `segment`: objects and foreground that a model's tokens show, without a decoder."""

import argparse
import json
from typing import TYPE_CHECKING

from crate_jax.cli.alone import open_frozen
from crate_jax.cli.arguments import Subparsers, add_model_kwargs, path
from crate_jax.cli.runs import add_source
from crate_jax.files import Json, located, written_aside
from crate_jax.waiting import counted

if TYPE_CHECKING:  # imported where they are used, with OpenCV
    from crate_jax.data.annotated import Picture

# Flags that only some methods read, with the value that each has unless told otherwise.
OWN = {
    "maskcut": {"objects": 3, "tau": 0.15, "similarity": "cosine", "connected": True},
    "coarse": {"share": 0.6, "share_of": "entries", "definition": "paper"},
    "pca": {"definition": "official_code"},
}


def add_segment(subparsers: Subparsers) -> None:
    """The flags of `segment`."""
    parser = subparsers.add_parser(
        "segment",
        help="masks of objects from tokens: pictures, AP, mIoU",
        epilog="segment --workdir=runs/mine --images=photographs --objects=2\n"
        "segment --workdir=runs/mine --images=VOC2012 --method=coarse",
    )
    add_source(parser)
    parser.add_argument("--model", metavar="NAME", help="a model of the zoo, unless --weights says")
    add_model_kwargs(parser)
    parser.add_argument("--images", type=path, help="a folder of images, or one as VOC's")
    parser.add_argument("--annotations", type=path, help="a JSON file as COCO's; gives AP")
    parser.add_argument("--split", metavar="NAME", help="split of a folder as VOC's; default: val")
    parser.add_argument("--method", choices=tuple(OWN), default="maskcut", help="default: maskcut")
    parser.add_argument("--tap", help="tap of the tokens; default: subspace_tokens")
    parser.add_argument("--layer", type=int, help="layer, 1 … L; default: L, for coarse L − 1")
    parser.add_argument("--head", type=int, help="head, 1 … K; default: all")
    parser.add_argument(
        "--size", type=int, help="pixels of a side for the model; default: about 480"
    )
    parser.add_argument(
        "--positions",
        choices=("right", "official_maps"),
        default="right",
        help="resizing of positions",
    )
    parser.add_argument(
        "--objects", type=int, help="maskcut: largest number of objects; default: 3"
    )
    parser.add_argument(
        "--tau", type=float, help="maskcut: least similarity of an edge; default: 0.15"
    )
    parser.add_argument("--similarity", choices=("cosine", "product"), help="maskcut")
    parser.add_argument(
        "--connected",
        action=argparse.BooleanOptionalAction,
        help="maskcut: an object is one connected piece (the default)",
    )
    parser.add_argument("--share", type=float, help="coarse: share of a map; default: 0.6")
    parser.add_argument("--share_of", choices=("entries", "mass"), help="coarse")
    parser.add_argument(
        "--definition",
        choices=("paper", "official_code"),
        help="definition of coarse's map or pca's foreground",
    )
    parser.add_argument("--limit", type=int, help="number of images, from the first; default: all")
    parser.add_argument("--pictures", type=int, default=20, help="number of pictures; default: 20")
    parser.add_argument(
        "--output", type=path, help="a folder; default: WORKDIR/segmentation, or here"
    )
    parser.set_defaults(function=segment)


def segment(args: argparse.Namespace) -> Json:
    """Masks of images as COCO's results and as pictures; AP by annotations, mIoU by VOC's masks."""
    from crate_jax.analysis.coarse_masks import mean_iou
    from crate_jax.cli.segmenting import (
        Reader,
        check_pictures,
        found_in,
        results_of,
        write_picture,
    )
    from crate_jax.evaluation.average_precision import (
        average_precision,
        require_objects,
        require_pycocotools,
    )

    how = _own_flags(args)
    pictures, annotations = _pictures(args)
    numbers = {each.number for each in pictures}
    if annotations is not None:
        require_pycocotools()
        require_objects(annotations, numbers)
    frozen = open_frozen(args, "segment")
    reader = Reader(frozen, args)
    check_pictures(pictures, reader)
    output = located(args.output or f"{args.workdir or '.'}/segmentation", "--output")
    output.mkdir(parents=True, exist_ok=True)
    results: list[Json] = []
    fits: list[dict[int, float]] = []
    each = found_in(args.method, pictures, reader, how)
    for place, found in enumerate(counted(each, "segment", len(pictures), "images")):
        rows, fit = results_of(found, reader.grid)
        results += rows
        fits += [fit] if fit is not None else []
        if place < args.pictures:
            write_picture(output, found, reader.grid)
    with written_aside(output / "results.json") as aside:
        aside.write_text(json.dumps(results))
    scores: Json = {}
    if annotations is not None:
        scores = average_precision(annotations, results, numbers)
    if fits:
        scores["miou"] = mean_iou(fits)
    made = {"images": len(pictures), "masks": len(results), "output": str(output)}
    inputs = {"method": args.method, "step": frozen.step, "tap": reader.tap, "layer": reader.layer}
    return inputs | how | made | {name: round(value, 4) for name, value in scores.items()}


def _own_flags(args: argparse.Namespace) -> Json:
    """The flags that the method reads; one that nothing reads, or that cannot be, is refused."""
    from crate_jax.analysis.coarse_masks import check_share
    from crate_jax.analysis.maskcut import check_choices

    for name, least in (("limit", 1), ("pictures", 0), ("size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(
                f"--{name} must be at least {least}; got {value}. Leave it out for the default."
            )
    own = OWN[args.method]
    for name in {name for flags in OWN.values() for name in flags} - {*own}:
        if getattr(args, name) is not None:
            whose = [method for method, flags in OWN.items() if name in flags]
            raise ValueError(
                f"--{name} must go with --method {' or '.join(whose)}; got {args.method}. "
                "Leave it out."
            )
    given = {name: getattr(args, name) for name in own}
    how = {name: own[name] if value is None else value for name, value in given.items()}
    if args.method == "maskcut":
        check_choices(how["objects"], how["tau"], how["similarity"])
    if args.method == "coarse":
        check_share(how["share"])
    if args.tap == "attention" and how.pop("definition", None) and args.definition:
        raise ValueError(
            f"--definition must go with --tap subspace_tokens; got {args.definition} with "
            "attention, which the model has computed by its own. Leave one out."
        )
    return how


def _pictures(args: argparse.Namespace) -> "tuple[list[Picture], Json | None]":
    """The images, and the annotations if there are any."""
    from crate_jax.data.annotated import folder_pictures, is_voc, voc_pictures
    from crate_jax.data.coco import coco_pictures

    if not args.images:
        raise ValueError("segment must get --images, a folder. See --help.")
    voc, annotations = is_voc(args.images), None
    if args.split is not None and args.annotations:
        raise ValueError(
            f"--split must go without --annotations, which list the images; got {args.split}. "
            "Leave one out."
        )
    if args.split is not None and not voc:
        raise ValueError(
            f"--split must go with a folder as VOC's; {args.images} is none. Leave it out."
        )
    if args.annotations:
        pictures, annotations = coco_pictures(args.annotations, args.images)
    elif voc:
        pictures = voc_pictures(args.images, "val" if args.split is None else args.split)
    else:
        pictures = folder_pictures(args.images)
    return pictures[: args.limit], annotations
