"""The declaration of a config field in one place: default, comment, legal values, and its part."""

import dataclasses
import difflib
import math
import numbers
import operator
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_SIGNS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    tuple[int, ...]: "whole numbers",
    tuple[float, ...]: "numbers",
    tuple[str, ...]: "names",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """The rules of a field, besides its name, type and default.

    Attributes:
        help: the comment: meaning and unit.
        low: the smallest legal number, of a number or of every number in a tuple.
        above: a number below all legal ones.
        high: the largest legal number.
        below: a number above all legal ones.
        choices: the legal words; (): any.
        lengths: how many entries a tuple may have; (): any number.
        identity: whether another value makes a run another run.
        how: whether a model's field says only how it computes, and not what.
        path: whether it is a path: `crate_jax.config.validate` puts the home directory for ~.
    """

    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    identity: bool = False
    how: bool = False
    path: bool = False

    @property
    def bounds(self) -> list[tuple[str, float]]:
        """Signs and numbers, such as (">=", 0) and ("<", 1)."""
        limits = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        return [(sign, number) for sign, number in limits.items() if number is not None]

    @property
    def range(self) -> str:
        """The bounds in words, such as ">= 0 and < 1"; "" if there are none."""
        return " and ".join(f"{sign} {number}" for sign, number in self.bounds)


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of plain values.

    Args:
        default: its default, or `...` if it has none.
        help: its comment: meaning and unit.
        **rules: attributes of `Option`. A field with ``how`` is keyword-only.
    """
    given = {} if default is ... else {"default": default}
    told = Option(help=help, **rules)
    return dataclasses.field(**given, metadata={"option": told}, kw_only=told.how)


def option_of(field: dataclasses.Field) -> Option:
    """The option that a field declared."""
    return field.metadata["option"]


def rule(field: dataclasses.Field) -> str:
    """The legal values of a field in words, such as "a whole number >= 1"."""
    told = option_of(field)
    if told.choices:
        return f"one of {', '.join(told.choices)}"
    kind = [each for each in _members(field.type) if each is not types.NoneType][-1]
    return " ".join(filter(None, (" or ".join(map(str, told.lengths)), _KINDS[kind], told.range)))


def check(path: str, field: dataclasses.Field, value: Any, remedy: str) -> None:
    """Refuse a value that is not of the field's type, or not among its legal values.

    Args:
        path: dotted name of the field in the error.
        field: declared by `option`.
        value: what it is to be; None is legal where the type says so.
        remedy: the sentence that ends the error.

    Raises:
        ValueError: the value breaks the rule of the field.
    """
    told, several = option_of(field), isinstance(value, tuple | list)
    good, unset = is_of(value, field.type), value is None
    if told.choices and not (good and unset):
        if (word := _word(value)) not in told.choices:
            remedy = did_you_mean(str(word), told.choices)
            raise ValueError(f"{path} must be {rule(field)}; got {word}. {remedy}")
    elif not good or (several and told.lengths and len(value) not in told.lengths):
        raise ValueError(f"{path} must be {rule(field)}; got {value!r}. {remedy}")
    elif told.bounds and not unset:
        for number in value if several else (value,):
            inside = all(_SIGNS[sign](number, bound) for sign, bound in told.bounds)
            if not (inside and math.isfinite(number)):
                raise ValueError(f"{path} must be {told.range}; got {value}. {remedy}")


def is_legal(field: dataclasses.Field, value: object) -> bool:
    """True if `check` lets a value pass."""
    try:
        check(field.name, field, value, "")
    except ValueError:
        return False
    return True


def is_of(value: object, kind: Any) -> bool:
    """True if a value is of an annotated type; a list may stand for a tuple, as in JSON."""
    members = _members(kind)
    if len(members) > 1:
        return any(is_of(value, each) for each in members)
    if typing.get_origin(kind) is tuple:
        entry = typing.get_args(kind)[0]
        return isinstance(value, tuple | list) and all(is_of(each, entry) for each in value)
    if kind in (int, float):  # NumPy's too, but not True
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.52)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."


def listed(names: Iterable[object], most: int = 6) -> str:
    """Names in one line: all if they are few, else the first ones and their number."""
    words = [str(name) for name in names]
    rest = f", … ({len(words)} in all)" if len(words) > most else ""
    return ", ".join(words[:most]) + rest


def difference(old: Sequence[object], new: Sequence[object]) -> str:
    """The difference of a list of names to an older one, in words; "" if they are equal."""
    before, after = set(old), set(new)
    lost, more = [n for n in old if n not in after], [n for n in new if n not in before]
    if lost or more:
        parts = [f"without {listed(lost)}" if lost else "", f"with {listed(more)}" if more else ""]
        return ", ".join(filter(None, parts))
    moved = [(was, now) for was, now in zip(old, new, strict=False) if was != now]
    if not moved:
        return "" if len(old) == len(new) else f"{len(new)} names in place of {len(old)}"
    was, now = (listed(names) for names in zip(*moved, strict=True))
    return f"in the order {now}, where it was {was}"


def unknown(path: str, part: str, known: Iterable[str], owner: str = "") -> KeyError:
    """The error for a dotted path with a part that names no field."""
    whose = f" of {owner}" if owner else ""
    return KeyError(f"{path} must name a field{whose}. {did_you_mean(part, known)}")


def _word(value: object) -> object:
    """A value as choices are written: a dtype may stand as its class, or as NumPy's object."""
    if isinstance(value, np.dtype):
        return value.name
    return value.__name__ if isinstance(value, type) else value


def _members(kind: object) -> tuple[Any, ...]:
    """The types of which an annotation allows any."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)
