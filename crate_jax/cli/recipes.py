"""Recipes by name, which come with the package, or by file: NAME[:VARIANT], FILE.py[:VARIANT]."""

import difflib
import runpy
from pathlib import Path

from crate_jax.config import TrainConfig
from crate_jax.files import expanded

DEFAULT = "digits"
# Inside the installed package; in a clone, beside it.
_FOLDERS = [Path(__file__).parents[n] / "configs" for n in (1, 2)]


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.py"))} if folder else {}


def load_recipe(recipe: str) -> TrainConfig:
    """The config of a recipe, or of one of its variants.

    Args:
        recipe: the name of a recipe of the package, such as ``imagenet1k``, or a file; and a
            variant, ``imagenet1k:small``.

    Raises:
        FileNotFoundError: there is no such recipe; the nearest is suggested.
        KeyError: there is no such variant.
        ValueError: the file is no recipe.
    """
    name, separator, variant = recipe.partition(":")
    file = recipes().get(name) or Path(expanded(name, "--config"))
    if not file.is_file():
        raise _unknown(name)
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
    except SyntaxError as error:
        if error.filename not in (str(file), None):  # of an import of the recipe, and None: no text
            raise
        raise ValueError(f"--config must be a recipe; {file} is none ({error}).") from error
    if get_config is None:
        raise ValueError(f"--config must be a recipe; {file} is none: it has no get_config.")
    return get_config(variant) if separator else get_config()


def _unknown(name: str) -> FileNotFoundError:
    """The error of a recipe that is not there."""
    names, folder = list(recipes()), Path(name).parent
    files = [str(folder / path.name) for path in sorted(folder.glob("*.py"))]
    is_path = name.endswith(".py") or len(Path(name).parts) > 1
    candidates = [*files, *names] if is_path else [*names, *files]
    kind = "a file that exists" if is_path else "a known recipe"
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.52)
    suggestion = f"Did you mean {near[0]}? " if near else ""
    return FileNotFoundError(
        f"--config must be {kind}; got {name}. {suggestion}Known by name: {', '.join(names)}."
    )
