"""Annotations as COCO's: what is read, and what is refused before any work."""

import json
import sys

import pytest
from command import ROOT

from crate_jax.data.coco import coco_pictures
from crate_jax.data.rows import BadExampleError

sys.path.append(str(ROOT / "benchmarks"))

import shapes


@pytest.fixture
def coco(tmp_path):
    drawn = shapes.drawn_set(seed=1, count=3, side=40, most=2)
    path = shapes.write_coco(tmp_path, drawn)
    return path, json.loads(path.read_text())


def test_coco_s(coco):
    path, content = coco
    pictures, same = coco_pictures(str(path), str(path.parent / "images"))
    assert same == content
    assert [(p.number, p.size) for p in pictures] == [(n, (40, 40)) for n in (1, 2, 3)]
    assert pictures[0].pixels(3).shape == (40, 40, 3)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 9.5, 0, 9, 9], [1, 1, 2, 2, 3, 1]],
        {"size": [40, 40], "counts": [10, 90, 1500]},
        {"size": [40, 40], "counts": [1600]},
    ],
)
def test_ways_to_write_a_mask(coco, segmentation):
    path, content = coco
    content["annotations"][0].update(segmentation=segmentation, iscrowd=1, id=0)
    path.write_text(json.dumps(content))
    assert coco_pictures(str(path), str(path.parent / "images"))[1] == content


IMAGE = [
    (dict(id="1"), 'a whole number as id of all its images; images[0] has "1". Correct it.'),
    (dict(id=True), "a whole number as id of all its images; images[0] has true"),
    (dict(id=2), "must give each of its images an id of its own; 2 stands there twice"),
    (dict(file_name=7), "a path below the folder as file_name of all its images; images[0] has 7"),
    (dict(height=None), "a whole number of pixels as height of all its images; images[0] has null"),
    (dict(width="x"), 'a whole number of pixels as width of all its images; images[0] has "x"'),
    (dict(width=0), "a whole number of pixels as width of all its images; images[0] has 0"),
]
OBJECT = [
    (dict(id=1.0), "a whole number as id of all its annotations; annotations[0] has 1.0"),
    (dict(id=2), "must give each of its annotations an id of its own; 2 stands there twice"),
    (
        dict(image_id="1"),
        'a whole number as image_id of all its annotations; annotations[0] has "',
    ),
    (dict(image_id=77), "must have annotations of its own images; 1 are of others, such as 77"),
    (dict(category_id=None), "a category as category_id of all its annotations; ann"),
    (
        dict(bbox=[1, 2]),
        "[left, top, width, height] as bbox of all its annotations; anno",
    ),
    (dict(bbox=[1, 2, -1, 3]), "[left, top, width, height] as bbox of all its annotations; anno"),
    (dict(bbox=[1, 2, "3", 3]), "[left, top, width, height] as bbox of all its annotations; anno"),
    (
        dict(area=float("nan")),
        "a number of pixels as area of all its annotations; anno",
    ),
    (dict(area=True), "a number of pixels as area of all its annotations; annotations[0] has true"),
    (dict(iscrowd=None), "0 or 1 as iscrowd of all its annotations; annotations[0] has null"),
    (dict(segmentation=None), "polygons or run lengths as segmentation of all its annotations; an"),
]
MASKS = [
    *([], [[1, 2]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, None]], ["123456"]),
    *({}, {"size": [40, 41], "counts": [1640]}, {"size": [40, 40], "counts": [1601]}),
    *({"size": [40, 40], "counts": [-1, 1601]}, {"size": [40, 40], "counts": [1600.0]}),
    *({"size": [40, 40], "counts": "%%%"}, {"size": [40, 40], "counts": ""}),
    *({"size": [40, 40]}, {"size": [40, 40], "counts": "P"}),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *(("images", *row) for row in IMAGE),
        *(("annotations", *row) for row in OBJECT),
        *(
            ("annotations", {"segmentation": mask}, "size, 40 x 40, as segmentation of every objec")
            for mask in MASKS
        ),
    ],
)
def test_values_that_cannot_be(coco, kind, change, message):
    path, content = coco
    content[kind][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        coco_pictures(str(path), str(path.parent / "images"))
    assert message in str(caught.value) and str(caught.value).startswith(f"{path} must ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"must be annotations as COCO's, JSON with images .*KeyError"),
        (lambda c: c.update(images={}), "as COCO's, .*; it is not .something else stands there"),
        (lambda c: c["annotations"].append(5), "as COCO's, .* .something else stands there"),
        (lambda c: c["images"][0].pop("id"), "of all its images; some lack id. Add them"),
        (lambda c: c["images"][0].pop("height"), "of all its images; some lack height"),
        (lambda c: c["annotations"][0].pop("area"), "of all its annotations; some lack area"),
        (lambda c: c["annotations"].clear(), "must hold an object; it has none"),
        (lambda c: c["images"][1].update(file_name="x.png"), "1 of 3 are not there, such as x.png"),
    ],
)
def test_annotations_that_are_not_those(coco, change, message):
    path, content = coco
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        coco_pictures(str(path), str(path.parent / "images"))


def test_no_annotations(tmp_path):
    for path, found in ((tmp_path / "no.json", "no file there"), (tmp_path, "a folder")):
        with pytest.raises(FileNotFoundError) as caught:
            coco_pictures(str(path), str(tmp_path))
        assert str(caught.value) == (
            f"--annotations must be a JSON file as COCO's; got {path}, {found}. Correct the path."
        )
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must be annotations as COCO's"):
        coco_pictures(str(tmp_path / "x.json"), str(tmp_path))


def test_an_image_of_another_size(coco):
    path, content = coco
    content["images"][0]["height"] = 41
    for row in content["annotations"]:
        row["segmentation"] = [[1, 1, 5, 5, 9, 1]]
    path.write_text(json.dumps(content))
    pictures, _ = coco_pictures(str(path), str(path.parent / "images"))
    with pytest.raises(BadExampleError, match="must be 41 x 40, as its annotations say; it is 40"):
        pictures[0].pixels(3)
