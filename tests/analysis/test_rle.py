"""Run lengths and boxes of masks, against COCO's own code; and pictures of masks."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from crate_jax.analysis import overlays
from crate_jax.analysis.rle import box, encode, runs


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.98, 1])
@pytest.mark.parametrize("seed", range(4))
def test_as_coco_s(share, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.random(rng.integers(1, 20, 2)) < share
    times = int(rng.integers(1, 90))  # long runs, and differences of both signs
    for mask in (coarse, np.kron(coarse, np.ones((times, 3))) > 0):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode(mask) == {
            "size": list(expected["size"]),
            "counts": expected["counts"].decode(),
        }
        assert coco_mask.area(encode(mask)) == mask.sum()
        lengths = runs(encode(mask)["counts"])
        values = np.repeat(np.arange(len(lengths)) % 2, lengths)
        np.testing.assert_array_equal(values.reshape(mask.shape, order="F"), mask)
        assert box(mask) == coco_mask.toBbox(expected).tolist()


def test_texts_that_are_no_run_lengths():
    with pytest.raises(ValueError, match=r"^run lengths must be of the characters .*; got '%'"):
        runs("1%")
    with pytest.raises(ValueError, match=r"^run lengths must end with a number; '1P' breaks off"):
        runs("1P")


def test_masks_upon_an_image():
    image = np.full((2, 3, 1), 100, np.uint8)
    one, two = np.zeros((2, 2, 3), bool)
    one[0], two[0, 0] = True, True
    shown = overlays.overlay(image, [one, two])
    assert (shown[1] == 100).all()
    np.testing.assert_array_equal(shown[0, 1], np.rint(45 + 0.55 * overlays.COLOURS[0]))
    below = 45 + 0.55 * overlays.COLOURS[0]
    np.testing.assert_array_equal(shown[0, 0], np.rint(0.45 * below + 0.55 * overlays.COLOURS[1]))


def test_maps_as_light():
    np.testing.assert_array_equal(
        overlays.heat(np.array([[0.0, 0.5], [0.2, 0.1]]))[..., 1], [[0, 255], [102, 51]]
    )
    assert not overlays.heat(np.zeros((2, 2))).any()


def test_panels_beside_and_below_each_other(tmp_path):
    panels = [np.full((64, 40, 3), level, np.uint8) for level in (10, 20, 30, 40)]
    overlays.write_panels(tmp_path / "x.png", [panels[:2], panels[2:]])
    shown = cv2.imread(str(tmp_path / "x.png"))
    assert shown.shape == (2 * 192 + 4, 2 * 120 + 4, 3)  # three times as large
    assert (shown[:192, :120] == 10).all() and (shown[196:, 124:] == 40).all()
    assert (shown[192:196] == 255).all() and (shown[:192, 120:124] == 255).all()


def test_panels_stay_of_a_size_to_be_looked_at(tmp_path):
    overlays.write_panels(tmp_path / "x.png", [[np.zeros((2, 400, 3), np.uint8)]])
    assert cv2.imread(str(tmp_path / "x.png")).shape == (6, 1200, 3)  # and not 128 rows
    assert overlays.shown_size(5, 12_800_000) == (1, 1280)
