"""Average precision of masks and boxes, whatever their class, by COCO's own code."""

import contextlib
import io
from collections.abc import Collection, Sequence
from typing import Any

from crate_jax.files import Json

# Places in the summary of COCO's code.
MEASURES = {"ap": 0, "ap50": 1, "ap75": 2}


def require_pycocotools() -> None:
    """Refuse to go on without the package.

    Raises:
        ValueError: it is missing.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "segment must have pycocotools to score against annotations; it is missing. "
            "Install it: pip install 'crate-jax[segment]'"
        ) from error


def require_objects(annotations: Json, images: Collection[int]) -> None:
    """Refuse images without anything to score.

    Args:
        annotations: what a file of COCO's annotations holds.
        images: ids of the images that count.

    Raises:
        ValueError: they have no object but crowds, which COCO's code leaves out.
    """
    wanted = {*images}
    rows = annotations["annotations"]
    if not any(row["image_id"] in wanted and not row["iscrowd"] for row in rows):
        raise ValueError(
            "annotations must hold an object of these images that is no crowd; got none. Take more "
            "images."
        )


def average_precision(
    annotations: Json, results: Sequence[Json], images: Collection[int]
) -> dict[str, float]:
    """AP, AP50 and AP75 of boxes and of masks, class-agnostic: every object counts as one class.

    AP is the mean over ten thresholds of the overlap, 0.5 … 0.95, at most 100 results an image.

    Args:
        annotations: what a file of COCO's annotations holds.
        results: as COCO's results: image_id, category_id, bbox, segmentation (run lengths), score.
        images: ids of the images that count.

    Returns:
        ``box_ap``, ``box_ap50``, ``box_ap75``, ``mask_ap``, …, from 0 to 1; all 0 without results.

    Raises:
        ValueError: pycocotools is missing, or the images have no object but crowds.
    """
    require_pycocotools()
    require_objects(annotations, images)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted = {*images}
    found: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # of what they do
        truth: Any = COCO()
        # One class for all: COCO's own switch for that drops what is of an unlisted category.
        # An id of 0 would be taken for none: the object found would count as not found.
        objects = [
            {**row, "category_id": 1, "id": number}
            for number, row in enumerate(annotations["annotations"], start=1)
        ]
        truth.dataset = {**annotations, "annotations": objects, "categories": [{"id": 1}]}
        truth.createIndex()
        kinds: Any = {"box": "bbox", "mask": "segm"}
        for name, kind in kinds.items():
            if not results:
                found |= {f"{name}_{measure}": 0.0 for measure in MEASURES}
                continue
            guesses = truth.loadRes([{**row, "category_id": 1} for row in results])
            evaluation = COCOeval(truth, guesses, kind)
            evaluation.params.imgIds = sorted(wanted)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found |= {f"{name}_{m}": float(evaluation.stats[at]) for m, at in MEASURES.items()}
    return found
