"""Weights from files and runs into the parameters of a model."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from crate_jax.files import Json
from crate_jax.interop.addresses import fetched
from crate_jax.interop.contents import NO_TREE, Contents, read_contents
from crate_jax.interop.convert import check_implied, foreign_family, recognise
from crate_jax.interop.faults import faults, mismatch
from crate_jax.interop.fit import fit_params, source_model
from crate_jax.interop.floats import as_float32, check_finite, is_float
from crate_jax.interop.layouts.forms import Shape
from crate_jax.interop.layouts.layout import Layout
from crate_jax.interop.names import left_aside
from crate_jax.interop.stated import check_told, lacking, optional, told_by_name
from crate_jax.interop.tree import FIRST_STAGE, PROJECTION, nest, sizes, tree_of
from crate_jax.models.parameters import Params, Variables
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import architecture, from_architecture
from crate_jax.options import difference, listed
from crate_jax.tasks.task import CLASSES


def load_weights(
    path: str | Path,
    model: BlockModel,
    *,
    fit: Collection[str] = (),
    method: str = "right",
    key: jax.Array | None = None,
    which: str = "",
) -> Params:
    """Read a model's parameters from a file or from a training run.

    Nothing in a file can run code. Every entry of it is used or named in an error, and so is every
    parameter that none fills. What is known to be no weights is left aside, and the log says so: an
    optimizer's state, the text tower of CLIPA.

    Args:
        path: a PyTorch, safetensors, ``.npz`` or msgpack file, recognised by its content, with
            official names in any layout of the model's family (`crate_jax.interop.layouts`) under
            any of the usual wrappers and prefixes (`crate_jax.interop.names`), or with the paths of
            our tree; a folder with such a file or its pieces (`crate_jax.interop.folders`); a tree
            that Orbax wrote; or the folder of a run (its newest checkpoint), or of one of its
            steps, ``RUN/checkpoints/STEP``. Averaged weights are taken before others. Addresses
            ``hf://OWNER/REPOSITORY[/PATH][@REVISION]`` and ``https://…`` are fetched once
            (`crate_jax.interop.download`); ``gs://…`` and ``s3://…`` are read.
        model: the model that the weights are for.
        fit: what may differ between the two and is made to fit, one name or several: ``head``
            (always a new one), ``image_size`` (positions resized), ``patch_size`` and
            ``in_channels`` (the projection of the patches resized, summed or repeated), and
            ``pool``, ``eta``, ``lmbda`` where the file, or its names, state others (the model's are
            used). Each change is logged at INFO; see `crate_jax.interop.fit.fit_params`.
        method: how positions and patches are resized: "right", "crate_alpha" or "official_maps",
            which resamples positions of the same grid too and so needs ``image_size`` in ``fit``.
        key: the key of a new head; None: ``jax.random.key(0)``.
        which: key of the weights where a file has several sets, such as "student"; "": the first
            of `crate_jax.interop.names.WRAPPERS`, and so the teacher of a student.

    Returns:
        The parameter tree, float32 arrays on the host: ``model.apply({"params": params}, …)``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        OSError: the network cannot be reached, or the cache cannot be written.
        ValueError: the kind of file is not known, the file is damaged or would run code, PyTorch is
            missing, the weights are not those of the model (each missing, unknown or ill-shaped
            entry is named, and whose weights they are), their names imply another value of one of
            its fields, or one is not finite. Or the model has running statistics too.
    """
    if others := tree_of(model).collections:
        raise ValueError(
            f"model must have parameters alone for load_weights; this {type(model).__name__} has "
            f"{', '.join(others)} too. Call load_variables."
        )
    return load_variables(path, model, fit=fit, method=method, key=key, which=which)["params"]


def load_variables(
    path: str | Path,
    model: BlockModel,
    *,
    fit: Collection[str] = (),
    method: str = "right",
    key: jax.Array | None = None,
    which: str = "",
) -> Variables:
    """`load_weights` for any model: its parameters, and its running statistics if it has any.

    Args:
        path: see `load_weights`.
        model: see `load_weights`.
        fit: see `load_weights`.
        method: see `load_weights`.
        key: see `load_weights`.
        which: see `load_weights`.

    Returns:
        What ``model.apply`` takes: {"params": …}, and by the name of their collection the others,
        such as "batch_stats".

    Raises:
        FileNotFoundError, ValueError: see `load_weights`.
    """
    loaded = load_fitted(path, model, fit=fit, method=method, key=key, which=which)
    for line in loaded.report:
        logging.getLogger("crate_jax").info("%s: %s", path, line)
    return {"params": loaded.params, **loaded.extra}


class Loaded(NamedTuple):
    """The result of `load_fitted`.

    Attributes:
        params: the parameter tree.
        model: the model they are for.
        report: what was left aside and what had to be fitted, one line each.
        class_names: in the order of the outputs; () where the file names none, or the head is new.
        extra: the model's other collections by name, such as running statistics; {} if it has none.
    """

    params: Params
    model: BlockModel
    report: list[str]
    class_names: tuple[str, ...]
    extra: Params


def load_fitted(
    path: str | Path,
    model: BlockModel | None,
    *,
    fit: Collection[str] = (),
    method: str = "right",
    key: jax.Array | None = None,
    facts: Json | None = None,
    which: str = "",
) -> Loaded:
    """`load_weights` for a program that reports; without a model, the one that the file states.

    Args:
        path: see `load_weights`.
        model: see `load_weights`.
        fit: see `load_weights`.
        method: see `load_weights`.
        key: see `load_weights`.
        facts: the facts of the data that the model is for, see `crate_jax.tasks.task.Task.facts`. A
            head that is kept must be one for its classes.
        which: see `load_weights`.

    Raises:
        ValueError: also where there is no model, and the file states none; or where the file names
            the classes of a head that is kept, and the facts name others.
    """
    path, fit = fetched(path), (fit,) if isinstance(fit, str) else fit
    if method == "official_maps" and "image_size" not in fit:
        raise ValueError(
            "fit must have image_size for the method official_maps, which resizes positions; got "
            f"{', '.join(fit) or 'nothing'}. Ask to fit image_size."
        )
    contents = read_contents(path, tree_of(model) if model else NO_TREE, which)
    lacks = lacking(model)
    new_head = "head" in fit or "num_classes" in lacks
    class_names = () if new_head else contents.class_names
    _check_classes(path, class_names, (facts or {}).get(CLASSES, ()))
    if model is None:
        if not contents.fields:
            raise ValueError(f"{path} must state its model; it does not. Name the model.")
        model = from_architecture(contents.fields)
        lacks = lacking(model)
    layout = recognise(contents.arrays, model)
    other_grid = layout.of_other_grids(contents.arrays, tree_of(model))
    if other_grid and "image_size" not in fit:
        raise ValueError(
            f"{path} must be weights for the model's image size; {', '.join(other_grid)} tells of "
            "another. Set model.position_size to that, or ask to fit image_size: new positions."
        )
    try:
        arrays = layout.parameters(contents.arrays, tree_of(model))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    contents = contents._replace(arrays=arrays)
    skip = {"head"} if "head" in fit else set()
    skip |= {group for groups in lacks.values() for group in groups}
    contents, report = _of_the_model(contents, layout, lacks, skip)
    report += [f"{name}: left aside, the model computes its own" for name in other_grid]
    arrays = contents.arrays
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    tree_shapes = layout.tree_shapes(shapes)
    told = {} if contents.fields else told_by_name(path, model)
    declared = contents.fields or _declared(tree_shapes) | told
    source = source_model(sizes(tree_shapes), declared, model, fit)
    check_told(told, source, path)
    tree = tree_of(source)
    remedy = "Set model.{field}{or_fit}."
    report += check_implied(layout, source, remedy, fit)
    free = {field for field, groups in optional(model).items() if skip.issuperset(groups)}
    _check_fit(path, contents, layout, source, skip, free)
    arrays = {name: as_float32(array, name, path) for name, array in arrays.items()}
    flat = layout.to_ours(arrays, tree, skip)
    check_finite(flat, path)
    params, extra = nest(flat, tree)
    if fit:
        params, fitted = fit_params(params, source, model, method=method, key=key)
        report += fitted
    return Loaded(params, model, report, class_names, extra)


def _of_the_model(
    contents: Contents, layout: Layout, lacks: Mapping[str, Collection[str]], skip: set[str]
) -> tuple[Contents, list[str]]:
    """Without what is no parameter of the model, and what that was, in words.

    `lacks` are groups that the model goes without, by field; `skip` these, and what is not wanted.
    """
    report, arrays = list(contents.left), contents.arrays
    left = layout.set_aside(arrays)
    report += [left_aside(left)] if left else []
    counters = [
        name
        for name, array in arrays.items()
        if not is_float(array) and not layout.recognised([name])
    ]
    report += [f"{left_aside(counters)}: no floats, so no parameters"] if counters else []
    for field, groups in lacks.items():
        if layout.in_groups(arrays, groups):
            report.append(f"{', '.join(groups)}: left aside, for the model has none ({field}=0)")
    unused = {*left, *counters, *layout.in_groups(arrays, skip)}
    used = {name: array for name, array in arrays.items() if name not in unused}
    return contents._replace(arrays=used), report


def _check_classes(path: Path, stated: Sequence[str], wanted: Sequence[str]) -> None:
    """An output must go on to mean what it meant."""
    if stated and wanted and list(stated) != list(wanted):
        raise ValueError(
            f"{path} must be weights for the classes {listed(wanted)}; its head is for "
            f"{listed(stated)}: the data is {difference(stated, wanted)}. Ask for a new head "
            "(fit: head), or rename the classes."
        )


def _declared(tree_shapes: Mapping[str, Shape]) -> Json:
    """Fields of the model that a kernel states whose axes stand apart, a convolution's."""
    kernel, first = tree_shapes.get(PROJECTION, ()), tree_shapes.get(FIRST_STAGE)
    if first is not None:
        return {"in_channels": first[2]}
    return {"patch_size": kernel[:2], "in_channels": kernel[2]} if len(kernel) == 4 else {}


