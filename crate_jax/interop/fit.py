"""Weights of one model for another: what may differ, how it is fitted, and what to say otherwise.

All of it is a function of parameter trees and models; files are elsewhere.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from crate_jax.models.classifier import pair
from crate_jax.models.cost import abstract_parameters, sample_images
from crate_jax.models.crate import Crate
from crate_jax.models.embedding import resize_patch_kernel, resize_positions
from crate_jax.models.zoo import VARIANTS, architecture, create_model

# What may be fitted on request. The last three are constants that a file may declare: the model's
# are used.
FITS = ("head", "image_size", "patch_size", "in_channels", "pool", "eta", "lmbda")

# What the shapes of a parameter tree tell: the leaf, and the axes whose product it is.
_SIZES = {
    "width": ("blocks/ista/D", slice(2, 3)),
    "depth": ("blocks/ista/D", slice(0, 1)),
    "num_heads x head_dim": ("blocks/mssa/U", slice(2, None)),
    "pixels of a patch": ("embedding/patch_norm/scale", slice(0, 1)),
    "positions": ("embedding/pos_embedding", slice(0, 1)),
    "num_classes": ("head/bias", slice(0, 1)),
}
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: Crate) -> dict[str, tuple[int, ...]]:
    """The flat parameter tree of a model: {path: shape}."""
    flat: Any = traverse_util.flatten_dict(abstract_parameters(model), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def faults(got: Shapes, expected: Shapes) -> dict[str, str]:
    """What is missing, unknown or of another shape, every entry named; {} if nothing is."""
    wrong = {
        k: f"{got[k]} instead of {expected[k]}"
        for k in expected
        if k in got and got[k] != expected[k]
    }
    found = {
        "missing": _join({k: "" for k in expected if k not in got}),
        "unknown": _join({k: "" for k in got if k not in expected}),
        "of another shape": _join(wrong),
    }
    return {fault: names for fault, names in found.items() if names}


def in_words(found: Mapping[str, str]) -> str:
    """`faults` as a part of a sentence."""
    return "; ".join(f"{fault}: {names}" for fault, names in found.items())


def _join(entries: Mapping[str, str]) -> str:
    """Names and remarks in a row; those that differ by layer alone as one: layers.{3-5,7}.x."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, remark in entries.items():
        parts = re.fullmatch(r"(transformer\.layers\.)(\d+)(\..*)", name)
        pattern = f"{parts[1]}{{}}{parts[3]}" if parts else name
        layers.setdefault((pattern, remark), []).extend([int(parts[2])] if parts else [])
    return ", ".join(
        " ".join(filter(None, (pattern.replace("{}", _ranges(numbers)), remark)))
        for (pattern, remark), numbers in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    """3, or {3-5,7}."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else "{" + text + "}"


def sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of the model that a flat tree of these shapes belongs to, as far as its leaves tell."""
    return {
        name: math.prod(shapes[path][axes])
        for name, (path, axes) in _SIZES.items()
        if len(shapes.get(path, ())) >= (axes.stop or 3)
    }


def describe_difference(found: Mapping[str, int], model: Crate) -> str:
    """In words: whose weights these are, how the model differs, and what to do; "" if sizes agree.

    Args:
        found: `sizes` of the weights.
        model: what they were to be loaded into.
    """
    wanted = sizes(shapes_of(model))
    wrong = {name: size for name, size in found.items() if size != wanted[name]}
    if not found:
        return "it holds no weights of a CRATE"
    if not wrong:
        return ""
    variants = _variant_sizes()
    layers = {"width", "depth", "num_heads x head_dim"} & set(found)
    same = [n for n, v in variants.items() if all(v[size] == found[size] for size in layers)]
    patch = "pixels of a patch"
    names = [n for n in same if variants[n][patch] == found.get(patch)] or same
    who = f"these weights are {' or '.join(names)}'s" if names else "these weights differ"
    return f"{who}: " + ", ".join(
        f"{name} {size} where the model has {wanted[name]}" for name, size in wrong.items()
    )


@functools.cache
def _variant_sizes() -> dict[str, dict[str, int]]:
    """The sizes of every named model."""
    return {name: sizes(shapes_of(create_model(name))) for name in VARIANTS}


def remedy(found: Mapping[str, int], model: Crate) -> str:
    """What to do about weights of other sizes: fit them, or take the right model."""
    wanted = sizes(shapes_of(model))
    wrong = {name for name, size in found.items() if size != wanted[name]}
    fits = {"num_classes": "head", "positions": "image_size", "pixels of a patch": "patch_size"}
    if wrong and wrong <= set(fits):
        names = [fit for size, fit in fits.items() if size in wrong]
        if "patch_size" in names:
            names.append("in_channels")
        return f"Build the model with these sizes, or ask to fit: {', '.join(names)}."
    return "Build the model with the sizes of these weights."


def source_model(
    found: Mapping[str, int], declared: Mapping[str, Any], model: Crate, fit: Collection[str]
) -> Crate:
    """The model that weights are for: `model`, except in what is to be fitted.

    A size that the file does not declare is told from the shapes: patches keep the model's
    proportions, images have 1 or 3 channels or the model's, and the grid of patches is square, or
    else has the model's proportions.

    Args:
        found: `sizes` of the weights.
        declared: `architecture` fields that the file states itself; {} for a PyTorch file.
        model: what they are to be loaded into.
        fit: names out of `FITS`.

    Raises:
        ValueError: an unknown name in `fit`.
    """
    for name in fit:
        if name not in FITS:
            raise ValueError(f"fit must be among {', '.join(FITS)}; got {name}.")
    stated = {name: declared[name] for name in FITS[1:] if name in declared and name in fit}
    if "patch_size" in fit and "image_size" in declared:
        stated["image_size"] = declared["image_size"]  # the grid changes with the patches
    (h, w), c = pair(model.patch_size), model.in_channels
    if not declared and {"patch_size", "in_channels"} & set(fit):
        h, w, c = _guess_patch(found.get("pixels of a patch", h * w * c), (h, w), c, fit)
    H, W = pair(model.image_size)
    if not declared and {"patch_size", "image_size"} & set(fit):
        cells = found.get("positions", 1 + math.prod(_grid(model))) - 1
        rows, columns = _guess_grid(cells, _grid(model))
        H, W = rows * h, columns * w
    fields: dict[str, Any] = {"image_size": (H, W), "patch_size": (h, w), "in_channels": c}
    fields |= {name: tuple(v) if isinstance(v, list) else v for name, v in stated.items()}
    return model.clone(**fields)


def _guess_patch(
    pixels: int, patch: tuple[int, int], c: int, fit: Collection[str]
) -> tuple[int, int, int]:
    """(height, width, channels) of a patch of so many values; the model's where none fits."""
    h, w = patch
    if "patch_size" not in fit:
        return (h, w, pixels // (h * w)) if pixels % (h * w) == 0 else (h, w, c)
    for channels in (c, 3, 1) if "in_channels" in fit else (c,):
        scaled = _scale(Fraction(pixels, channels), patch)
        if scaled:
            return (*scaled, channels)
    return h, w, c


def _guess_grid(cells: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of so many patches; the model's where none fits."""
    if cells == math.prod(grid):
        return grid
    return _scale(Fraction(cells), (1, 1)) or _scale(Fraction(cells), grid) or grid


def _scale(area: Fraction, sides: tuple[int, int]) -> tuple[int, int] | None:
    """A rectangle of that area and of these proportions, if its sides are whole."""
    square = area / math.prod(sides)
    ratio = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    height, width = ratio * sides[0], ratio * sides[1]
    whole = ratio * ratio == square and height.denominator == width.denominator == 1
    return (int(height), int(width)) if whole else None


def fit_params(
    params: Mapping[str, Any], source: Crate, model: Crate, *, key: jax.Array | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The parameters of one model for another one of the same layers; a pure function.

    Positions are resized bicubically, the class token's apart. For other patches or channels the
    scale and bias of the patches' LayerNorm first go into the projection behind it, which computes
    the same; then its kernel is resized (`resize_patch_kernel`), or summed over the channels for a
    grey image and repeated in turn, times old / new, for any other number, so that a grey image
    keeps its tokens. A head that is missing starts anew.

    Args:
        params: parameter tree of ``source``, with or without ``head``.
        source: the model that they are for.
        model: the model wanted: another image size, patch size, number of channels or of classes.
        key: of the new head; None: ``jax.random.key(0)``.

    Returns:
        The parameter tree of ``model``, float32 NumPy arrays, and one line for each change.

    Raises:
        ValueError: the layers differ: width, depth, subspaces.
    """
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(dict(params), sep="/").items()}
    report = []
    old_patch, new_patch = pair(source.patch_size), pair(model.patch_size)
    if (old_patch, source.in_channels) != (new_patch, model.in_channels):
        kernel_hxwxcxd, bias = _fold_patch_norm(flat, old_patch, source.in_channels)
        kernel_hxwxcxd = _other_channels(kernel_hxwxcxd, model.in_channels)
        if old_patch != new_patch:
            kernel_hxwxcxd = resize_patch_kernel(kernel_hxwxcxd, old_patch, new_patch)
        kernel = kernel_hxwxcxd.reshape(-1, kernel_hxwxcxd.shape[-1]).astype(np.float32)
        flat["embedding/projection/kernel"] = kernel
        flat["embedding/projection/bias"] = bias.astype(np.float32)
        flat["embedding/patch_norm/scale"] = np.ones(len(kernel), np.float32)
        flat["embedding/patch_norm/bias"] = np.zeros(len(kernel), np.float32)
        report.append(
            f"embedding/projection: {_size(old_patch)} pixels of {source.in_channels} channels to "
            f"{_size(new_patch)} of {model.in_channels}, patch_norm folded in"
        )
    old_grid, new_grid = _grid(source), _grid(model)
    if old_grid != new_grid:
        resized = resize_positions(flat["embedding/pos_embedding"], old_grid, new_grid)
        flat["embedding/pos_embedding"] = np.asarray(resized)
        report.append(
            f"embedding/pos_embedding: {_size(old_grid)} to {_size(new_grid)} patches, bicubic"
        )
    if "head/kernel" not in flat:
        init = lambda key: model.init(key, sample_images(model), train=False)["params"]["head"]  # noqa: E731
        head = jax.jit(init)(jax.random.key(0) if key is None else key)
        flat |= {f"head/{name}": np.asarray(leaf) for name, leaf in head.items()}
        report.append(f"head: new, for {model.num_classes} classes")
    theirs, ours = architecture(source), architecture(model)
    for name in ("pool", "eta", "lmbda"):
        if theirs[name] != ours[name]:
            report.append(f"{name}: {ours[name]}, where the weights had {theirs[name]}")
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = faults(got, shapes_of(model))
    if wrong:
        raise ValueError(
            f"params must be those of a model of the same layers; got {in_words(wrong)}. "
            + remedy(sizes(got), model)
        )
    return traverse_util.unflatten_dict(flat, sep="/"), report


def _fold_patch_norm(
    flat: Mapping[str, np.ndarray], patch: tuple[int, int], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Projection (h, w, c, d) and its bias (d,) with the LayerNorm's scale and bias moved in."""
    scale, offset = flat["embedding/patch_norm/scale"], flat["embedding/patch_norm/bias"]
    kernel = flat["embedding/projection/kernel"].astype(np.float64)
    bias = flat["embedding/projection/bias"] + offset @ kernel
    return (scale[:, None] * kernel).reshape(*patch, channels, -1), bias


def _other_channels(kernel_hxwxcxd: np.ndarray, channels: int) -> np.ndarray:
    """Summed for one channel; for others repeated in turn, times old / new."""
    old = kernel_hxwxcxd.shape[2]
    if channels == old:
        return kernel_hxwxcxd
    if channels == 1:
        return kernel_hxwxcxd.sum(axis=2, keepdims=True)
    return kernel_hxwxcxd[:, :, np.arange(channels) % old] * (old / channels)


def _grid(model: Crate) -> tuple[int, int]:
    """Patches (down, across)."""
    (H, W), (h, w) = pair(model.image_size), pair(model.patch_size)
    return H // h, W // w


def _size(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"
