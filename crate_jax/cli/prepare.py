"""`prepare`: a data set in the format that is read fastest."""

import argparse

from crate_jax.cli.arguments import Subparsers, path
from crate_jax.files import Json


def add_prepare(subparsers: Subparsers) -> None:
    """The flags of `prepare`."""
    parser = subparsers.add_parser(
        "prepare",
        help="a folder or tar files as a data set that reads fastest",
        epilog="prepare --from=/data/pets --to=/data/prepared --name=pets\n"
        "prepare --from=/data/imagenet_tars --to=/data/prepared",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=path,
        required=True,
        help="a folder that has a folder or a tar file for each split",
    )
    parser.add_argument(
        "--to",
        dest="target",
        type=path,
        required=True,
        help="the new data.data_dir; may be half done",
    )
    parser.add_argument(
        "--name", help="what data.dataset will be, NAME or NAME:VERSION; ImageNet's own has one"
    )
    parser.set_defaults(function=prepare)


def prepare(args: argparse.Namespace) -> Json:
    """A folder or tar files as a TFDS data set of array_record files."""
    from crate_jax.data.stores.prepare import prepare

    return prepare(args.source, args.target, name=args.name)
