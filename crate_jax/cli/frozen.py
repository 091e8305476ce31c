"""Shared parts of `knn` and `probe`: features of both splits, of the model and its baselines."""

import argparse
import contextlib
import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_jax.cli.arguments import Subparsers, add_data, add_model, path
from crate_jax.cli.parser import indented
from crate_jax.cli.runs import Opened, add_source, open_trained
from crate_jax.columns import in_columns
from crate_jax.files import Json
from crate_jax.waiting import counted

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.evaluation.features import Features
    from crate_jax.training.run import Run

TRAIN, TEST = "train", "test"
BASELINES = ("pixels", "random")
ACCURACIES = ("top1", "top5")  # ends of the names of what is averaged over seeds
_ANY_LABEL = 2**31 - 1  # of data sets whose labels are numbers
# Fields of data that say which examples there are, and what happens to them.
_DATA = (
    *("dataset", "data_dir", "train_split", "eval_split", "image_key", "label_key"),
    *("eval_transforms", "mean", "std"),
)
# From features of both splits and a seed to numbers by name.
Measure = Callable[["Features", "Features", int], dict[str, float]]
BySeed = Mapping[str, Sequence[float]]  # by the name of a measure


def add_frozen(
    subparsers: Subparsers, name: str, help: str, examples: str
) -> argparse.ArgumentParser:
    """A command on frozen features, with the flags that all of them have."""
    parser = subparsers.add_parser(name, help=help, epilog=examples)
    add_source(parser)
    add_model(parser)
    add_data(parser)
    parser.add_argument(
        "--train_split", metavar="NAME", help="training split; default: the run's, or train"
    )
    parser.add_argument("--task", help="task of the features, with --weights; default: classify")
    parser.add_argument(
        "--features",
        type=path,
        help="a file that keeps features: read if it is there",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        choices=BASELINES,
        metavar="WHAT",
        help="also numbers of: pixels, random (weights)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds to average over; default: 0"
    )
    return parser


def measured(args: argparse.Namespace, measure: Measure) -> Json:
    """A command's answer: means over the seeds, of the model and of each baseline.

    Args:
        args: with the flags of `add_frozen`.
        measure: what is asked of features.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct.
    """
    if args.task and args.workdir:
        raise ValueError("--task must go with --weights; a run knows its own. Leave it out.")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must be >= 0; got {min(args.seeds)}. Choose another.")
    opened = open_trained(args, args.command, task=args.task)
    runs = _with_labels(opened.run, args.train_split)
    data = opened.run.config.data
    found: Json = {
        "dataset": data.dataset,
        "train_split": runs[TRAIN].config.data.eval_split,
        "split": data.eval_split,
        "step": opened.step,
        "fitted": opened.fitted,
        "seeds": args.seeds,
    }
    by_source: dict[str, BySeed] = {}
    for prefix, splits_of in _sources(args, opened, runs):
        what = f"{args.command} {prefix.rstrip('/')}".strip()
        seeds = counted(args.seeds, what, len(args.seeds), "seeds")
        by_seed = [measure(*splits_of(seed), seed) for seed in seeds]
        by_name = {name: [values[name] for values in by_seed] for name in by_seed[0]}
        by_source[prefix.rstrip("/") or "model"] = by_name
        for name, values in by_name.items():
            accuracy = name.endswith(ACCURACIES)
            if accuracy:
                found[prefix + name] = statistics.fmean(values)
            if len(set(values)) > 1 or not accuracy:
                found[f"{prefix}{name}_by_seed"] = values
    sys.stdout.write(table(found, by_source))
    return found


def table(found: Json, by_source: Mapping[str, BySeed]) -> str:
    """A row a measure, a column a source of features: accuracies, and what each classifier chose.

    Args:
        found: the answer of the command; reads its dataset, splits and seeds.
        by_source: of "model" and of each baseline the measures by name.
    """
    heading = f"{found['dataset']}: features of {found['train_split']}, tested on {found['split']}"
    varied = any(
        len(set(values)) > 1 and name.endswith(ACCURACIES)
        for by_name in by_source.values()
        for name, values in by_name.items()
    )
    if varied:
        seeds = " ".join(map(str, found["seeds"]))
        heading += f"; mean ± standard deviation over the seeds {seeds}"
    rows = [("", *by_source)]
    for name in dict.fromkeys(name for by_name in by_source.values() for name in by_name):
        show = _accuracy if name.endswith(ACCURACIES) else _choice
        rows.append((name, *(show(by_name.get(name, [])) for by_name in by_source.values())))
    return "\n".join([indented(heading, first=""), *in_columns(rows)]) + "\n"


