"""Do a CRATE's tokens find drawn shapes that it has only learnt to name? AP and mIoU of MaskCut.

    python benchmarks/segment_shapes.py --output benchmarks/results/segment_shapes_cpu_2core.json

The masks are known: `shapes.py` draws images of 1 … 3 discs, squares and triangles from a seed. A
small CRATE learns to tell the three, of images with one shape each, by the project's own training.
Then MaskCut and coarse masks, with the defaults of `python -m crate_jax segment`, by the tokens of
each layer, trained and with random weights; and MaskCut by features that tell the shapes apart, the
colour of each patch of 2 pixels. AP is class-agnostic. The last line is JSON; --output writes it,
and the table beside it as Markdown.
"""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from frame import Result, command_line, publish, table

from crate_jax.analysis import taps
from crate_jax.analysis.coarse_masks import (
    class_attention,
    class_scores,
    mean_iou,
    share_of_entries,
)
from crate_jax.analysis.maskcut import enlarge, maskcut
from crate_jax.analysis.rle import box, encode
from crate_jax.checkpoint.reading import inspect
from crate_jax.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from crate_jax.data.images.resize import resize_pixels
from crate_jax.evaluation.average_precision import average_precision
from crate_jax.interop import load_fitted
from crate_jax.tasks.pixels import normalize
from crate_jax.training.loop import train

SIDE, IMAGES, MOST = 96, 24, 3
SIZES = (SIDE, 2 * SIDE)  # that the tokens are read at: the trained size, and twice that
MODEL = "crate_tiny_patch16_224"
FIELDS = dict(image_size=SIDE, patch_size=8, in_channels=3, width=96, depth=4, num_heads=3)
APS = ("box_ap50", "box_ap75", "box_ap", "mask_ap50", "mask_ap75", "mask_ap")
TRAINING = {"train": 1200, "test": 240}
LARGE, SMALL = 128, 2  # side and patch of the colours


def config(folder: Path, steps: int) -> TrainConfig:
    """A CRATE of 4 layers on images of one shape each."""
    return TrainConfig(
        name="shapes",
        batch_size=40,
        eval_batch_size=80,
        total_steps=steps,
        log_every_steps=50,
        eval_every_steps=steps,
        log_objective_every_steps=0,
        model=ModelConfig(**FIELDS | dict(name=MODEL, image_size=(SIDE, SIDE), patch_size=(8, 8))),
        data=DataConfig(
            dataset="folder",
            data_dir=str(folder),
            train_transforms=f"resize({SIDE})",
            eval_transforms=f"resize({SIDE})",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=1),
    )


