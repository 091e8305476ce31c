"""Names in files: what holds a state dict, what stands before and within a parameter's name.

One table for all kinds of files. Nothing is stripped from a name that is known as it stands, so
that a model whose own names hold such a part keeps them.
"""

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from crate_jax.interop.layouts import LAYOUTS

_Value = TypeVar("_Value")

# Keys under which training programs put the weights, in the order in which they are taken:
# averaged weights first, as timm takes them and as a run of ours is read.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_params", "ema")
WRAPPERS = (
    *AVERAGES,
    *("state_dict", "model_state_dict", "model", "net", "params", "module"),
    "teacher",  # the average of a student that lies beside it
)

# Parts that PyTorch's wrappers put into names; no model has a part of its own that is called so.
ARTEFACTS = (
    *("module", "_orig_mod", "_module", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
)
# Parts that are names of a model within another one, or of a collection of Flax.
ENCLOSING = (
    *("model", "net", "network", "backbone", "encoder", "params", "state_dict"),
    *("ema", "ema_model", "model_ema", "ema_params", "averaged_model", "student", "teacher"),
)

_ANY_ARTEFACT, _ANY_PART = (
    re.compile(rf"(?<![^./])(?:{'|'.join(parts)})[./]")
    for parts in (ARTEFACTS, ARTEFACTS + ENCLOSING)
)

_CHUNK = re.compile(r"(?<![^./])(blocks\.)\d+\.(?=\d+\.)")

# Groups of entries beside the parameters that are the state of a training run.
TRAINING_STATE = r"(opt|opt_state|optimizer|optimizers|chrono|scheduler|lr_scheduler|scaler)/.*"


class Known:
    """The names that are known: those of all official layouts, and paths of a model's own tree.

    Args:
        own: the paths of the tree of the model that the weights are for.
        collections: that the model has beside its parameters; a path in one begins with its name.
        which: the key of the set of weights that is wanted of several; "": `WRAPPERS` decide.
    """

    def __init__(
        self, own: Collection[str] = (), collections: Collection[str] = (), which: str = ""
    ):
        self.own, self.which = set(own), which
        self.beside = {path for path in own if path.split("/")[0] in collections}
        self.dotted = {path.replace("/", "."): path for path in own}  # a tree flattened with dots

    def __call__(self, name: str) -> bool:
        """True if a name is known as it stands."""
        own = name in self.own or name in self.dotted or (self.own and name.startswith("head/"))
        return bool(own or _official()[0].fullmatch(name))

    def bare(self, name: str) -> str:
        """A name without the parts that wrap it, as far as the result is known.

        An unknown name loses the parts that are PyTorch's alone.
        """
        forms = _forms(name)
        for known in (self, _official()[1].fullmatch):
            for form in forms:
                if known(form):
                    return form
        return forms[1]


@functools.cache
def _official() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the names of all official layouts, and of the entries they leave aside."""
    layouts = [layout for family in LAYOUTS.values() for layout in family]
    names = "|".join(layout.names for layout in layouts)
    aside = "|".join(f"(?:{layout.left_out})" for layout in layouts if layout.left_out)
    return re.compile(names), re.compile(aside)


def _forms(name: str) -> list[str]:
    """A name as it stands; without PyTorch's parts; and without those of enclosing models.

    Of the latter first those in front, one after the other, and then all. Each also without the
    part of the layers, ``blocks.0.1.x``, that DINOv2 puts before a layer's number.
    """
    forms = [name, _ANY_ARTEFACT.sub("", name)]
    rest = name
    while found := _ANY_PART.match(rest):
        rest = rest[found.end() :]
        forms.append(rest)
    forms.append(_ANY_PART.sub("", name))
    return forms + [_CHUNK.sub(r"\1", form) for form in forms if _CHUNK.search(form)]


def bare_names(state: Mapping[str, _Value], path: object, known: Known) -> dict[str, _Value]:
    """The same entries without what wrappers put before and into their names.

    Raises:
        ValueError: two names become the same; both are named.
    """
    bare: dict[str, _Value] = {}
    before: dict[str, str] = {}
    for key, value in state.items():
        name = known.bare(key)
        if name in bare:
            raise ValueError(
                f"{path} must name each parameter once; got {name} twice, as {before[name]} and as "
                f"{key}. Save the one that you mean alone."
            )
        bare[name], before[name] = value, key
    # A part of such names may be official ones; all of them are not.
    if known.dotted and known.dotted.keys() <= bare.keys():
        return {known.dotted.get(name, name): value for name, value in bare.items()}
    return bare


def left_aside(names: Iterable[str]) -> str:
    """Entries in words, counted by the first part of their names."""
    parts = [re.split(r"[/.]", name)[0] for name in names]
    told = ", ".join(f"{part} ({parts.count(part)})" for part in dict.fromkeys(parts))
    return f"left aside {told}"


class Found(NamedTuple):
    """The result of `unwrap`.

    Attributes:
        state: leaves by their names as they stand; those of a tree by path, a/b/c.
        where: the keys that lead to it.
        said: one line for each choice that was made.
        beside: leaves that the model has beside its parameters, as running statistics, by path:
            the name of their collection, then that in it.
    """

    state: dict[str, object]
    where: tuple[str, ...]
    said: list[str]
    beside: dict[str, object]


def unwrap(content: object, path: object, known: Known) -> Found:
    """The weights within what a training program saved, a mapping of mappings.

    Goes down until the names are known. What lies beside them on the way is the state of a training
    run and is left, but for collections that the model has too. Of several sets of weights the
    first of `WRAPPERS` is taken, and that is said.

    Args:
        content: the mapping.
        path: the path of the file, for errors.
        known: the names that are known.

    Raises:
        ValueError: it is no mapping, or holds several sets of weights of which none comes first.
    """
    where: tuple[str, ...] = ()
    said: list[str] = []
    beside: dict[str, object] = {}
    while isinstance(content, Mapping) and not _has_known(content, known, deep=False):
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        order = [key for key in WRAPPERS if inner.get(key)]
        order += [key for key in inner if key not in WRAPPERS]
        sets = [key for key in order if _has_known(inner[key], known, deep=True)]
        if len(sets) > 1 and known.which not in sets and sets[0] not in WRAPPERS:
            raise ValueError(
                f"{path} must hold one set of weights; got {', '.join(map(str, sets))}. "
                "Save the one that you mean alone."
            )
        if known.which in sets:
            sets.insert(0, sets.pop(sets.index(known.which)))
        taken = next(iter(sets or [key for key in order if key in WRAPPERS]), None)
        if taken is None:
            break
        if len(sets) > 1:
            why = "averaged weights, " if taken in (*AVERAGES, "teacher") else ""
            said.append(f"took {taken}, {why}and left aside {', '.join(map(str, sets[1:]))}")
        others = {str(key): tree for key, tree in inner.items() if key != taken}
        beside |= {name: leaf for name, leaf in flat(others) if name in known.beside}
        where, content = (*where, taken), inner[taken]
    if known.which and known.which not in where:
        raise ValueError(no_choice(path, known.which))
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} must hold a state dict, bare or under state_dict, model, net; got "
            f"{type(content).__name__}. Save model.state_dict()."
        )
    return Found(dict(flat(content)), where, said, beside)


def no_choice(path: object, which: str) -> str:
    """The error for a set of weights that is not in the file."""
    return f"{path} must hold weights under {which}; it has none. Leave which out, or name another."


def flat(tree: Mapping, before: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested mappings by path, a/b/c."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


def _has_known(tree: Mapping, known: Known, *, deep: bool) -> bool:
    """True if a parameter is known, less PyTorch's parts; with ``deep``, less all wrappers."""
    names = [name for name, leaf in flat(tree) if is_array(leaf) and name not in known.beside]
    return any(known(form) for name in names for form in _forms(name)[: None if deep else 2])


def is_array(leaf: object) -> bool:
    """True if a leaf is a tensor or an array, or stands for one."""
    return hasattr(leaf, "shape")
