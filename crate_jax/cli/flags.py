"""The flags of a recipe: --config=RECIPE[:VARIANT], and --config.FIELD=VALUE for every field."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import absl.flags

from crate_jax.cli.mistakes import complain, text
from crate_jax.cli.recipes import load_recipe
from crate_jax.config import TrainConfig, get_field, options, renamed
from crate_jax.errors import is_mistake
from crate_jax.models.fields import FAMILIES, fields_of
from crate_jax.options import did_you_mean, rule
from crate_jax.streams import secure_streams

_Parsed = TypeVar("_Parsed")
OF_TRAIN = ("config", "workdir", "flagfile", "verbosity")  # what its help names; absl has more


def define_config_flag(default: str, argv: list[str]) -> absl.flags.FlagHolder:
    """`config_flag` for absl's FLAGS; a mistake ends the process with one line and status 2."""
    return _exit_if_wrong(functools.partial(config_flag, default, argv, absl.flags.FLAGS))


def parse_flags(argv: list[str]) -> list[str]:
    """Parse absl flags, for `absl.app.run`; a mistake ends the process with one line."""

    def parse() -> list[str]:
        rest = _read(absl.flags.FLAGS, argv)
        if len(rest) > 1:
            raise ValueError(f"the command line must hold flags alone; got {rest[1]}. See --help.")
        return rest

    return _exit_if_wrong(parse)


def joined(arguments: list[str]) -> list[str]:
    """A command line in which each --config.FIELD is one word, spelt as in the config.

    ``--config.optim.lr 1e-4`` becomes ``--config.optim.lr=1e-4``, and ``-`` in the name of a field
    ``_``. A switch, such as --config.data.download, stays as it is: it takes no word of its own.
    """
    found: list[str] = []
    waiting = False
    for word in arguments:
        if waiting and not word.startswith("--"):
            found[-1] += f"={word}"
            waiting = False
            continue
        if waiting := word.startswith(("--config.", "--noconfig.")):
            name, separator, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + separator + value
            waiting = not separator and not _is_switch(name)
        found.append(word)
    return found


def _is_switch(name: str) -> bool:
    """True if a flag stands for a field that is True or False, in any model."""
    path = name.replace("-", "_").partition("config.")[2]
    section, _, field = path.partition(".")
    if section == "model":
        return any(field in of and of[field].type is bool for of in map(fields_of, FAMILIES))
    try:
        return isinstance(get_field(TrainConfig(), path), bool)
    except KeyError:  # told where the flags are read
        return False


def parse_config(recipe: str, fields: list[str]) -> TrainConfig:
    """The config of a recipe and of --config.FIELD=VALUE, as train.py takes them.

    Raises:
        ValueError, KeyError, FileNotFoundError: see `config_flag`, or a value cannot be read.
    """
    argv, values = ["plan", f"--config={recipe}", *fields], absl.flags.FlagValues()
    config = config_flag(recipe, argv, values)
    _read(values, argv)
    return config.value


def config_flag(
    default: str, argv: list[str], values: absl.flags.FlagValues
) -> absl.flags.FlagHolder:
    """Define the absl flags --config, and --config.FIELD for the fields that `argv` sets.

    --config.model.name comes first, wherever it stands: the other flags of the model are those of
    its family, and what the recipe says of a model holds where that family has the field.

    Args:
        default: the recipe when `argv` names none.
        argv: the command line, the program's name first.
        values: where to define the flags.

    Returns:
        The holder of --config; once the flags are parsed, its ``value`` is the resolved config.

    Raises:
        FileNotFoundError: there is no such recipe.
        KeyError: there is no such form of the recipe, model or field.
        ValueError: the file is no recipe, or a flag sets a whole section.
    """
    from ml_collections import config_flags

    argv = absl.flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    given = {}
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, separator, value = flag.lstrip("-").removeprefix("no").partition("=")
        if flag.startswith("-") and (name == "config" or name.startswith("config.")):
            given[name] = value if separator else following
    config = load_recipe(given.pop("config", default))
    if model := given.get("config.model.name"):
        config.model = renamed(config.model, model)
    for name in given:
        if dataclasses.is_dataclass(get_field(config, name.removeprefix("config."))):
            raise ValueError(f"{name} must be a field, not a section. Set {name}.FIELD=VALUE.")

    def recipe(path: str) -> TrainConfig:
        return config  # of the same path: argv has it

    holder = config_flags.DEFINE_config_dataclass(
        "config",
        config,
        "Recipe: NAME[:VARIANT] or FILE.py[:VARIANT].",
        flag_values=values,
        sys_argv=argv,
        parse_fn=recipe,
    )
    values["config"].default_as_str = repr(default)  # for --help, which would print all of it
    return holder


def _read(values: absl.flags.FlagValues, argv: list[str]) -> list[str]:
    """Parse a command line by absl, and tell what is wrong with it as every command does.

    Raises:
        ValueError: there is no such flag, or its value cannot be read.
    """
    try:
        return values(argv)
    except absl.flags.UnrecognizedFlagError as error:
        remedy = did_you_mean(f"--{error.flagname}", [f"--{name}" for name in OF_TRAIN])
        raise ValueError(
            f"{argv[0]} must get flags that it has; got --{error.flagname}. {remedy}"
        ) from error
    except absl.flags.Error as error:
        raise ValueError(_illegal(str(error), values, argv)) from error


def _illegal(said: str, values: absl.flags.FlagValues, argv: list[str]) -> str:
    """The words about a value that cannot be read: by the rule of its field, where it has one."""
    found = re.match(r"flag --config\.([\w.]+)=", said)
    given = [word.partition("=")[2] for word in argv if found and found[0][5:] in word]
    config: Any = values["config"].value
    for path, _, field in options(config):
        if found and path == found[1] and given:
            return f"{path} must be {rule(field)}; got {given[-1]}. Correct it."
    return said


def _exit_if_wrong(parse: Callable[[], _Parsed]) -> _Parsed:
    secure_streams()
    try:
        return parse()
    except Exception as error:
        if not isinstance(error, absl.flags.Error) and not is_mistake(error):
            raise
        sys.exit(complain(text(error)))
