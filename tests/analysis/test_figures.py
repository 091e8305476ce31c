"""Figures by what they draw: their data against slow loops, their sentences, their files."""

import csv
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from crate_jax.analysis import figures
from crate_jax.analysis.figures import canvas
from crate_jax.analysis.maskcut import Cut
from crate_jax.analysis.pca import foreground

RNG = np.random.default_rng(0)
PIXELS = RNG.random((3, 8, 8, 1))


def rows(picture):
    """The table, a dict a row."""
    names = list(picture.table)
    return [dict(zip(names, row, strict=True)) for row in zip(*picture.table.values(), strict=True)]


def curve_pictures():
    curves = {
        "test": {"rate": figures.Curve(np.array([3.0, 2.0, 2.5]), np.array([0.1, 0.2, 0.3]))},
        "before training": {"rate": figures.Curve(np.array([3.0, 4.0, 5.0]))},
    }
    return figures.by_layer(curves, [figures.Measure("rate", "coding rate", "R in nats")])


def test_measures_by_layer():
    picture = curve_pictures()
    (axes,) = picture.figure.axes
    assert [line.get_label() for line in axes.lines] == ["test", "before training"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3.0, 2.0, 2.5])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])
    (band,) = axes.collections  # the one deviation that is known
    heights = sorted({round(float(y), 6) for y in band.get_paths()[0].vertices[:, 1]})
    assert heights == [1.8, 2.2, 2.8, 2.9, 3.1] or (heights[0] == 1.8 and heights[-1] == 3.1)
    assert picture.alt == (
        "Coding rate (R in nats). Test: 3.00 in layer 1, 2.50 in layer 3, up in layer 3. "
        "Before training: 3.00 in layer 1, 5.00 in layer 3, up at each layer."
    )
    assert rows(picture)[2] == dict(measure="rate", of="test", layer=3, mean=2.5, std=0.3)
    assert rows(picture)[3]["std"] == ""


def test_a_measure_that_falls_and_one_layer():
    falling = {"a": {"m": figures.Curve(np.array([2.0, 1.0]))}, "b": {}}
    measures = [figures.Measure("m", "m", "")]
    assert figures.by_layer(falling, measures).alt == (
        "M. A: 2.00 in layer 1, 1.00 in layer 2, never up."
    )
    one = {"a": {"m": figures.Curve(np.array([2.0]))}}
    assert figures.by_layer(one, measures).alt == "M. A: 2.00 in layer 1."
    five = figures.by_layer(one, measures * 4, columns=3)
    assert len(five.figure.axes) == 4  # of six places


def test_cells_are_means():
    matrix = RNG.normal(size=(7, 5))
    reduced, n = canvas.cells(matrix, largest=3)
    assert n == 3 and reduced.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            expected = matrix[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean()
            assert reduced[i, j] == pytest.approx(expected)
    assert canvas.cells(matrix)[1] == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.1234, "0.123"), (-3.456, "-3.46"), (45.67, "45.7"), (456.7, "457")],
)
def test_numbers_have_three_digits(value, text):
    assert canvas.number(value) == text


def test_numbers_that_are_very_small_or_none():
    assert canvas.number(3.4e-9) == "3.40e-09" and canvas.number(float("nan")) == "not a number"


def test_tokens_are_columns():
    Z = RNG.normal(size=(2, 5, 7)) * (RNG.random((2, 5, 7)) > 0.5)
    picture = figures.token_maps(Z)
    for row in rows(picture)[::7]:
        assert row["value"] == Z[row["layer"] - 1, row["token"] - 1, row["entry"] - 1]
    shown = picture.figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown, Z[1].T)
    assert f"{canvas.number((Z[0] == 0).mean())} after layer 1" in picture.alt
    many = figures.token_maps(RNG.normal(size=(1, 60, 70)))
    assert len(many.table["value"]) == 2500 and "50 of 70 entries" in many.alt


def test_orthonormal_bases_give_the_unit_matrix():
    U = np.eye(8)[None] * np.arange(1.0, 9.0)  # lengths do not count
    picture = figures.subspace_grams(U.reshape(1, 8, 4, 2))
    np.testing.assert_allclose(picture.table["cosine"].reshape(8, 8), np.eye(8), atol=1e-12)
    assert "layer 1 and 0.000 in layer 1; between subspaces it is 0.000" in picture.alt
    U = np.zeros((1, 2, 2, 1))
    U[0, :, 0, 0], U[0, :, 1, 0] = [1, 0], [3, 4]
    assert "between subspaces it is 0.600" in figures.subspace_grams(U).alt
    assert "between subspaces" not in figures.subspace_grams(U[:, :, :1]).alt


def test_wide_bases_are_averaged():
    U = RNG.normal(size=(1, 16, 2, 60))
    picture = figures.subspace_grams(U)
    flat = U[0].reshape(16, 120) / np.linalg.norm(U[0].reshape(16, 120), axis=0)
    cosines = np.abs(flat.T @ flat)
    assert len(picture.table["cosine"]) == 60 * 60
    assert picture.table["cosine"][0] == pytest.approx(cosines[:2, :2].mean())


