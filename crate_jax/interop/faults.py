"""Describe the fault of weights in one line: every entry, the model they belong to, the remedy."""

import functools
import re
from collections.abc import Iterable

from crate_jax.interop.layouts.layout import Shapes
from crate_jax.interop.tree import LAYER_SIZES, sizes, tree_of
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import VARIANTS, create_model

_FITS = {"num_classes": "head", "positions": "image_size", "pixels of a patch": "patch_size"}


def faults(got: Shapes, expected: Shapes, *, shapes: bool = True) -> str:
    """Every entry that is missing, unknown or (with ``shapes``) ill-shaped; "" if none is."""
    both = [k for k in expected if k in got and got[k] != expected[k]]
    found = {
        "missing": [k for k in expected if k not in got],
        "unknown": [k for k in got if k not in expected],
        "of another shape": [f"{k} {got[k]} instead of {expected[k]}" for k in both if shapes],
    }
    return "; ".join(f"{kind}: {_joined(names)}" for kind, names in found.items() if names)


def _joined(names: Iterable[str]) -> str:
    """Names in a row; those that differ by a number alone as one: layers.{3-5,7}.x."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = re.fullmatch(r"(\D*?[._])(\d+)([./].*)", name)
        key = (parts[1], parts[3]) if parts else (name, "")
        numbers.setdefault(key, []).extend([int(parts[2])] if parts else [])
    return ", ".join(before + _ranges(n) + after for (before, after), n in numbers.items())


def _ranges(numbers: list[int]) -> str:
    """3, or {3-5,7}; nothing for no number."""
    ends = zip(
        sorted(n for n in numbers if n - 1 not in numbers),
        sorted(n for n in numbers if n + 1 not in numbers),
        strict=True,
    )
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)
    return text if len(numbers) < 2 else "{" + text + "}"


def mismatch(shapes: Shapes, model: BlockModel) -> tuple[str, str]:
    """By sizes alone: how a flat tree of ours is not the model's ("": it is), and what to do."""
    found, wanted = sizes(shapes), sizes(tree_of(model).shapes)
    wrong = [name for name, size in found.items() if size != wanted.get(name)]
    remedy = "Build the model with the sizes of these weights."
    if not wanted:  # a model of other names, of which no size is known
        return "", remedy
    if not found:
        return f"it holds no weights of a {type(model).__name__}", remedy
    if not wrong and "num_classes" in wanted and "num_classes" not in found:
        return "these weights have no head", "Build it with num_classes=0, or ask to fit: head."
    if not wrong:
        return "", remedy
    if set(wrong) <= set(_FITS):
        fits = [_FITS[name] for name in _FITS if name in wrong]
        fits += ["in_channels"] if "patch_size" in fits else []
        remedy = f"Build the model with these sizes, or ask to fit: {', '.join(fits)}."
    patch, layers = "pixels of a patch", {n: found[n] for n in LAYER_SIZES if n in found}
    named = {n: s for n, s in _named_sizes(type(model)).items() if layers.items() <= s.items()}
    names = [n for n, s in named.items() if s.get(patch) == found.get(patch)] or list(named)
    whose = f"these weights are {' or '.join(names)}'s" if names else "these weights differ"
    pairs = (f"{name} {found[name]} where the model has {wanted.get(name)}" for name in wrong)
    return f"{whose}: {', '.join(pairs)}", remedy


@functools.cache
def _named_sizes(kind: type) -> dict[str, dict[str, int]]:
    """The sizes of every named model of a class."""
    models = {name: create_model(name) for name in VARIANTS}
    return {name: sizes(tree_of(m).shapes) for name, m in models.items() if type(m) is kind}