def learnt(steps: int, workdir: Path) -> float:
    """Train on images of one shape each; the top-1 on the test images."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        for seed, (split, count) in enumerate(TRAINING.items(), start=1):
            shapes.write_classes(folder / split, shapes.drawn_set(seed, count, SIDE, most=1))
        return train(config(folder, steps), workdir)["test/top1"]


def measure(steps: int, workdir: str | None) -> Result:
    """Everything; of a run that is there already, its newest checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(workdir or name)
        if not (folder / "checkpoints").is_dir():
            learnt(steps, folder)
        loaded = load_fitted(folder, None)
        checkpoint = inspect(folder)[-1]
    model, drawn = loaded.model, shapes.drawn_set(0, IMAGES, SIDE, MOST)
    init = jax.jit(lambda key: model.init(key, model.sample_input(), train=False)["params"])
    weights = {"trained": loaded.params, "random": init(jax.random.key(0))}
    rows = [
        {"weights": name, "size": size, "layer": layer} | scores(W_BxNxKxp, drawn)
        for size in SIZES
        for name, params in weights.items()
        for layer, W_BxNxKxp in enumerate(tokens(model, params, drawn, size), start=1)
    ]
    cells = {size: size // FIELDS["patch_size"] for size in SIZES}
    return {
        "trained_steps": checkpoint["step"],
        "top1": checkpoint["metrics"]["test/top1"],
        "objects": sum(len(each.masks) for each in drawn),
        "rows": rows,
        "best_of_the_grid": {str(size): by_truth(drawn, cells[size]) for size in SIZES},
        "colours": by_colours(),
    }


def tokens(model: Any, params: Any, drawn: list[shapes.Drawn], size: int) -> np.ndarray:
    """Subspace tokens (L, B, N, K, p) of images resized to so many pixels a side."""
    pixels = np.stack([resize_pixels(each.pixels, (size, size)) for each in drawn])

    def read(params, images):
        return taps(model, params, images, names="subspace_tokens")[1]["subspace_tokens"]

    images = normalize(jnp.asarray(pixels), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return np.asarray(jax.jit(read)(params, images))


def scores(W_BxNxKxp: np.ndarray, drawn: list[shapes.Drawn]) -> Result:
    """AP of MaskCut and mIoU of coarse masks by the tokens of one layer."""
    side = math.isqrt(W_BxNxKxp.shape[1])
    found, fits = [], []
    masks_BxKxP = share_of_entries(class_attention(jnp.asarray(W_BxNxKxp)))
    for W_NxKxp, masks_KxP, each in zip(W_BxNxKxp, np.asarray(masks_BxKxP), drawn, strict=True):
        cuts = maskcut(W_NxKxp[1:].reshape(side**2, -1), (side, side))
        found.append([(cut.mask_P, 1 - cut.cost) for cut in cuts])
        masks = np.stack([enlarge(mask, (side, side), (SIDE, SIDE)) for mask in masks_KxP])
        classes = sum((k + 1) * mask for k, mask in zip(each.kinds, each.masks, strict=True))
        fits.append(class_scores(masks, np.asarray(classes)))
    return ap_of(drawn, found, side) | {"coarse_miou": mean_iou(fits)}


def by_truth(drawn: list[shapes.Drawn], cells: int) -> Result:
    """AP of the true masks, as far as a grid of so many cells a side can show them."""
    cell = SIDE / cells
    at = ((np.arange(cells) + 0.5) * cell).astype(int)
    masks = [[mask[np.ix_(at, at)] for mask in each.masks] for each in drawn]
    return ap_of(drawn, [[(mask.ravel(), 1.0) for mask in each] for each in masks], cells)


def by_colours() -> Result:
    """AP of MaskCut of the colours of small patches."""
    drawn = shapes.drawn_set(0, IMAGES, LARGE, MOST)
    cells = LARGE // SMALL
    found = []
    for each in drawn:
        cuts = maskcut(shapes.colour_features(each.pixels, SMALL), (cells, cells))
        found.append([(cut.mask_P, 1 - cut.cost) for cut in cuts])
    return {"side": LARGE, "patch": SMALL} | ap_of(drawn, found, cells)


def ap_of(drawn: list[shapes.Drawn], found: list[list[tuple[Any, float]]], cells: int) -> Result:
    """AP of masks (P,) and their scores, of each image."""
    results = []
    for number, (each, masks) in enumerate(zip(drawn, found, strict=True), start=1):
        for mask_P, score in masks:
            mask = enlarge(mask_P, (cells, cells), each.pixels.shape[:2])
            code = {"bbox": box(mask), "segmentation": encode(mask), "score": score}
            results.append({"image_id": number, "category_id": 1} | code)
    with tempfile.TemporaryDirectory() as name:
        annotations = json.loads(shapes.write_coco(Path(name), drawn).read_text())
    return average_precision(annotations, results, range(1, len(drawn) + 1))


def report(result: Result) -> list[str]:
    """The table, and what it is to be compared with."""
    heads = "weights | pixels of a side | layer | " + " | ".join(
        name.replace("_", " ") for name in (*APS, "coarse_miou")
    )
    rows = [
        f"{row['weights']} | {row['size']} | {row['layer']} | "
        + " | ".join(f"{100 * row[name]:.1f}" for name in (*APS, "coarse_miou"))
        for row in result["rows"]
    ]
    for name, of in result["best_of_the_grid"].items():
        cells = " | ".join(f"{100 * of[key]:.1f}" for key in APS)
        rows.append(f"the true masks, as patches | {name} | | {cells} |")
    cells = " | ".join(f"{100 * result['colours'][key]:.1f}" for key in APS)
    rows.append(f"colours of patches of {SMALL} | {LARGE} | | {cells} |")
    return [
        *table(heads, rows),
        "",
        f"AP and mIoU in percent; {IMAGES} images of {SIDE} pixels, {result['objects']} objects. "
        f"The CRATE names the shape of {result['top1']:.1%} of its test images.",
    ]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workdir", help="of the training; a run that is there is not trained on")
    args = parser.parse_args()
    publish(args, measure(args.steps, args.workdir), "scipy", "pycocotools", report=report)


if __name__ == "__main__":
    main()
