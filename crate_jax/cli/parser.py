"""argparse as every command has it: help of one screen, either spelling, mistakes in one line."""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from crate_jax.cli.mistakes import complain
from crate_jax.columns import WIDTH
from crate_jax.options import did_you_mean

_TEXT = 25  # the column where the words about a flag begin
_HELP = ("-h", "--help")


def program() -> str:
    """The name by which this program was called: a module, or the script that pip installs."""
    name = Path(sys.argv[0]).name
    return name if name == "crate_jax" else "python -m crate_jax"


class Parser(argparse.ArgumentParser):
    """A parser whose help fits a screen.

    A flag may be written with ``-`` or ``_`` between its words. The lines of ``epilog`` are
    examples, each without the name of the program.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument as argparse does, with the other spelling of each name."""
        others = [_other_spelling(name) for name in names if str(name).startswith("--")]
        return super().add_argument(*names, *(n for n in others if n not in names), **kwargs)

    def check_flags(self, words: Iterable[str]) -> None:
        """End the process at a word that is a flag, and none of this command's."""
        known = self._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if re.match(r"--?[A-Za-z]", name) and name not in known:
                remedy = _nearest(name, [n for n in known if n.startswith("--")])
                self.error(f"{self.prog} must get flags that it has; got {name}.{remedy}")

    def format_usage(self) -> str:
        """The line that says what must be given."""
        actions = [a for a in self._actions if a.required or not a.option_strings]
        optional = [a for a in self._actions if a not in actions and _shown(a)]
        words = [_invocation(a) if a.required else f"[{_invocation(a)}]" for a in actions]
        words += ["[flags]"] if optional else []
        return f"usage: {' '.join([self.prog, *words])}\n"

    def format_help(self) -> str:
        """Usage, what the command does, a line or two a flag, and the examples."""
        shown = [action for action in self._actions if _shown(action)]
        flags = [beside(_invocation(action), _words(action)) for action in shown]
        described = (self.description or "").rstrip()
        examples = [_example(f"{program()} {e}") for e in (self.epilog or "").splitlines()]
        parts = [
            self.format_usage().rstrip(),
            described if "\n" in described else textwrap.fill(described, WIDTH),
            "\n".join(line for lines in flags for line in lines),
            "\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]),
        ]
        return "\n\n".join(part for part in parts[: 4 if examples else 3] if part) + "\n"

    def error(self, message: str) -> NoReturn:
        """One line for a mistake, and status 2."""
        end = "" if message.endswith((".", "?")) else "."
        sys.exit(complain(f"{message}{end} See {self.prog} --help."))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of a flag's; argparse would list them, and suggest none."""
        if action.choices is not None and value not in action.choices:
            remedy = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}. {remedy}")


class Commands(argparse._SubParsersAction):
    """The commands of a parser, with the line that says what each is for."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.summaries: dict[str, str] = {}

    def add_parser(self, name: str, *, help: str, **kwargs: Any) -> argparse.ArgumentParser:
        """A command; its own help begins with the line, unless it has a description."""
        self.summaries[name] = help
        kwargs.setdefault("description", help[:1].upper() + help[1:] + ".")
        return super().add_parser(name, help=help, **kwargs)

    def overview(self, groups: Mapping[str, Sequence[str]]) -> str:
        """Every command with its line, below the heading of its group."""
        width = max(map(len, self.summaries)) + 4
        found = []
        for heading, names in groups.items():
            lines = [beside(name, self.summaries[name], width) for name in names]
            found.append("\n".join([heading, *(line for each in lines for line in each)]))
        return "\n".join(found)


def indented(text: str, first: str = "  ") -> str:
    """A text in lines of a terminal, the later ones indented."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent="  ")


def _other_spelling(name: str) -> str:
    """--data-dir of --data_dir, and the other way round."""
    bare = name[2:]
    return "--" + (bare.replace("_", "-") if "_" in bare else bare.replace("-", "_"))


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, as a sentence after a space; "" where none is near."""
    found = did_you_mean(name, known)
    return f" {found}" if found.startswith("Did") else ""


def _shown(action: argparse.Action) -> bool:
    return not set(_HELP) & set(action.option_strings) and action.help != argparse.SUPPRESS


def _invocation(action: argparse.Action) -> str:
    """The form of a flag or an argument."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"--[no-]{action.option_strings[0][2:]}"
    value = action.metavar or _kind(action)
    if not action.option_strings:
        return str(value)
    if action.nargs == 0:  # a switch
        return action.option_strings[0]
    return action.option_strings[0] + (f" {value} …" if action.nargs == "+" else f"={value}")


def _kind(action: argparse.Action) -> str:
    """A word for the values of a flag."""
    kinds = {int: "N", float: "X"}
    if action.type in kinds:
        return kinds[action.type]
    if action.option_strings and getattr(action.type, "__name__", "") == "path":
        return "PATH"
    return "WORD" if action.option_strings else action.dest.upper()


def _words(action: argparse.Action) -> str:
    """The help of a flag, with its legal words if they are few and not in it."""
    text, words = action.help or "", [*map(str, action.choices or ())]
    untold = [word for word in words if word not in text]
    if untold and len(" ".join(words)) < WIDTH - _TEXT:
        text += f": {', '.join(words)}"
    return text


def _example(command: str) -> str:
    """A command as one types it, over several lines where one is too short for it."""
    wrapped = textwrap.wrap(
        command,
        WIDTH - 2,
        initial_indent="  ",
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(wrapped)


def beside(left: str, text: str, column: int = _TEXT) -> list[str]:
    """A name, and beside it the text about it."""
    wide = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False, break_long_words=False)
    if len(left) + 2 >= column:
        return [f"  {left}", *(" " * column + line for line in wide)]
    first, *rest = wide or [""]
    return [f"  {left}".ljust(column) + first, *(" " * column + line for line in rest)]