def test_atoms_by_their_cosines_and_as_patches():
    D = np.array([[1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    picture = figures.dictionary_gram(D[None])
    cosines = picture.table["cosine"].reshape(3, 3)
    np.testing.assert_allclose(cosines, [[1, 0, 0.6], [0, 0, 0], [0.6, 0, 1]], atol=1e-12)
    assert "two different atoms is 0.200 in layer 1" in picture.alt and "0.600" in picture.alt
    W = RNG.normal(size=(2, 3, 1, 2))
    patches = figures.atoms_as_patches(D, W)
    assert [row["atom"] for row in rows(patches)[::6]] == [3, 1, 2]  # the longest first
    for row in rows(patches):
        weights = W[row["row"] - 1, row["column"] - 1, row["channel"] - 1]
        assert row["value"] == pytest.approx(weights @ D[:, row["atom"] - 1])
    assert "lengths are 5.00 to 0.000" in patches.alt
    colours = figures.atoms_as_patches(D, RNG.normal(size=(2, 2, 3, 2)))
    assert colours.figure.axes[0].images[0].get_array().shape == (2, 2, 3)


def class_maps():
    attention = RNG.random((2, 3, 2, 5, 5))
    return figures.class_token_maps({"attention": attention}, (2, 2)), attention


def test_the_class_token_looks_by_its_row():
    maps, attention = class_maps()
    assert maps.shape == (2, 3, 2, 2, 2)
    row = attention[1, 2, 0, 0, 1:]
    np.testing.assert_allclose(maps[1, 2, 0].ravel(), row / row.sum())
    membership = RNG.random((2, 3, 2, 4))  # no class token
    maps = figures.class_token_maps({"membership": membership}, (2, 2))
    np.testing.assert_allclose(
        maps[0, 1, 1].ravel(), membership[0, 1, 1] / membership[0, 1, 1].sum()
    )


def test_saliency():
    maps, _ = class_maps()
    picture = figures.saliency(maps[1], PIXELS, layer=2)
    assert len(picture.figure.axes) == 9 and "in layer 2: 3 images" in picture.alt
    for row in rows(picture):
        i, k, r, c = (row[name] - 1 for name in ("image", "head", "row", "column"))
        assert row["share"] == maps[1, i, k, r, c]
    sharp = np.full((1, 3, 2, 2), 0.25)
    sharp[0, 1] = [[1, 0], [0, 0]]
    assert "0.000 to 1.00 of that of an even look; head 2" in (
        figures.saliency(sharp, PIXELS[:1], layer=1).alt
    )
    one = figures.saliency(maps[1], PIXELS, layer=2, head=2)
    assert set(one.table["head"]) == {2} and len(one.figure.axes) == 6
    np.testing.assert_array_equal(one.table["share"], maps[1][:, 1].ravel())


def test_heads_by_kind():
    maps, _ = class_maps()
    picture = figures.heads_by_kind(maps[0], ["b", "a", "b"], layer=1)
    means = {"a": maps[0][1], "b": (maps[0][0] + maps[0][2]) / 2}
    for row in rows(picture):
        k, r, c = (row[name] - 1 for name in ("head", "row", "column"))
        assert row["share"] == pytest.approx(means[row["kind"]][k, r, c])
    excess = {
        (a, k): 4 * (means[a][k] - maps[0].mean(axis=0)[k]).max() for a in means for k in (0, 1)
    }
    kind, head = max(excess, key=excess.get)
    assert f"Head {head + 1} leaves its mean most for {kind}, by" in picture.alt
    assert canvas.number(excess[kind, head]) in picture.alt


def test_at_most_ten_kinds_are_drawn_the_first_by_number():
    maps = RNG.random((12, 1, 2, 2))
    picture = figures.heads_by_kind(maps, [f"digit {n}" for n in range(12)], layer=1)
    drawn = dict.fromkeys(str(row["kind"]) for row in rows(picture))
    assert list(drawn) == [f"digit {n}" for n in range(10)]
    assert "over 12 images of 12 kinds; 10 kinds are drawn." in picture.alt


def test_shared_components_and_segments():
    features = RNG.normal(size=(3, 4, 6))
    shown = foreground(features, (2, 2))
    picture = figures.shared_components(shown, PIXELS, (2, 2), layer=1)
    np.testing.assert_array_equal(picture.table["score"], shown.scores_JxP.ravel())
    np.testing.assert_array_equal(picture.table["g"], shown.colours_JxPx3[..., 1].ravel())
    assert canvas.number(shown.variance_4[0]) in picture.alt
    maps, _ = class_maps()
    first = np.array([True, False, False, False])
    cuts = [[Cut(first, 0.1, np.zeros(4)), Cut(~first, 0.2, np.zeros(4))], [], []]
    picture = figures.segments(maps[0], cuts, PIXELS, layer=1)
    assert list(picture.table["object"]) == [1, 2, 2, 2] + [0] * 8
    assert "2 objects of MaskCut, 0 to 2 an image" in picture.alt
    masks = picture.table["mask"].reshape(3, 4)
    assert (masks.sum(axis=1) == 3).all()  # the fewest that are 0.6 of four
    for b in range(3):
        flat = maps[0, b].reshape(2, 4)
        sharpest = flat[flat.max(axis=1).argmax()]
        assert sharpest[masks[b] == 0].max() <= sharpest[masks[b] == 1].min()


def test_operators_side_by_side():
    maps, _ = class_maps()
    picture = figures.side_by_side({"MSSA + ISTA": maps[0], "MHSA + MLP": maps[1]}, PIXELS)
    assert list(picture.table["model"][[0, -1]]) == ["MSSA + ISTA", "MHSA + MLP"]
    np.testing.assert_allclose(picture.table["share"][:12], maps[0].mean(axis=1).ravel())
    top = maps[1].reshape(3, 2, 4).max(axis=-1).mean()
    assert f"MHSA + MLP: {canvas.number(top)}" in picture.alt


def test_curves_of_one_run_and_of_two():
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 3, "train/loss": 1.0, "test/loss": 1.5}]
    picture = figures.curves({"mine": lines}, "loss")
    (axes,) = picture.figure.axes
    assert [x.get_label() for x in axes.lines] == ["train", "test"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 3])
    assert picture.alt == (
        "loss on the train split goes from 2.00 at step 1 to 1.00 at step 3. "
        "loss on the test split is 1.50 at step 3."
    )
    assert rows(picture)[-1] == dict(run="mine", split="test", step=3, value=1.5)
    two = figures.curves({"a": lines, "b": lines[:1]}, "loss")
    assert [x.get_label() for x in two.figure.axes[0].lines] == ["a, train", "a, test", "b, train"]


