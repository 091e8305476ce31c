"""A small run of every objective, for what must hold for all of them."""

import sys

from command import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where faults are injected into the same runs

import fault_injection

from crate_jax.cli.flags import parse_config

# By task: a recipe that trains it offline.
RECIPES = {"classify": "digits", "masked_autoencoding": "digits:mae"}
RECIPES |= {"mcr2": "digits:mcr2", "simdino": "digits:simdino", "next_token": "text"}


def small(task, **fields):
    """The config of a small run of a task, with other fields by dotted path, dots as ``__``."""
    recipe = RECIPES[task]
    changed = [f"--config.{path.replace('__', '.')}={value}" for path, value in fields.items()]
    given = [flag for flag in fault_injection.flags_of(recipe)[1:] if not _is_of(flag, changed)]
    return parse_config(recipe, [*given, *changed])


def _is_of(flag, flags):
    return any(flag.partition("=")[0] == other.partition("=")[0] for other in flags)
