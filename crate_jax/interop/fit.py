"""Weights of one model for another: what may differ, and how it is fitted.

All of it is a function of parameter trees and models; files are elsewhere.
"""

import math
from collections.abc import Collection, Mapping
from fractions import Fraction

import jax
import numpy as np
from flax import traverse_util

from crate_jax.files import Json
from crate_jax.interop.faults import faults, mismatch
from crate_jax.interop.layouts.layout import Arrays
from crate_jax.interop.resize import METHODS, Size, resized_kernel, resized_positions
from crate_jax.interop.tree import FIRST_STAGE, PROJECTION, flatten, tree_of
from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.heads import new_head
from crate_jax.models.parameters import Params
from crate_jax.models.stacked import BlockModel
from crate_jax.models.zoo import architecture, family_of

# What may be fitted on request. The last three are constants that a file may declare: the model's
# are used.
FITS = ("head", "image_size", "patch_size", "in_channels", "pool", "eta", "lmbda")
CONSTANTS = FITS[4:]

_KERNEL, _BIAS = PROJECTION, "embedding/projection/bias"
_SCALE, _OFFSET = "embedding/patch_norm/scale", "embedding/patch_norm/bias"
_POSITIONS = "embedding/pos_embedding"


def source_model(
    found: Mapping[str, int],
    declared: Json,
    model: BlockModel,
    fit: Collection[str],
) -> BlockModel:
    """The model that weights are for: `model`, except in what is to be fitted.

    A size that the file does not declare is told from the shapes: patches keep the model's
    proportions, images have 1 or 3 channels or the model's, and the grid of patches is square, or
    else has the model's proportions.

    Args:
        found: `sizes` of the weights.
        declared: `architecture` fields that the file states itself, or the shape of a convolution.
        model: what they are to be loaded into.
        fit: names out of `FITS`.

    Raises:
        ValueError: an unknown name in `fit`, or weights of another family.
    """
    for name in fit:
        if name not in FITS:
            raise ValueError(f"fit must be among {', '.join(FITS)}; got {name}. Leave it out.")
    if not fit:
        return model
    _check_family(declared.get("family", family_of(model)), model)
    if not isinstance(model, ImageClassifier):
        return _source_of_text(declared, model, fit)
    stated = {name: declared[name] for name in FITS[1:] if name in declared and name in fit}
    if "patch_size" in fit and "image_size" in declared:
        stated["image_size"] = declared["image_size"]  # the grid changes with the patches
    patch = pair(stated.get("patch_size", model.patch_size))
    channels = stated.get("in_channels", model.in_channels)
    if "patch_size" not in declared and {"patch_size", "in_channels"} & set(fit):
        pixels = found.get("pixels of a patch", math.prod(patch) * channels)
        *patch, channels = _guess_patch(pixels, patch, channels, fit)
    size = pair(stated.get("image_size", model.image_size))
    if "image_size" not in declared and {"patch_size", "image_size"} & set(fit):
        cells = found.get("positions", 1 + math.prod(model.grid)) - 1
        rows, columns = _guess_grid(cells, model.grid)
        size = (rows * patch[0], columns * patch[1])
    constants = {name: stated[name] for name in CONSTANTS if name in stated}
    if "image_size" in fit and "position_size" in declared:
        constants["position_size"] = tuple(declared["position_size"])
    return model.clone(image_size=size, patch_size=tuple(patch), in_channels=channels, **constants)


def _source_of_text(declared: Json, model: BlockModel, fit: Collection[str]) -> BlockModel:
    """`source_model` of a model of text, whose constants alone may differ."""
    known = [name for name in CONSTANTS if hasattr(model, name)]
    for name in fit:
        if name not in known:
            raise ValueError(
                f"fit must be among {', '.join(known)} for a model of text; got {name}. "
                "Build the model with the sizes of these weights."
            )
    return model.clone(**{name: declared[name] for name in fit if name in declared})


