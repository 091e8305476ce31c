"""The figures of the papers by name: what each takes of a run, or of several."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crate_jax.analysis.figures import Measure
from crate_jax.cli.examples import as_floats
from crate_jax.cli.measuring import COMPRESSION, GEOMETRY, HALVES, as_curves, measured, named
from crate_jax.cli.specimen import SHOWN, NotThere, Specimen

if TYPE_CHECKING:  # they need matplotlib
    from crate_jax.analysis.figures import Picture


class Asked(NamedTuple):
    """The request for a figure.

    Attributes:
        layer: counted from 1; None: the last, or all.
        head: counted from 1; None: all.
    """

    layer: int | None = None
    head: int | None = None


Draw = Callable[[list[Specimen], Asked], "Picture"]


def objective(runs: list[Specimen], asked: Asked) -> "Picture":
    """R^c and the share of zeros by layer: train, test and before training."""
    del asked
    return _measures(runs, COMPRESSION)


def halves(runs: list[Specimen], asked: Asked) -> "Picture":
    """The effect of each half of a layer: attention on R^c, ISTA on the LASSO."""
    del asked
    return _measures(runs, HALVES)


def geometry(runs: list[Specimen], asked: Asked) -> "Picture":
    """Ranks, angles, entropy of the attention and norms by layer."""
    del asked
    return _measures(runs, GEOMETRY)


def tokens(runs: list[Specimen], asked: Asked) -> "Picture":
    """Tokens of one example after every layer, as heat maps."""
    from crate_jax.analysis.figures import token_maps

    del asked
    run = runs[0]
    found = run.look(["out"], run.rows_shown(1))
    return token_maps(found["out"][:, 0])


def subspaces(runs: list[Specimen], asked: Asked) -> "Picture":
    """U_[K]ᵀ U_[K] of every layer."""
    from crate_jax.analysis.figures import subspace_grams

    U_LxdxKxp = runs[0].block_parameter(runs[0].model.attention_part.name, "U")
    return subspace_grams(_chosen_layer(U_LxdxKxp, asked.layer))


def dictionary(runs: list[Specimen], asked: Asked) -> "Picture":
    """Cosines between the atoms of the dictionary of every layer."""
    from crate_jax.analysis.figures import dictionary_gram

    return dictionary_gram(_chosen_layer(_dictionary(runs[0]), asked.layer))


def atoms(runs: list[Specimen], asked: Asked) -> "Picture":
    """Atoms of the first layer's dictionary as patches of an image."""
    from crate_jax.analysis.figures import atoms_as_patches

    if asked.layer not in (None, 1):
        raise ValueError(
            f"--layer must be 1 for atoms, whose entries are those of patches there alone; got "
            f"{asked.layer}. Draw the figure dictionary for other layers."
        )
    run = runs[0]
    embedding = run.variables["params"].get("embedding", {})
    if not (run.of_images and "projection" in embedding):
        raise NotThere(
            "atoms must get a model that embeds patches by one linear map; that of "
            f"{run.workdir} does not. Draw the figure dictionary."
        )
    model: Any = run.model
    (h, w), c = model.patch_size, model.in_channels
    kernel = np.asarray(embedding["projection"]["kernel"]).reshape(h, w, c, -1)
    return atoms_as_patches(_dictionary(run)[0], kernel)


def saliency(runs: list[Specimen], asked: Asked) -> "Picture":
    """The attention of the class token, one map a head."""
    from crate_jax.analysis.figures import saliency as draw

    run = runs[0]
    images, _ = run.shown
    maps, layer = _maps(run, SHOWN, asked.layer)
    if asked.head is not None:
        _check_number("--head", asked.head, maps.shape[1])
    return draw(maps, as_floats(images[:SHOWN]), layer=layer, head=asked.head)


def heads(runs: list[Specimen], asked: Asked) -> "Picture":
    """The mean map of each head over the images of each class, or folder."""
    from crate_jax.analysis.figures import heads_by_kind

    _, kinds = runs[0].shown
    maps, layer = _maps(runs[0], None, asked.layer)
    return heads_by_kind(maps, kinds, layer=layer)


def pca(runs: list[Specimen], asked: Asked) -> "Picture":
    """Principal components that the patches of several images share, as colours."""
    from crate_jax.analysis.figures import shared_components
    from crate_jax.analysis.pca import foreground

    run = runs[0]
    images = run.shown[0][:SHOWN]
    W_BxPxf, layer = _subspace_tokens(run, SHOWN, asked.layer)
    shown = foreground(W_BxPxf, run.grid)
    return shared_components(shown, as_floats(images), run.grid, layer=layer)


def segmentation(runs: list[Specimen], asked: Asked) -> "Picture":
    """Coarse masks from attention, and the objects of MaskCut."""
    from crate_jax.analysis.figures import segments
    from crate_jax.analysis.maskcut import maskcut

    run = runs[0]
    images = run.shown[0][:SHOWN]
    W_BxPxf, layer = _subspace_tokens(run, SHOWN, asked.layer)
    maps, _ = _maps(run, SHOWN, asked.layer)
    cuts = [maskcut(W_Pxf, run.grid) for W_Pxf in W_BxPxf]
    return segments(maps, cuts, as_floats(images), layer=layer)


