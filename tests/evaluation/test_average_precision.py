"""Average precision without classes: of perfect results, of worse ones, and of none."""

import json
import sys

import numpy as np
import pytest
from command import ROOT

from crate_jax.analysis.maskcut import enlarge, maskcut
from crate_jax.analysis.rle import box, encode
from crate_jax.evaluation.average_precision import average_precision

sys.path.append(str(ROOT / "benchmarks"))

import shapes


@pytest.fixture(scope="module")
def drawn():
    return shapes.drawn_set(seed=0, count=10, side=44, most=3)


@pytest.fixture(scope="module")
def annotations(drawn, tmp_path_factory):
    return json.loads(shapes.write_coco(tmp_path_factory.mktemp("coco"), drawn).read_text())


def row(image, mask, score):
    of = dict(bbox=box(mask), segmentation=encode(mask))
    return dict(image_id=image, category_id=1, score=score, **of)


def test_the_truth_itself_and_less(drawn, annotations):
    rows = [row(i, mask, 0.5) for i, each in enumerate(drawn, 1) for mask in each.masks]
    ids = range(1, 11)
    assert set(average_precision(annotations, rows, ids).values()) == {1.0}
    assert average_precision(annotations, [], ids) == dict.fromkeys(
        ["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"], 0.0
    )
    half = average_precision(annotations, rows[::2], ids)
    assert half["mask_ap"] == pytest.approx(len(rows[::2]) / len(rows), abs=0.01)
    first = {1: drawn[0].masks}
    assert average_precision(
        annotations, [row(1, mask, 1) for mask in first[1]], [1]
    ) == dict.fromkeys(average_precision(annotations, [], ids), 1.0)


def test_a_box_may_fit_where_a_mask_does_not(annotations, drawn):
    rows = []
    for number, each in enumerate(drawn, 1):
        for mask in each.masks:
            left, top, width, height = map(int, box(mask))
            filled = np.zeros_like(mask)
            filled[top : top + height, left : left + width] = True
            rows.append(row(number, filled, 0.5))
    found = average_precision(annotations, rows, range(1, 11))
    assert found["box_ap"] == 1 and found["mask_ap50"] > found["mask_ap"]
    overlaps = [mask.sum() / (box(mask)[2] * box(mask)[3]) for each in drawn for mask in each.masks]
    steps = np.arange(0.5, 1, 0.05)
    expected = np.mean([np.mean(np.array(overlaps) >= step) ** 2 for step in steps])
    assert found["mask_ap"] == pytest.approx(expected, abs=0.2)


def test_features_that_tell_the_shapes_apart_find_them(drawn, annotations):
    """Each pixel a patch, whose feature is its colour."""
    rows = []
    for number, each in enumerate(drawn, 1):
        cuts = maskcut(shapes.colour_features(each.pixels, 1), (44, 44))
        rows += [row(number, enlarge(c.mask_P, (44, 44), (44, 44)), 1 - c.cost) for c in cuts]
    found = average_precision(annotations, rows, range(1, 11))
    assert min(found.values()) >= 0.9, found


def test_any_id_of_an_object_will_do(drawn, annotations):
    """COCO's code takes an object with the id 0 for none, and counts what finds it as wrong."""
    rows = [row(i, mask, 0.5) for i, each in enumerate(drawn, 1) for mask in each.masks]
    other = [{**each, "id": each["id"] - 1} for each in annotations["annotations"]]
    found = average_precision({**annotations, "annotations": other}, rows, range(1, 11))
    assert min(found.values()) == pytest.approx(1)


def test_categories_do_not_count(drawn, annotations):
    rows = [row(i, mask, 0.5) for i, each in enumerate(drawn, 1) for mask in each.masks]
    other = [{**each, "category_id": 40 + each["id"] % 3} for each in annotations["annotations"]]
    found = average_precision({**annotations, "annotations": other}, rows, range(1, 11))
    assert min(found.values()) == pytest.approx(1)


def test_polygons_are_masks_too():
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
    whole = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=36.0, bbox=[2.0, 2.0, 6.0, 6.0])
    images = [dict(id=1, file_name="x.png", height=12, width=12)]
    annotations = dict(images=images, annotations=[whole | {"segmentation": [square]}])
    mask = np.zeros((12, 12), bool)
    mask[2:8, 2:8] = True
    found = average_precision(annotations, [row(1, mask, 1)], [1])
    assert min(found.values()) == pytest.approx(1)


def test_what_it_refuses(annotations, monkeypatch):
    with pytest.raises(ValueError, match=r"^annotations must hold an object of these images that"):
        average_precision(annotations, [], [99])
    crowds = [{**each, "iscrowd": 1} for each in annotations["annotations"]]
    with pytest.raises(ValueError, match=r"of these images that is no crowd; got none\. Take more"):
        average_precision({**annotations, "annotations": crowds}, [], range(1, 11))
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ValueError, match=r"^segment must have pycocotools .*crate-jax\[segment\]"):
        average_precision(annotations, [], [1])