def _check_fit(
    path: Path,
    contents: Contents,
    layout: Layout,
    source: BlockModel,
    skip: Collection[str],
    free: Collection[str],
) -> None:
    """Every entry of the file has its place in the model, and every place is filled.

    Groups that are skipped have none, and the fields that tell of them are free.
    """
    expected = {name: e.official for name, e in layout.entries(tree_of(source), skip).items()}
    shapes = {name: tuple(array.shape) for name, array in contents.arrays.items()}
    if faults(shapes, expected):
        whose, remedy = mismatch(layout.tree_shapes(shapes), source)
        other = foreign_family(shapes, source)
        if other:
            whose = f"its names are those of the family {other}"
        told = [whose, faults(shapes, expected, shapes=not whose)]  # shapes follow from sizes
        raise ValueError(
            f"{path} must hold the parameters of the model and nothing else; "
            f"{'; '.join(filter(None, told))}. {remedy}"
        )
    ours = architecture(source) if contents.fields else {}
    other = [
        f"{name} {value} where the model has {ours.get(name)}"
        for name, value in contents.fields.items()
        if ours.get(name) != value and name not in free
    ]
    if other:
        raise ValueError(
            f"{path} must be weights of the model; they have {', '.join(other)}. "
            "Build the model with these, or ask to fit what is a constant: pool, eta, lmbda."
        )
