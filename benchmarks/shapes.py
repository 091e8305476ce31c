"""Drawn shapes whose masks are known, in any number, from a seed: as COCO's annotations, and more.

Discs, squares and triangles of several colours before a dark, noisy background; no two of an image
touch or have the same colour.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

KINDS = ("disc", "square", "triangle")
# Levels from 0 to 1. Less `GREY` no two are alike: their cosines are 0 or negative.
COLOURS = np.array([[0.95, 0.25, 0.25], [0.25, 0.95, 0.25], [0.25, 0.25, 0.95]])
BEHIND, GREY = 0.2, 0.45
NOISE = 0.03


class Drawn(NamedTuple):
    """An image (H, W, 3) uint8, and of each of its objects the mask (H, W) and the kind."""

    pixels: np.ndarray
    masks: list[np.ndarray]
    kinds: list[int]


def draw(rng: np.random.Generator, side: int, objects: int) -> Drawn:
    """An image with so many objects, or fewer where no more find a place."""
    masks, kinds = [], []
    image = np.full((side, side, 3), BEHIND)
    taken = np.zeros((side, side), bool)
    colours = rng.permutation(len(COLOURS))
    for _ in range(20 * objects):
        if len(masks) == objects:
            break
        radius = rng.uniform(0.12, 0.22 if objects > 1 else 0.3) * side
        centre = rng.uniform(radius + 2, side - radius - 2, 2)
        kind = int(rng.integers(len(KINDS)))
        mask = shape_mask(kind, centre, radius, side)
        near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        if not (near & taken).any():
            taken |= mask
            image[mask] = COLOURS[colours[len(masks)]]
            masks.append(mask)
            kinds.append(kind)
    image += NOISE * rng.standard_normal(image.shape)
    return Drawn(np.rint(255 * image.clip(0, 1)).astype(np.uint8), masks, kinds)


def shape_mask(kind: int, centre: np.ndarray, radius: float, side: int) -> np.ndarray:
    """The pixels (side, side) of a shape."""
    y, x = np.indices((side, side)) + 0.5 - centre[:, None, None]
    if kind == 0:
        return x**2 + y**2 < radius**2
    if kind == 1:
        return np.maximum(abs(x), abs(y)) < 0.85 * radius
    return (y < 0.8 * radius) & (2 * abs(x) < y + radius)


def drawn_set(seed: int, count: int, side: int, most: int) -> list[Drawn]:
    """So many images of 1 … most objects."""
    rng = np.random.default_rng(seed)
    return [draw(rng, side, int(rng.integers(1, most + 1))) for _ in range(count)]


def write_coco(folder: Path, images: list[Drawn]) -> Path:
    """The images below ``folder/images`` and their annotations, whose path is returned."""
    from pycocotools import mask as coco_mask

    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, (pixels, masks, kinds) in enumerate(images, start=1):
        name = f"{number:04d}.png"
        cv2.imwrite(str(folder / "images" / name), pixels[..., ::-1])
        height, width = pixels.shape[:2]
        rows.append({"id": number, "file_name": name, "height": height, "width": width})
        for mask, kind in zip(masks, kinds, strict=True):
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "segmentation": code | {"counts": code["counts"].decode()},
                    "bbox": coco_mask.toBbox(code).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": kind} for k, kind in enumerate(KINDS)]
    content = {"images": rows, "annotations": objects, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def write_classes(folder: Path, images: list[Drawn]) -> None:
    """Images of one object each as ``folder/KIND/NUMBER.png``."""
    for number, drawn in enumerate(images):
        of = folder / KINDS[drawn.kinds[0]]
        of.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(of / f"{number:05d}.png"), drawn.pixels[..., ::-1])


def colour_features(pixels: np.ndarray, patch: int) -> np.ndarray:
    """The mean colour of each patch less grey (P, 3): features that tell the shapes apart."""
    H, W = (side // patch for side in pixels.shape[:2])
    cells = pixels.reshape(H, patch, W, patch, 3) / 255 - GREY
    return cells.mean(axis=(1, 3)).reshape(H * W, 3)


def write_voc(folder: Path, images: list[Drawn]) -> None:
    """Images and their classes, 1 … 3, as a folder of VOC's: all in the split val."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}" for number in range(1, len(images) + 1)]
    for name, drawn in zip(names, images, strict=True):
        classes = np.zeros(drawn.pixels.shape[:2], np.uint8)
        for mask, kind in zip(drawn.masks, drawn.kinds, strict=True):
            classes[mask] = kind + 1
        cv2.imwrite(str(folder / "JPEGImages" / f"{name}.png"), drawn.pixels[..., ::-1])
        cv2.imwrite(str(folder / "SegmentationClass" / f"{name}.png"), classes)
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(names) + "\n")
