"""Pictures with annotations as COCO's: one JSON file beside a folder of images."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crate_jax.analysis import rle
from crate_jax.data.annotated import Picture, check_all_there, images_below, stem
from crate_jax.data.stores import storage
from crate_jax.files import Json


def coco_pictures(annotations: str, folder: str) -> tuple[list[Picture], Json]:
    """The images of a file of annotations as COCO's, and what the file holds.

    All of it is looked at, as COCO's code looks at nothing: it fails in its middle, or computes.

    Args:
        annotations: the JSON file.
        folder: where the images are.

    Raises:
        FileNotFoundError: there is no such file, or it names images that are not in the folder.
        ValueError: it is no such file, has no object, or says something that cannot be.
    """
    content = _content(annotations)
    for kind, rules in RULES.items():
        _check_rows(content[kind], rules, kind, annotations)
    images, objects = content["images"], content["annotations"]
    sizes = {row["id"]: (row["height"], row["width"]) for row in images}
    if unknown := sorted({row["image_id"] for row in objects} - {*sizes}):
        raise ValueError(
            f"{annotations} must have annotations of its own images; {len(unknown)} are of others, "
            f"such as {unknown[0]}. Name the file that goes with the images."
        )
    if not objects:
        raise ValueError(f"{annotations} must hold an object; it has none. Name another.")
    for place, row in enumerate(objects):
        height, width = sizes[row["image_id"]]
        if not _is_mask(row["segmentation"], height, width):
            raise ValueError(
                f"{annotations} must have polygons [[x, y, x, y, x, y, …], …] or run lengths of "
                f"the image's size, {height} x {width}, as segmentation of every object; that of "
                f"annotations[{place}] (id {row['id']}) is neither. Correct it."
            )
    known = {name: name for name in images_below(folder)}
    check_all_there([row["file_name"] for row in images], known, annotations, folder)
    pictures = [
        Picture(
            storage.join(folder, row["file_name"]),
            stem(row["file_name"]),
            row["id"],
            size=sizes[row["id"]],
        )
        for row in images
    ]
    return pictures, content


def _content(annotations: str) -> Json:
    """Read the lists of images and annotations of a file of annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    try:
        stored = storage.read_bytes(annotations)
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if isinstance(error, IsADirectoryError) else "no file there"
        raise FileNotFoundError(
            f"--annotations must be a JSON file as COCO's; got {annotations}, {found}. "
            "Correct the path."
        ) from error
    try:
        content = json.loads(stored)
        lists = [content[kind] for kind in RULES]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        content, lists, found = {}, [None], f"{type(error).__name__}: {error}"
    else:
        found = "something else stands there"
    if not all(isinstance(rows, list) and all(isinstance(r, dict) for r in rows) for rows in lists):
        raise ValueError(
            f"{annotations} must be annotations as COCO's, JSON with images [{{id, file_name, …}}, "
            f"…] and annotations [{{image_id, …}}, …]; it is not ({found}). Name another."
        )
    return content


def _check_rows(
    rows: Sequence[Json], rules: Mapping[str, "Rule"], kind: str, annotations: str
) -> None:
    """Refuse images or objects with a missing or impossible value, or an id that occurs twice.

    Raises:
        ValueError: one does.
    """
    if lacking := sorted({name for row in rows for name in rules if name not in row}):
        raise ValueError(
            f"{annotations} must say {', '.join(rules)} of all its {kind}; some lack "
            f"{', '.join(lacking)}. Add them."
        )
    seen: set[int] = set()
    for place, row in enumerate(rows):
        for name, (holds, rule) in rules.items():
            if not holds(row[name]):
                raise ValueError(
                    f"{annotations} must have {rule} as {name} of all its {kind}; {kind}[{place}] "
                    f"has {json.dumps(row[name])[:60]}. Correct it."
                )
        if row["id"] in seen:
            raise ValueError(
                f"{annotations} must give each of its {kind} an id of its own; {row['id']} stands "
                "there twice. Correct it."
            )
        seen.add(row["id"])


def _is_number(value: Any) -> bool:
    """True for a finite number that is no truth value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < math.inf


def _is_whole(value: Any) -> bool:
    """True for a whole number that is not written as text or with a point."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    """True for a number of pixels."""
    return _is_whole(value) and value > 0


def _is_box(value: Any) -> bool:
    """True for left, top, width and height."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(_is_number, value))
        and min(value[2:]) >= 0
    )


def _is_mask(value: Any, height: int, width: int) -> bool:
    """True for polygons, or for run lengths that fill an image of this size."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_polygon, value))
    if not isinstance(value, dict) or value.get("size") != [height, width]:
        return False
    runs = value.get("counts")
    if isinstance(runs, str):
        try:
            runs = rle.runs(runs)
        except ValueError:
            return False
    if not isinstance(runs, list) or not all(_is_whole(run) and run >= 0 for run in runs):
        return False
    return sum(runs) == height * width


def _is_polygon(value: Any) -> bool:
    """True for the coordinates of three corners or more."""
    corners = isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0
    return corners and all(map(_is_number, value))


Rule = tuple[Callable[[Any], bool], str]
# The values that COCO's code reads of an image and an object, with rules; see `_is_mask` too.
RULES: dict[str, dict[str, Rule]] = {
    "images": {
        "id": (_is_whole, "a whole number"),
        "file_name": (lambda value: isinstance(value, str), "a path below the folder"),
        "height": (_is_side, "a whole number of pixels"),
        "width": (_is_side, "a whole number of pixels"),
    },
    "annotations": {
        "id": (_is_whole, "a whole number"),
        "image_id": (_is_whole, "a whole number"),
        "category_id": (lambda value: value is not None, "a category"),
        "bbox": (_is_box, "[left, top, width, height]"),
        "area": (lambda value: _is_number(value) and value >= 0, "a number of pixels"),
        "segmentation": (lambda value: isinstance(value, list | dict), "polygons or run lengths"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    },
}