def test_confusion():
    counts = np.array([[5, 1, 0], [0, 4, 0], [3, 0, 7]])
    picture = figures.confusion(counts, ["ant", "bee", "cat"])
    assert picture.alt == (
        "Confusion of 3 classes over 20 images: 0.800 are taken for what they are; most often cat "
        "is taken for ant, 3 times."
    )
    found = {(row["class"], row["taken_for"]): row["images"] for row in rows(picture)}
    assert found["cat", "ant"] == 3 and found["ant", "cat"] == 0
    assert figures.confusion(np.eye(2, dtype=int), "ab").alt.endswith("what they are.")
    many = np.eye(30, dtype=int)
    many[29, 0] = 2
    picture = figures.confusion(many, [*map(str, range(30))])
    labels = [text.get_text() for text in picture.figure.axes[0].get_yticklabels()]
    assert len(labels) == 20 and "29" in labels and len(rows(picture)) == 900


def test_pictures_below_each_other():
    picture = figures.picture_rows(PIXELS, "reconstruction")
    assert picture.alt == "3 pictures of 8 x 8 pixels: reconstruction."
    np.testing.assert_allclose(picture.table["mean"], PIXELS.mean(axis=(1, 2, 3)))


def test_files(tmp_path):
    picture = curve_pictures()
    starts = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    for suffix, start in starts.items():
        table = figures.save(picture, tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
        with table.open(newline="") as file:
            read = list(csv.DictReader(file))
        assert table == tmp_path / "a.csv" and read[2]["mean"] == "2.5" and read[3]["std"] == ""
    with pytest.raises(ValueError, match=r"^--output must end in one of \.svg, \.png, \.pdf; got"):
        figures.save(picture, tmp_path / "a.txt")
    assert canvas.INK not in canvas.COLOURS


def test_inline_svg_stands_alone():
    twice = np.concatenate([PIXELS[:1], PIXELS[:1], PIXELS[:1]])  # drawn with one id
    picture = figures.saliency(class_maps()[0][0], twice, layer=1)
    text = figures.inline_svg(picture._replace(alt='a "b" <c>'), "maps")
    root = ET.fromstring(text)
    assert root.get("role") == "img" and root.get("aria-label") == 'a "b" <c>'
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids and all(name.startswith("maps-") for name in ids) and len(set(ids)) == len(ids)
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert set(used) <= set(ids)
    assert canvas.INK not in text and "currentColor" in text
    assert not re.findall(r'href="(?!#|data:)', text) and "<metadata>" not in text


def test_ink_is_read_on_white_and_on_black():
    """By WCAG's contrast, 4.5 for text and 3 for lines."""

    def luminance(colour):
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for colour, least in [(canvas.INK, 4.5), *((c, 3.0) for c in canvas.COLOURS)]:
        L = luminance(colour)
        assert least <= 1.05 / (L + 0.05) and least <= (L + 0.05) / 0.05, colour


def test_without_matplotlib_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"it is missing\. Install it: pip install 'crate-jax\["):
        curve_pictures()
