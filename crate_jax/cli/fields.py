"""`config`: the fields of a recipe, with their values, their meaning, and what is legal."""

import argparse
import dataclasses
import shlex
import sys
import textwrap

from crate_jax.cli.arguments import Subparsers
from crate_jax.cli.flags import parse_config
from crate_jax.cli.recipes import DEFAULT
from crate_jax.columns import WIDTH
from crate_jax.config import TrainConfig, options, to_dict, validate
from crate_jax.files import Json
from crate_jax.options import did_you_mean, option_of, rule

RUN = "run"  # the section of the fields that stand in none


def add_config(subparsers: Subparsers) -> None:
    """The flags of `config`; the fields of the recipe are left to `parse_config`."""
    parser = subparsers.add_parser(
        "config",
        help="the fields of a recipe: value, meaning, legal values",
        epilog="config digits --section=optim\n"
        "config imagenet1k:small --config.optim.lr=1e-4 --json",
    )
    parser.add_argument("recipe", nargs="?", help="NAME[:VARIANT] or FILE.py[:VARIANT]")
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"the recipe, as a flag; default: {DEFAULT}"
    )
    parser.add_argument(
        "--section", help="these fields alone, such as optim; run: those in no section"
    )
    parser.add_argument("--json", action="store_true", help="all values as one line of JSON")
    parser.set_defaults(function=config)


def config(args: argparse.Namespace) -> Json:
    """A line of value, and below it meaning and legal values, of every field.

    Raises:
        ValueError, KeyError, FileNotFoundError: there is no such recipe or section, or a value is
            not legal.
    """
    if args.recipe and args.config:
        raise ValueError("config must get one recipe; got two. Leave --config out.")
    if args.section and args.json:
        raise ValueError("--json must go without --section, as it has all. Leave one out.")
    recipe = args.recipe or args.config or DEFAULT
    found = validate(parse_config(recipe, args.config_flags))
    if args.json:
        return to_dict(found)
    lines = listed(found, args.section)
    sys.stdout.write("".join(lines))
    return {"recipe": recipe, "name": found.name, "fields": len(lines)}


def listed(config: TrainConfig, section: str | None = None) -> list[str]:
    """The text about every field, each as the flag that sets it, as a shell takes it.

    Args:
        config: with the values.
        section: whose fields; None: all.

    Raises:
        KeyError: there is no such section.
    """
    sections = [
        field.name
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    ]
    if section not in (None, RUN, *sections):
        raise KeyError(
            f"--section must be a section; got {section}. "
            + did_you_mean(section, [RUN, *sections])
        )
    found = []
    for path, owner, field in options(config):
        place, _, _ = path.rpartition(".")
        if section not in (None, place or RUN):
            continue
        value = getattr(owner, field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        told = textwrap.fill(
            f"{option_of(field).help}; {rule(field)}",
            WIDTH,
            initial_indent=" " * 4,
            subsequent_indent=" " * 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
        flag = shlex.quote(f"--config.{path}={text}")
        found.append(f"{flag if value is not None else f'--config.{path} (unset)'}\n{told}\n")
    return found