def _check_family(family: object, model: BlockModel) -> None:
    """Weights of one family cannot be fitted to another."""
    if family != family_of(model):
        raise ValueError(
            f"weights must be of the model's family, {family_of(model)}, to be fitted; got those "
            f"of {family}. Build a model of that family."
        )


def _guess_patch(pixels: int, patch: Size, c: int, fit: Collection[str]) -> tuple[int, int, int]:
    """(height, width, channels) of a patch of so many values; the model's where none fits."""
    h, w = patch
    if "patch_size" not in fit:
        return (h, w, pixels // (h * w)) if pixels % (h * w) == 0 else (h, w, c)
    for channels in (c, 3, 1) if "in_channels" in fit else (c,):
        scaled = _scale(Fraction(pixels, channels), patch)
        if scaled:
            return (*scaled, channels)
    return h, w, c


def _guess_grid(cells: int, grid: Size) -> Size:
    """(rows, columns) of so many patches; the model's where none fits."""
    if cells == math.prod(grid):
        return grid
    return _scale(Fraction(cells), (1, 1)) or _scale(Fraction(cells), grid) or grid


def _scale(area: Fraction, sides: Size) -> Size | None:
    """A rectangle of that area and of these proportions, if its sides are whole."""
    square = area / math.prod(sides)
    ratio = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    height, width = ratio * sides[0], ratio * sides[1]
    whole = ratio * ratio == square and height.denominator == width.denominator == 1
    return (int(height), int(width)) if whole else None


def fit_params(
    params: Params,
    source: BlockModel,
    model: BlockModel,
    *,
    method: str = "right",
    key: jax.Array | None = None,
) -> tuple[Params, list[str]]:
    """The parameters of one model for another one of the same layers; a pure function.

    For another grid the positions are resized, the class token's apart. For other patches or
    channels the scale and bias of the patches' LayerNorm, where the model has one, first go into
    the projection behind it, which computes the same; then its kernel is resized, or summed over
    the channels for a grey image and repeated in turn, times old / new, for any other number, so
    that a grey image keeps its tokens. A head that is missing starts anew; a model without classes
    has none.

    Args:
        params: parameter tree of ``source``, with or without ``head``.
        source: the model that they are for.
        model: the model wanted: another image size, patch size, number of channels or of classes.
        method: of resizing; "right": the kernel by the pseudo-inverse of a bicubic resizing
            (`resize_patch_kernel`), positions bicubically; "crate_alpha": both bilinearly, as
            CRATE-α's official fine-tuning; "official_maps": positions as in the notebook behind the
            published attention maps, which resamples those of an equal grid too
            (`resize_positions_as_official_maps`), the kernel as "right".
        key: the key of the new head; None: ``jax.random.key(0)``.

    Returns:
        The parameter tree of ``model``, float32 NumPy arrays, and one line for each change.

    Raises:
        ValueError: the families or the layers differ (width, depth, subspaces), or an unknown
            method.
    """
    _check_family(family_of(source), model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method}. Choose one.")
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    report = []
    if isinstance(source, ImageClassifier) and isinstance(model, ImageClassifier):
        report += _fit_patches(flat, source, model, method) + _fit_grid(flat, source, model, method)
        report += _fit_head(flat, model, key)
    theirs, ours = architecture(source), architecture(model)
    for name in CONSTANTS:
        if name in ours and theirs[name] != ours[name]:
            report.append(f"{name}: {ours[name]}, where the weights had {theirs[name]}")
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = faults(got, tree_of(model).of_parameters.shapes)
    if wrong:
        raise ValueError(
            f"params must be those of a model of the same layers; got {wrong}. "
            + mismatch(got, model)[1]
        )
    return traverse_util.unflatten_dict(flat, sep="/"), report


def _fit_patches(
    flat: Arrays, source: ImageClassifier, model: ImageClassifier, method: str
) -> list[str]:
    """The projection for other patches or channels, put into ``flat``; what was done."""
    old, new = pair(source.patch_size), pair(model.patch_size)
    if (old, source.in_channels) == (new, model.in_channels):
        return []
    if FIRST_STAGE in flat:
        return _fit_stem(flat, source, model)
    kernel, folded = flat[_KERNEL].astype(np.float64), ""
    if _SCALE in flat:
        flat[_BIAS] = (flat[_BIAS] + flat[_OFFSET] @ kernel).astype(np.float32)
        kernel, folded = flat[_SCALE][:, None] * kernel, ", patch_norm folded in"
    kernel_hxwxcxd = kernel.reshape(*old, source.in_channels, -1)
    kernel_hxwxcxd = _other_channels(kernel_hxwxcxd, model.in_channels)
    if old != new:
        kernel_hxwxcxd = resized_kernel(kernel_hxwxcxd, new, method)
    kernel = kernel_hxwxcxd.reshape(-1, kernel_hxwxcxd.shape[-1]).astype(np.float32)
    flat[_KERNEL] = kernel
    if folded:
        flat[_SCALE] = np.ones(len(kernel), np.float32)
        flat[_OFFSET] = np.zeros(len(kernel), np.float32)
    return [
        f"embedding/projection: {_size(old)} pixels of {source.in_channels} channels to "
        f"{_size(new)} of {model.in_channels}{folded}" + _by(method, old != new, "bilinear")
    ]


def _fit_stem(flat: Arrays, source: ImageClassifier, model: ImageClassifier) -> list[str]:
    """The first stage of a convolutional stem for other channels, put into ``flat``."""
    if pair(source.patch_size) != pair(model.patch_size):
        raise ValueError(
            f"model.patch_size must be {_size(pair(source.patch_size))}, that of the weights; got "
            f"{_size(pair(model.patch_size))}. A convolutional stem has a stage for each halving."
        )
    flat[FIRST_STAGE] = _other_channels(flat[FIRST_STAGE], model.in_channels).astype(np.float32)
    return [f"{FIRST_STAGE}: {source.in_channels} channels to {model.in_channels}"]


def _fit_grid(
    flat: Arrays, source: ImageClassifier, model: ImageClassifier, method: str
) -> list[str]:
    """The positions for another grid, put into ``flat``; what was done."""
    old, new = source.grid, model.grid
    if _POSITIONS not in flat and method == "official_maps":
        by_field = hasattr(model, "position_size")
        raise ValueError(
            f"method must be right or crate_alpha for {family_of(model)}, which learns no "
            "positions; got official_maps. "
            + ("Set model.position_size." if by_field else "Leave it out.")
        )
    if _POSITIONS not in flat or (old == new and method != "official_maps"):
        return []
    flat[_POSITIONS] = resized_positions(flat[_POSITIONS], old, new, method)
    how = {"right": "bicubic", "crate_alpha": "linear", "official_maps": "as official maps"}[method]
    return [f"{_POSITIONS}: {_size(old)} to {_size(new)} patches, {how}"]


def _fit_head(flat: Arrays, model: ImageClassifier, key: jax.Array | None) -> list[str]:
    """A new head where there is none, and none for a model without, in ``flat``; what was done."""
    if model.num_classes and "head/kernel" not in flat:
        head = new_head(model, jax.random.key(0) if key is None else key)
        flat |= {f"head/{name}": np.asarray(leaf) for name, leaf in head.items()}
        return [f"head: new, for {model.num_classes} classes"]
    left = [] if model.num_classes else [path for path in flat if path.startswith("head/")]
    for path in left:
        del flat[path]
    return ["head: left out"] if left else []


def _by(method: str, resized: bool, name: str) -> str:
    return f", {name}" if resized and method == "crate_alpha" else ""


def _other_channels(kernel_hxwxcxd: np.ndarray, channels: int) -> np.ndarray:
    """Summed for one channel; for others repeated in turn, times old / new."""
    old = kernel_hxwxcxd.shape[2]
    if channels == old:
        return kernel_hxwxcxd
    if channels == 1:
        return kernel_hxwxcxd.sum(axis=2, keepdims=True)
    return kernel_hxwxcxd[:, :, np.arange(channels) % old] * (old / channels)


def _size(sides: Size) -> str:
    return f"{sides[0]}x{sides[1]}"
