"""Plain folders and folders as VOC's: what is read, and what does not match."""

import cv2
import numpy as np
import pytest
from PIL import Image

from crate_jax.analysis.coarse_masks import class_scores, mean_iou
from crate_jax.data.annotated import (
    folder_pictures,
    is_voc,
    read_labels,
    voc_pictures,
)
from crate_jax.data.rows import BadExampleError


def save_palette(path, labels, **options):
    indexed = Image.new("P", labels.shape[::-1])
    indexed.putpalette([7 * value % 256 for value in range(768)])
    indexed.putdata(labels.ravel().tolist())
    indexed.save(path, **options)


# A class in the left half, one in a quarter; a frame of void; and nothing at all.
LABELS = [np.zeros((8, 8), int) for _ in range(4)]
LABELS[0][:, :4] = 15
LABELS[1][:4, :4], LABELS[1][4:, 4:] = 3, 20
LABELS[2][:, :4] = 1
LABELS[2][0] = LABELS[2][-1] = 255


@pytest.fixture
def voc(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"2007_{i:06d}" for i in range(4)]
    for name, labels in zip(names, LABELS, strict=True):
        image = np.full((8, 8, 3), 90, np.uint8)
        cv2.imwrite(str(tmp_path / "JPEGImages" / f"{name}.jpg"), image)
        save_palette(tmp_path / "SegmentationClass" / f"{name}.png", labels)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def test_mean_iou_by_hand(voc):
    """Two heads: one sees the left half of every image, the other its upper half."""
    heads = np.zeros((2, 8, 8), bool)
    heads[0, :, :4] = heads[1, :4] = True
    pictures = voc_pictures(str(voc))
    scores = [class_scores(heads, read_labels(picture.labels)) for picture in pictures]
    # The first image fits. In the second a quarter is half of either head; the other quarter
    # touches neither. Of the third 24 pixels are left of class and head. The last has no class.
    assert scores == [{15: 1.0}, {3: 0.5, 20: 0.0}, {1: 1.0}, {}]
    assert mean_iou(scores) == pytest.approx((1 + 0.25 + 1) / 3)
    assert (pictures[2].pixels(3) == 90).all() and pictures[2].number == 3
    listing = voc / "ImageSets/Segmentation/val.txt"
    listing.write_bytes(b"\xef\xbb\xbf" + listing.read_bytes().replace(b"\n", b"\r\n"))
    assert voc_pictures(str(voc)) == pictures  # as Windows' editors write it
    assert is_voc(str(voc)) and not is_voc(str(voc / "JPEGImages"))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_of_a_palette(bits, tmp_path):
    labels = np.random.default_rng(0).integers(0, 2**bits, (5, 9))
    save_palette(tmp_path / "x.png", labels, bits=bits)
    assert (tmp_path / "x.png").read_bytes()[24] == bits
    np.testing.assert_array_equal(read_labels(str(tmp_path / "x.png")), labels)
    save_palette(tmp_path / "t.png", labels, bits=bits, transparency=0)
    np.testing.assert_array_equal(read_labels(str(tmp_path / "t.png")), labels)


def test_grey_is_a_class_too(tmp_path):
    labels = np.random.default_rng(0).integers(0, 256, (5, 9)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), labels)
    np.testing.assert_array_equal(read_labels(str(tmp_path / "x.png")), labels)


def test_labels_that_are_none(tmp_path):
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(BadExampleError, match="must be a PNG with a palette or of grey"):
        read_labels(str(path))
    cv2.imwrite(str(path), np.zeros((4, 4), np.uint16))
    with pytest.raises(BadExampleError, match="must be a PNG of 8 bits or fewer"):
        read_labels(str(path))
    save_palette(path, LABELS[0])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadExampleError, match="that decodes; it has 8 bits, 50 bytes"):
        read_labels(str(path))
    path.write_bytes(b"GIF89a")
    with pytest.raises(BadExampleError, match="must be a PNG with a palette or of grey"):
        read_labels(str(path))


def test_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/1.png", "a.jpg"):
        cv2.imwrite(str(tmp_path / name), np.full((4, 6, 3), 50, np.uint8))
    (tmp_path / "notes.txt").write_text("x")
    found = folder_pictures(str(tmp_path))
    assert [(p.name, p.number) for p in found] == [("a", 1), ("b/1", 2)]
    assert found[0].pixels(3).shape == (4, 6, 3) and found[0].pixels(1).shape == (4, 6, 1)
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(BadExampleError, match=r"a\.jpg must be an image; its 2 bytes"):
        found[0].pixels(3)


def test_what_is_not_there(voc, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder; there is none"):
        folder_pictures(str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold images"):
        folder_pictures(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"Segmentation lists in .*, val; got test\. Name"):
        voc_pictures(str(voc), "test")
    (voc / "SegmentationClass/2007_000002.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 are not there, such as 2007_000002"):
        voc_pictures(str(voc))
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="must name images, one a line; it is empty"):
        voc_pictures(str(voc))
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    (voc / "ImageSets/Segmentation").rmdir()
    with pytest.raises(FileNotFoundError, match="of which there is none; got val"):
        voc_pictures(str(voc))
