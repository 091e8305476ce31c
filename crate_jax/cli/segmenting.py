"""The work of `segment` on one image after the other."""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from crate_jax.analysis import coarse_masks, overlays, rle, taps
from crate_jax.analysis.maskcut import enlarge, maskcut
from crate_jax.analysis.pca import foreground
from crate_jax.cli.alone import Frozen
from crate_jax.data.annotated import Picture, read_labels
from crate_jax.data.images.resize import resize_pixels
from crate_jax.data.rows import BadExampleError
from crate_jax.files import Json
from crate_jax.machine import check_memory
from crate_jax.models.classifier import pair
from crate_jax.models.embedding import check_sides
from crate_jax.models.image_sizes import resizes_positions
from crate_jax.models.parameters import Variables
from crate_jax.tasks.pixels import normalize

SIZE = 480  # pixels of a side; arXiv 2301.11320
TOKENS, ATTENTION = "subspace_tokens", "attention"
GRAPHS = 3  # float32 matrices of MaskCut that are as large as the graph, at the same time
LONGEST = 60  # characters of an image's name in that of its picture
NO_TOKENS = (ATTENTION, "membership", "contraction")  # taps of maps


class Found(NamedTuple):
    """The objects that are found in one image.

    Attributes:
        picture: which.
        pixels: (H, W, c), uint8, at its own size.
        masks: (P,) bool each.
        scores: one of each mask.
        kind: "objects"; "maps" or "colours".
        shown: the maps (K, P) that the masks come from, the colours (P, 3), or nothing.
    """

    picture: Picture
    pixels: np.ndarray
    masks: Sequence[np.ndarray]
    scores: Sequence[float]
    kind: str
    shown: np.ndarray