def operators(runs: list[Specimen], asked: Asked) -> "Picture":
    """The attention of models with several operators, such as MSSA and MHSA, on one image set."""
    from crate_jax.analysis.figures import side_by_side

    images, _ = runs[0].shown
    maps = {}
    for run in runs:
        if run.shows != runs[0].shows:
            raise ValueError(
                f"--against must be runs with the same test images; {runs[0].workdir} has those of "
                f"{runs[0].shows}, {run.workdir} those of {run.shows}. Give --images=FOLDER."
            )
        name = _operators(run)
        name = f"{name} ({run.name})" if name in maps else name
        maps[name], layer = _maps(run, SHOWN, asked.layer)
    where = "the last layer" if asked.layer is None else f"layer {layer}"
    return side_by_side(maps, as_floats(images[:SHOWN]), layer=where)


def curves(runs: list[Specimen], asked: Asked) -> "Picture":
    """The loss over the steps of training."""
    from crate_jax.analysis.figures import curves as draw

    del asked
    logs = {name: run.metrics for name, run in named(runs).items()}
    if not any(x.endswith("/loss") for lines in logs.values() for line in lines for x in line):
        raise NotThere(f"{runs[0].workdir} must have a loss in metrics.jsonl; it has none.")
    return draw(logs, "loss")


def confusion(runs: list[Specimen], asked: Asked) -> "Picture":
    """The confusion of classes by the model."""
    from crate_jax.analysis.figures import confusion as draw

    del asked
    return draw(*runs[0].confusion)


# In the order in which --help lists them.
FIGURES: Mapping[str, Draw] = {
    draw.__name__: draw
    for draw in (
        objective,
        halves,
        geometry,
        tokens,
        subspaces,
        dictionary,
        atoms,
        saliency,
        heads,
        pca,
        segmentation,
        operators,
        curves,
        confusion,
    )
}

# The figures that heed a flag, by its name; all others refuse it.
_PICTURES = ("saliency", "heads", "pca", "segmentation", "operators")
_MEASURES = ("objective", "halves", "geometry")
HEEDED_BY: Mapping[str, Sequence[str]] = {
    "step": tuple(name for name in FIGURES if name != "curves"),
    "against": (*_MEASURES, "operators", "curves"),
    "images": ("tokens", *_PICTURES),
    "examples": (*_MEASURES, *_PICTURES, "confusion"),
    "size": ("tokens", *_PICTURES),
    "layer": ("subspaces", "dictionary", "atoms", *_PICTURES),
    "head": ("saliency",),
}


def _measures(runs: list[Specimen], measures: Sequence[Measure]) -> "Picture":
    """Panels of measures."""
    from crate_jax.analysis.figures import by_layer

    found = as_curves(measured(runs, [m.name for m in measures]))
    there = [m for m in measures if any(m.name in curves for curves in found.values())]
    if not there:
        raise NotThere(
            f"a measure must be there to draw; the layers of {runs[0].workdir} have none of "
            f"{', '.join(m.name for m in measures)}. Choose another figure."
        )
    return by_layer(found, there, columns=2 if len(there) in (2, 4) else 3)


def _maps(run: Specimen, count: int | None, layer: int | None) -> tuple[np.ndarray, int]:
    """The maps of the heads of a layer (B, K, rows, columns), and the layer's number."""
    from crate_jax.analysis.figures import class_token_maps

    model: Any = run.model
    layer = _number_of(model, layer)
    rows = run.rows_shown(count, images=True)
    tap = "membership" if "membership" in model.tap_names else "attention"
    if tap == "attention" and tap in model.tap_names and model.num_tokens == model.num_patches:
        raise NotThere(
            f"the model must have a class token in its layers; that of {run.workdir} adds it after "
            "them. Choose another run."
        )
    seen = run.look([tap], rows)
    return class_token_maps(seen, run.grid)[layer - 1], layer


def _subspace_tokens(run: Specimen, count: int | None, layer: int | None) -> tuple[np.ndarray, int]:
    """The subspace tokens of the patches, head by head (B, P, f), and the layer's number."""
    model: Any = run.model
    layer = _number_of(model, layer)
    W_BxNxKxp = run.look(["subspace_tokens"], run.rows_shown(count))["subspace_tokens"][layer - 1]
    return W_BxNxKxp.reshape(*W_BxNxKxp.shape[:2], -1)[:, -math.prod(run.grid) :], layer


def _number_of(model: Any, layer: int | None) -> int:
    """The number of a layer; of none the last one's."""
    if layer is None:
        return model.depth
    _check_number("--layer", layer, model.depth)
    return layer


def _chosen_layer(values_L: np.ndarray, layer: int | None) -> np.ndarray:
    """All layers, or one."""
    if layer is None:
        return values_L
    _check_number("--layer", layer, len(values_L))
    return values_L[layer - 1 : layer]


def _check_number(flag: str, number: int, count: int) -> None:
    """Refuse what is not in 1 … count.

    Raises:
        ValueError: it is not.
    """
    if not 1 <= number <= count:
        raise ValueError(f"{flag} must be one of 1 … {count}; got {number}. Choose another.")


def _dictionary(run: Specimen) -> np.ndarray:
    """D of every layer (L, d, m)."""
    part = run.model.nonlinearity_part
    return run.block_parameter("" if part is None else part.name, "D")


def _operators(run: Specimen) -> str:
    """Such as MSSA + ISTA."""
    parts = (run.model.attention_part, run.model.nonlinearity_part)
    return " + ".join(part.name.upper() for part in parts if part)
