"""The pictures of docs/segmentation.md, from a run on digits.

    python train.py --workdir=runs/digits
    python benchmarks/segment_pictures.py --workdir=runs/digits

Each is what `python -m crate_jax segment` draws, of scikit-learn's digits and photographs, some
below each other and shrunk; and MaskCut of the colours of patches, which nothing had to learn.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import cv2
import numpy as np
from frame import ROOT
from sklearn.datasets import load_digits, load_sample_images

from crate_jax.analysis.maskcut import enlarge, maskcut
from crate_jax.analysis.overlays import overlay, write_panels
from crate_jax.cli.main import main as crate_jax
from crate_jax.data.images.resize import resize_pixels

DIGITS = (1500, 1510, 1533)  # of the test split: 1, 6, 7
SIZE, PATCH = 480, 8
# By the picture: images, flags, and how many pixels wide it becomes; 0: as it is drawn.
PICTURES = {
    "digits_maskcut": ("digits", ["--size", "96"], 0),
    "digits_coarse": ("digits", ["--size", "96", "--method", "coarse", "--share_of", "mass"], 0),
    "digits_pca": ("digits", ["--size", "96", "--method", "pca"], 0),
    "photographs_maskcut": ("photographs", [], 460),
    "photographs_coarse": ("photographs", ["--method", "coarse", "--head", "1"], 360),
    "photographs_pca": ("photographs", ["--method", "pca"], 480),
}


def write_images(folder: Path) -> None:
    """Digits as the run sees them, of 32 pixels, and the two photographs."""
    (folder / "digits").mkdir()
    (folder / "photographs").mkdir()
    scans = load_digits()
    for place in DIGITS:
        scan = np.rint(scans.images[place] * 255 / 16).astype(np.uint8)[..., None]
        large = resize_pixels(scan, (32, 32))
        cv2.imwrite(str(folder / "digits" / f"{scans.target[place]}.png"), large)
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        cv2.imwrite(str(folder / "photographs" / f"{name}.png"), image[..., ::-1])


def colours(folder: Path) -> None:
    """MaskCut of the mean colour of each patch, less that of the image."""
    cells = SIZE // PATCH
    grid = (cells, cells)
    for number, image in enumerate(load_sample_images().images):
        small = resize_pixels(image, (SIZE, SIZE)) / 255
        features = small.reshape(cells, PATCH, cells, PATCH, 3).mean(axis=(1, 3)).reshape(-1, 3)
        cuts = maskcut(features - features.mean(axis=0), grid)
        masks = [enlarge(cut.mask_P, grid, image.shape[:2]) for cut in cuts]
        write_panels(folder / f"{number}.png", [[image, overlay(image, masks)]])


def joined(folder: Path, name: str, width: int) -> None:
    """The pictures of a folder below each other, in docs/."""
    shown = [cv2.imread(str(path)) for path in sorted(folder.glob("*.png"))]
    space = np.full((4, shown[0].shape[1], 3), 255, np.uint8)
    sheet = np.concatenate([part for each in shown for part in (each, space)][:-1])
    if width:
        sheet = resize_pixels(sheet, (round(len(sheet) * width / sheet.shape[1]), width))
    path = ROOT / "docs" / f"segment_{name}.png"
    cv2.imwrite(str(path), sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(f"{path} {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        for picture, (images, flags, width) in PICTURES.items():
            output = folder / picture
            common = ["--workdir", args.workdir, "--images", str(folder / images)]
            with contextlib.redirect_stdout(io.StringIO()):
                status = crate_jax(["segment", *common, "--output", str(output), *flags])
            if status:
                raise SystemExit(status)
            joined(output, picture, width)
        (folder / "colours").mkdir()
        colours(folder / "colours")
        joined(folder / "colours", "photographs_colours", 380)


if __name__ == "__main__":
    main()