class Reader:
    """From an image to what one layer makes of it, at the size that is asked for.

    Attributes:
        tap: whose output.
        layer: 1 … L.
        grid: patches (down, across).

    Raises:
        KeyError, ValueError: the model has no such tap, layer or head, no class token where the
            method needs one, or no such size; or the machine can never hold what the size takes.
    """

    def __init__(self, frozen: Frozen, args: argparse.Namespace):
        self._frozen, self._positions = frozen, args.positions
        model, coarse = frozen.model, args.method == "coarse"
        usable = [name for name in model.tap_names if name not in NO_TOKENS]
        if coarse:
            usable = [name for name in (TOKENS, ATTENTION) if name in model.tap_names]
        self.tap = args.tap or TOKENS
        if self.tap not in usable:
            raise KeyError(
                f"--tap must be among {', '.join(usable) or 'none'} for {args.method} of this "
                f"{type(model).__name__}; got {self.tap}. Choose one by --tap."
            )
        self.layer = max(1, model.depth - coarse) if args.layer is None else args.layer
        if not 1 <= self.layer <= model.depth:
            raise ValueError(f"--layer must be 1 … {model.depth} here; got {self.layer}.")
        self._head = _head(args.head, model.num_heads if self.tap in (TOKENS, ATTENTION) else 0)
        patch = pair(model.patch_size)
        if args.positions != "right" and not resizes_positions(model, frozen.variables):
            raise ValueError(
                f"--positions must be right for a {type(model).__name__}, whose positions are "
                f"not resized; got {args.positions}. Leave it out."
            )
        height, width = (args.size or max(1, round(SIZE / p)) * p for p in patch)
        check_sides((height, width), patch, "--size")
        self._size, self.grid = (height, width), (height // patch[0], width // patch[1])
        self._check_memory(coarse or args.method == "pca")
        blank = np.zeros((1, *self._size, model.in_channels), np.uint8)
        seen = jax.eval_shape(self._program, frozen.variables, blank)
        if coarse and seen.shape[-1 if self.tap == ATTENTION else 0] == self.grid[0] * self.grid[1]:
            raise ValueError(
                f"coarse must get a model with a class token among its tokens; a "
                f"{type(model).__name__} has none there. Choose another --method."
            )

    def pixels(self, picture: Picture) -> np.ndarray:
        """(H, W, c), uint8, at the image's own size."""
        return picture.pixels(self._frozen.model.in_channels)

    def patches(self, pixels: np.ndarray) -> np.ndarray:
        """Features (P, f) of the patches; those of heads one after the other."""
        tokens = np.asarray(self._layer(pixels))
        return tokens.reshape(len(tokens), -1)[len(tokens) - self.grid[0] * self.grid[1] :]

    def maps(self, pixels: np.ndarray, definition: str = "") -> Array:
        """The attention of the class token to each patch (K, P); attention needs no definition."""
        seen, patches = self._layer(pixels), self.grid[0] * self.grid[1]
        if self.tap == ATTENTION:
            return seen[:, 0, -patches:]  # registers may stand before them
        return coarse_masks.class_attention(seen[None], definition=definition)[0]

    def _check_memory(self, without_graph: bool) -> None:
        """Refuse a size whose graph of the patches, or attention on the CPU, fits no memory here.

        Raises:
            ValueError: it fits none.
        """
        patches = self.grid[0] * self.grid[1]
        heads = self._frozen.model.num_heads if jax.default_backend() == "cpu" else 0
        squares = max(heads, 0 if without_graph else GRAPHS)
        what = f"what {patches} patches have with each other"
        check_memory(4 * squares * patches**2, what, "Give a smaller --size.")

    def _layer(self, pixels: np.ndarray) -> Array:
        """One tap of one layer and one image, of the heads that are asked for."""
        resized = resize_pixels(pixels, self._size)
        seen = self._program(self._frozen.variables, resized[None])
        return seen[self._head] if self.tap == ATTENTION else seen[:, self._head]

    @functools.cached_property
    def _program(self):
        """From variables and one image's pixels to a tap of the layer, compiled once."""
        data, model = self._frozen.data, self._frozen.model

        def read(variables: Variables, pixels: Array) -> Array:
            images = normalize(pixels, mean=data.mean, std=data.std)
            _, seen = taps(model, variables, images, names=self.tap, positions=self._positions)
            return seen[self.tap][self.layer - 1, 0].astype(jnp.float32)

        return jax.jit(read)


def found_in(
    method: str, pictures: Sequence[Picture], reader: Reader, how: Json
) -> Iterator[Found]:
    """Find objects by a method, image by image; "pca" reads all images before the first result."""
    if method == "pca":
        features = [reader.patches(reader.pixels(picture)) for picture in pictures]
        shown = foreground(np.stack(features), reader.grid, **how)
        for j, picture in enumerate(pictures):
            mask_P, colours_Px3 = shown.masks_JxP[j], shown.colours_JxPx3[j]
            scores = [float(shown.scores_JxP[j][mask_P].mean())] if mask_P.any() else []
            masks = [mask_P] * len(scores)
            yield Found(picture, reader.pixels(picture), masks, scores, "colours", colours_Px3)
        return
    for picture in pictures:
        pixels = reader.pixels(picture)
        if method == "maskcut":
            cuts = maskcut(reader.patches(pixels), reader.grid, **how)
            masks, scores = [cut.mask_P for cut in cuts], [1 - cut.cost for cut in cuts]
            yield Found(picture, pixels, masks, scores, "objects", np.zeros((0, 0)))
        else:
            maps_KxP = reader.maps(pixels, how.get("definition", ""))
            masks_KxP = coarse_masks.SHARES[how["share_of"]](maps_KxP, how["share"])
            held_K = jnp.where(masks_KxP, maps_KxP, 0).sum(axis=1).tolist()
            masks, maps = list(np.asarray(masks_KxP)), np.asarray(maps_KxP)
            yield Found(picture, pixels, masks, held_K, "maps", maps)


def results_of(found: Found, grid: tuple[int, int]) -> tuple[list[Json], dict[int, float] | None]:
    """The masks of an image as COCO's results, and how well they fit its classes, if it has any.

    Raises:
        BadExampleError: the file of classes is of another size than the image, or unreadable.
    """
    picture, size = found.picture, found.pixels.shape[:2]
    masks = [enlarge(mask_P, grid, size) for mask_P in found.masks]
    rows: list[Json] = [
        {
            "image_id": picture.number,
            "category_id": 1,  # there are no classes
            "bbox": rle.box(mask_HxW),
            "segmentation": rle.encode(mask_HxW),
            "score": round(score, 6),
        }
        for mask_HxW, score in zip(masks, found.scores, strict=True)
    ]
    if picture.labels is None:
        return rows, None
    labels_HxW = _labels(picture.labels, size)
    stack = np.stack([*masks, np.zeros(size, bool)])  # without a mask every score is 0
    return rows, coarse_masks.class_scores(stack, labels_HxW)


def check_pictures(pictures: Sequence[Picture], reader: Reader) -> None:
    """Read all images and their classes once: a bad one is told before the work, not in its middle.

    Raises:
        BadExampleError: one is unreadable, or of another size than it should be.
        ValueError: there are files of classes, and none holds a class.
    """
    labelled, classes = False, False
    for picture in pictures:
        size = reader.pixels(picture).shape[:2]
        if picture.labels is not None:
            labels_HxW = _labels(picture.labels, size)
            labelled = True
            classes |= bool(((labels_HxW != 0) & (labels_HxW != coarse_masks.VOID)).any())
    if labelled and not classes:
        raise ValueError(
            "the images must hold a class to fit, 1 … 254; theirs are all background. Take more "
            "images, or name their folder alone."
        )


def write_picture(folder: Path, found: Found, grid: tuple[int, int]) -> None:
    """Draw an image and what is found in it, into ``NUMBER_NAME.png``.

    Of objects the image with all of them; of a foreground its colours, and the image with it; of
    maps a column for each, with the mask of it below. Large images are drawn smaller.
    """
    size = overlays.shown_size(*found.pixels.shape[:2])
    image = resize_pixels(found.pixels, size)
    masks = [enlarge(mask_P, grid, size) for mask_P in found.masks]
    rows = [[overlays.rgb(image)]]
    if found.kind == "maps":
        rows[0] += [overlays.heat(enlarge(map_P, grid, size)) for map_P in found.shown]
        rows.append([overlays.rgb(image), *(overlays.overlay(image, [mask]) for mask in masks)])
    else:
        if found.kind == "colours":
            channels = [enlarge(channel_P, grid, size) for channel_P in found.shown.T]
            rows[0].append(np.rint(255 * np.stack(channels, axis=-1)).astype(np.uint8))
        rows[0].append(overlays.overlay(image, masks))
    name = found.picture.name.rpartition("/")[2][:LONGEST]
    overlays.write_panels(folder / f"{found.picture.number}_{name}.png", rows)


def _labels(path: str, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel (H, W) of an image of this size.

    Raises:
        BadExampleError: the file is of another size, or unreadable.
    """
    labels_HxW = read_labels(path)
    if labels_HxW.shape != size:
        raise BadExampleError(
            f"{path} must be of its image's size, {size[0]} x {size[1]}; it is "
            f"{labels_HxW.shape[0]} x {labels_HxW.shape[1]}. Give the masks of these images."
        )
    return labels_HxW


def _head(head: int | None, heads: int) -> slice:
    """The heads that are asked for.

    Raises:
        ValueError: a tap without heads, or that has fewer.
    """
    if head is None:
        return slice(None)
    if not 1 <= head <= heads:
        rule = f"1 … {heads} here" if heads else "left out for a tap without heads"
        raise ValueError(f"--head must be {rule}; got {head}.")
    return slice(head - 1, head)