def _accuracy(values: Sequence[float]) -> str:
    """The mean of some seeds, and the deviation where they differ."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _choice(values: Sequence[float]) -> str:
    """What a classifier chose with some seeds, such as its penalty; "" if it chose nothing."""
    ends = dict.fromkeys((min(values), max(values))) if values else ()
    return " to ".join(f"{value:.4g}" for value in ends)


def _with_labels(run: "Run", train_split: str | None) -> "dict[str, Run]":
    """The same run with the labelled images of either split, both prepared as for evaluation.

    Whatever a task reads, and however the classes of a model are numbered: a label is the data's.
    """
    # Here, as all libraries that read data.
    from crate_jax.data.images.labelled import open_labelled_images
    from crate_jax.data.stores.sources import check_same_classes

    shape = getattr(run.task.model, "input_shape", None)
    if shape is None:
        raise ValueError(
            "features must be those of images; got a model that takes none, "
            f"{type(run.task.model).__name__}. Choose another run."
        )
    runs, sources = {}, []
    for name in (TRAIN, TEST):
        config = copy.deepcopy(run.config)
        if name == TRAIN:
            config.data.eval_split = train_split or config.data.train_split
        rows = open_labelled_images(
            config.data,
            config.data.eval_split,
            train=False,
            image_shape=shape,
            num_classes=_ANY_LABEL,
        )
        sources.append(rows.source)
        runs[name] = dataclasses.replace(run, config=config, rows={"eval": rows})
    check_same_classes(*sources)
    return runs


def _sources(
    args: argparse.Namespace, opened: Opened, runs: "dict[str, Run]"
) -> "Iterator[tuple[str, Callable[[int], tuple[Features, Features]]]]":
    """The prefix of names of each source of features, and its training and test features."""
    import jax

    from crate_jax.evaluation.features import of_pixels, of_task, renumbered

    task = opened.run.task

    def splits(function: Any, params: Any, extra: Any) -> "tuple[Features, Features]":
        both = (_features(function, params, extra, runs[name]) for name in (TRAIN, TEST))
        return renumbered(*both)

    model = _kept(args, opened, runs, lambda: splits(of_task(task), opened.params, opened.extra))
    yield "", lambda seed: model
    if "pixels" in args.baselines:
        pixels = splits(of_pixels, (), ())
        yield "pixels/", lambda seed: pixels
    if "random" in args.baselines:
        init = jax.jit(task.init)
        yield "random/", lambda seed: splits(of_task(task), *init(jax.random.key(seed)))


def _features(function: Any, params: Any, extra: Any, run: "Run") -> "Features":
    """Features of a run's evaluation split."""
    from crate_jax.evaluation.features import features_of
    from crate_jax.evaluation.sums import watched
    from crate_jax.training.run import evaluation_batches

    with contextlib.closing(evaluation_batches(run)) as batches:
        seen = watched(batches, len(run.rows["eval"]), "features")
        return features_of(function, params, extra, seen, run.mesh)


def _kept(
    args: argparse.Namespace,
    opened: Opened,
    runs: "dict[str, Run]",
    compute: "Callable[[], tuple[Features, Features]]",
) -> "tuple[Features, Features]":
    """The features in the file of --features, or new ones; with the flag they are written there."""
    from crate_jax.evaluation.features import (
        fingerprint,
        load_features,
        save_features,
        weights_fingerprint,
    )

    if not args.features:
        return compute()
    run = opened.run
    facts: Json = {name: getattr(run.config.data, name) for name in _DATA}
    for name, split in runs.items():
        rows = split.rows["eval"]
        listing = getattr(rows, "listing", "")
        facts[name] = [split.config.data.eval_split, len(rows), listing]
    stated = dict(
        weights=weights_fingerprint(run.task, opened.params, opened.extra), data=fingerprint(facts)
    )
    if Path(args.features).exists():
        kept = load_features(args.features, **stated)
        return kept[TRAIN], kept[TEST]
    train, test = compute()
    save_features(args.features, {TRAIN: train, TEST: test}, **stated)
    return train, test
