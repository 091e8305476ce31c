"""A model's parameters under official names and back; which layout a set of names is in.

PyTorch is not needed: state dicts are NumPy arrays by name.
"""

from collections.abc import Collection, Mapping

import numpy as np

from crate_jax.interop.faults import faults
from crate_jax.interop.fit import FITS
from crate_jax.interop.layouts import LAYOUTS
from crate_jax.interop.layouts.layout import Layout
from crate_jax.interop.layouts.own import own_paths
from crate_jax.interop.tree import flatten, nest, tree_of
from crate_jax.models.parameters import Params
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import family_of, has_family

_REMEDY = "Build the model with the sizes of these weights."


def layouts_of(model: BlockModel) -> tuple[Layout, ...]:
    """The official layouts of a model's family; of a model of no family none."""
    return LAYOUTS.get(family_of(model), ()) if has_family(model) else ()


def find_layout(model: BlockModel, name: str | None = None, *, torch: bool = False) -> Layout:
    """An official layout of a model's family: the one named, or else the first that it agrees with.

    Args:
        model: whose family counts.
        name: of the layout.
        torch: look among those that PyTorch files have.

    Raises:
        ValueError: the family has none, or none of that name, or it contradicts the model.
    """
    known = [x for x in layouts_of(model) if x.in_torch or not torch]
    for layout in known:
        if name == layout.name:
            check_implied(layout, model, "Choose another layout, or none.")
        if name == layout.name or (name is None and _agree(layout, model)):
            return layout
    if known and name is None:
        check_implied(known[0], model, "Use .safetensors, which states the model.")
    of = f"{type(model).__name__}{' in PyTorch files' if torch else ''}"
    if not known:
        raise ValueError(f"{of} must have an official layout; it has none. Use .safetensors.")
    names = ", ".join(layout.name for layout in known)
    raise ValueError(f"layout must be one of {names} for {of}; got {name}. Choose one of these.")


def _agree(layout: Layout, model: BlockModel) -> bool:
    """True if the model's fields have the values that the layout implies."""
    return all(getattr(model, field) in told.values for field, told in layout.implies.items())


def check_implied(
    layout: Layout, model: BlockModel, remedy: str, fit: Collection[str] = ()
) -> list[str]:
    """Refuse a model whose fields are not what the layout's names imply.

    Args:
        layout: the layout of the weights.
        model: that they are for.
        remedy: the end of the error, with ``{field}`` in it, and perhaps ``{or_fit}``.
        fit: fields that may differ.

    Returns:
        One line for each field in ``fit`` that differs.

    Raises:
        ValueError: another field differs.
    """
    report = []
    for field, (sign, values) in layout.implies.items():
        ours, theirs = getattr(model, field), " or ".join(map(str, values))
        if ours in values:
            continue
        if field not in fit:
            or_fit = f", or ask to fit: {field}" if field in FITS else ""
            raise ValueError(
                f"model.{field} must be {theirs} for weights with {sign}; got {ours}. "
                + remedy.format(field=field, or_fit=or_fit)
            )
        report.append(f"{field}: {ours}, where weights with {sign} have {theirs}")
    return report


def recognise(names: Collection[str], model: BlockModel) -> Layout:
    """The layout that most of the names belong to: our own paths, or one of the model's family.

    Names that belong to none are taken for our own if they are paths, else for official ones.
    """
    own, official = own_paths(tree_of(model).shapes), layouts_of(model)
    candidates = (own, *official) if any("/" in n for n in names) else (*official, own)
    return max(candidates, key=lambda layout: layout.recognised(names))


def foreign_family(names: Collection[str], model: BlockModel) -> str:
    """Another family that more of the names belong to than to the model's; "" if none is."""
    best, found = recognise(names, model).recognised(names), ""
    for family, layouts in LAYOUTS.items():
        count = max(layout.recognised(names) for layout in layouts)
        best, found = (count, family) if count > max(best, len(names) / 2) else (best, found)
    return found


def from_state_dict(
    state: Mapping[str, np.ndarray], model: BlockModel, *, skip: Collection[str] = ()
) -> Params:
    """The parameters of a model from an official state dict.

    Args:
        state: arrays of any float dtype by official name, without wrappers and prefixes, in any
            layout of the model's family.
        model: the model they are for.
        skip: top-level groups of the parameter tree to leave out, such as ``head``.

    Returns:
        The parameter tree without what was skipped, float32 NumPy arrays. Of a model with running
        statistics its variables, {"params": …, "batch_stats": …}.

    Raises:
        ValueError: entries are missing, unknown or of another shape; every one is named. Or their
            names imply another value of one of the model's fields.
    """
    layout, tree = recognise(state, model), tree_of(model)
    state = layout.parameters(state, tree)
    dropped = {*layout.in_groups(state, skip), *layout.set_aside(state)}
    state = {name: array for name, array in state.items() if name not in dropped}
    expected = {name: entry.official for name, entry in layout.entries(tree, skip).items()}
    wrong = faults({name: tuple(np.shape(array)) for name, array in state.items()}, expected)
    if wrong:
        raise ValueError(f"state must hold the model's parameters alone; got {wrong}. {_REMEDY}")
    check_implied(layout, model, "Set model.{field}.")
    params, extra = nest(layout.to_ours(state, tree, skip), tree)
    return {"params": params, **extra} if extra else params


def to_state_dict(
    params: Params, model: BlockModel, *, layout: str | None = None
) -> dict[str, np.ndarray]:
    """The official state dict of a model's parameters, or of anything shaped like them.

    Args:
        params: the parameter tree, a gradient, or an average; or the variables, with which the
            running statistics are written too. Arrays of any kind.
        model: the model they belong to.
        layout: name of the layout; None: the first of the model's family
            that agrees with it.

    Returns:
        New contiguous NumPy arrays by official name, of the dtypes of ``params``.

    Raises:
        ValueError: leaves are missing, unknown or of another shape (every one is named); or the
            layout is not known or has no place for one.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tree = tree_of(model)
    if "params" not in params:
        tree = tree.of_parameters
    wrong = faults({path: array.shape for path, array in arrays.items()}, tree.shapes)
    if wrong:
        raise ValueError(f"params must hold the model's parameters alone; got {wrong}. {_REMEDY}")
    return find_layout(model, layout).to_official(arrays, tree)
