"""Folders, TFDS data sets and synthetic images, and what is said when they are not there."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from stored import write_tfds

from crate_jax.config import DataConfig
from crate_jax.data.images.decode import decode_image
from crate_jax.data.stores.sources import (
    Source,
    check_known_classes,
    check_same_classes,
    open_source,
)
from crate_jax.options import difference


def open_split(dataset, data_dir, split="train", *, download=False, shape=(8, 8, 3), classes=4):
    config = DataConfig(
        dataset=dataset, data_dir=None if data_dir is None else str(data_dir), download=download
    )
    return open_source(config, split, image_shape=shape, num_classes=classes)


def write_image(path, color):
    """A 6 x 5 image of one RGB colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((6, 5, 3), color, np.uint8)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


# --- folders --------------------------------------------------------------------------------------

COLORS = {
    "train/zebra/b.png": (10, 200, 30),
    "train/zebra/a.jpg": (250, 0, 0),
    "train/ant/2.JPEG": (0, 0, 250),
    "train/ant/deep/er/1.png": (7, 8, 9),
    "train/Bee/only.bmp": (1, 2, 3),
    "val/ant/x.png": (90, 91, 92),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for name, color in COLORS.items():
        write_image(root / name, color)
    (root / "train/ant/notes.txt").write_text("no image")
    (root / "train/ant/2.JPEG.part").write_bytes(b"half a file")
    (root / "train/stray.png").write_bytes(b"belongs to no class")
    (root / "train/empty class").mkdir()
    return root


def test_folder_numbers_sorted_classes_and_reads_nested_images(folder):
    source = open_split("folder", folder)
    assert source.num_classes == 4  # Bee, ant, empty class, zebra: capitals sort first
    assert source.name == str(folder / "train")
    found = [(source.examples[i]["name"], source.examples[i]["label"]) for i in range(len(source))]
    assert found == [
        (str(folder / "train/Bee/only.bmp"), 0),
        (str(folder / "train/ant/2.JPEG"), 1),
        (str(folder / "train/ant/deep/er/1.png"), 1),
        (str(folder / "train/zebra/a.jpg"), 3),
        (str(folder / "train/zebra/b.png"), 3),
    ]
    for i, (name, _) in enumerate(found):
        pixels = decode_image(source.examples[i]["image"], channels=3).astype(int)
        color = COLORS[str(Path(name).relative_to(folder))]
        assert pixels.shape == (6, 5, 3)
        assert np.abs(pixels - np.array(color)[None, None]).max() <= 3, name  # JPEG is lossy


def test_without_labels_images_lie_anywhere(folder, tmp_path):
    """In folders of classes, as they are; beside these; and in no folder of a split."""

    def names(split, root=folder):
        data = DataConfig(dataset="folder", data_dir=str(root))
        source = open_source(data, split, image_shape=(8, 8, 3), num_classes=None, labelled=False)
        assert source.num_classes == 1 and source.class_names == ()
        found = [source.examples[i] for i in range(len(source))]
        assert all(example["label"] == 0 for example in found)
        return source.listing, [str(Path(e["name"]).relative_to(root)) for e in found]

    inside = [name for name in COLORS if name.startswith("train")]
    assert names("train")[1] == sorted([*inside, "train/stray.png"], key=lambda n: n.split("/"))
    listing, found = names(".")
    assert set(found) == {*COLORS, "train/stray.png"} and listing != names("train")[0]
    write_image(tmp_path / "1.png", (1, 2, 3))
    write_image(tmp_path / "deep/er/2.png", (1, 2, 3))
    assert names(".", tmp_path)[1] == ["1.png", "deep/er/2.png"]
    with pytest.raises(FileNotFoundError, match=r"^split must be a folder below .*; got no\."):
        names("no")
    with pytest.raises(FileNotFoundError, match=r"^split must be a folder below .*; got \.\."):
        names("..")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold examples; it is empty"):
        names("empty", tmp_path)


def test_hidden_files_and_folders_are_no_examples(tmp_path):
    for name in ("ant/1.png", "ant/._1.png", "ant/.cache/2.png", ".ipynb_checkpoints/3.png"):
        write_image(tmp_path / "train" / name, (1, 2, 3))
    source = open_split("folder", tmp_path)
    assert (len(source), source.class_names) == (1, ("ant",))


def test_links_to_folders_and_files_are_followed(folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a").symlink_to(folder / "train/ant")
    (tmp_path / "train/b").symlink_to(folder / "train/ant")
    write_image(tmp_path / "train/c/1.png", (1, 2, 3))
    (tmp_path / "train/c/2.png").symlink_to(tmp_path / "train/c/1.png")
    source = open_split("folder", tmp_path)
    assert [source.examples[i]["label"] for i in range(len(source))] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_link_that_leads_back_is_refused(tmp_path, target):
    write_image(tmp_path / "train/ant/deep/1.png", (1, 2, 3))
    (tmp_path / "train/ant/deep/loop").symlink_to(target)
    with pytest.raises(
        ValueError, match=r"ant/deep/loop must not lead back to .*\. Remove the lin"
    ):
        open_split("folder", tmp_path)


@pytest.mark.parametrize("name", ["train/bee", "train/ant/deep"])
def test_link_that_leads_nowhere_is_refused(tmp_path, name):
    write_image(tmp_path / "train/ant/1.png", (1, 2, 3))
    (tmp_path / name).symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=rf"{name} must lead somewhere; gone is not there"):
        open_split("folder", tmp_path)


def test_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        write_image(tmp_path / f"train/{name}/1.png", (1, 2, 3))
    scandir = os.scandir

    def refuse(path):  # permissions do not stop a superuser, who may run the tests
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="train/bee"):
        open_split("folder", tmp_path)


def test_folder_split_is_a_folder(folder):
    source = open_split("folder", folder, "val")
    assert (len(source), source.num_classes) == (1, 1)


def test_splits_whose_labels_mean_something_else(folder):
    train, val = open_split("folder", folder), open_split("folder", folder, "val")
    check_same_classes(train, train)
    message = (
        r"val must have the 4 classes of .*train; it has 1, Bee, empty class, zebra … are not in "
        r"both\. Add an empty folder for a class without images"
    )
    with pytest.raises(ValueError, match=message):
        check_same_classes(train, val)
    numbered = [Source(f"x/{n}", [], num_classes=n) for n in (3, 4)]
    with pytest.raises(
        ValueError, match=r"x/4 must have the 3 classes of x/3; it has 4, their num"
    ):
        check_same_classes(*numbered)
    named = [Source(f"x/{c[0]}", [], 3, tuple(c)) for c in (["a", "b", "c"], ["c", "b", "a"])]
    with pytest.raises(ValueError, match=r"it has 3, in the order c, a, where it was a, c\. Add"):
        check_same_classes(*named)


def test_classes_that_a_model_does_not_know_are_named():
    split = Source("x/test", [], 3, ("b", "0_a", "c"))
    check_known_classes(split, ["0_a", "b", "c", "d"])
    message = r"x/test must have classes that the model knows; 0_a is not among a, b, c\. Rename"
    with pytest.raises(ValueError, match=message):
        check_known_classes(split, ["a", "b", "c"])
    many = [str(i) for i in range(1000)]
    message = r"b, 0_a, c are not among 0, 1, 2, 3, 4, 5, … \(1000 in all\)\. Rename them, or"
    with pytest.raises(ValueError, match=message):
        check_known_classes(split, many)
    unnamed = Source("x/test", [], 3)
    check_known_classes(unnamed, ["a", "b", "c"])  # by number: nothing else is known
    with pytest.raises(ValueError, match=r"the 2 classes of the model; it has 3, without names\."):
        check_known_classes(unnamed, ["a", "b"])


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("abc", ""),
        ("ab", "without c"),
        ("abcd", "with d"),
        ("abd", "without c, with d"),
        ("acb", "in the order c, b, where it was b, c"),
        ("abcc", "4 names in place of 3"),
    ],
)
def test_how_names_differ_is_told_in_words(new, words):
    assert difference("abc", new) == words


def test_the_listing_of_a_folder_goes_by_names_and_classes(folder, tmp_path):
    before = open_split("folder", folder).listing
    shutil.copytree(folder, tmp_path / "copy")
    assert open_split("folder", tmp_path / "copy").listing == before
    (tmp_path / "copy/train/ant/2.JPEG").rename(tmp_path / "copy/train/ant/3.JPEG")
    assert open_split("folder", tmp_path / "copy").listing != before
    (tmp_path / "copy/train/ant/3.JPEG").rename(tmp_path / "copy/train/zebra/2.JPEG")
    assert open_split("folder", tmp_path / "copy").listing != before


def test_folder_without_data_dir():
    with pytest.raises(ValueError, match=r"data\.data_dir must be set for a folder\. Set --config"):
        open_split("folder", None)


def test_folder_without_that_split(folder):
    message = rf"split must be a folder below {folder}; got trian\. Did you mean train\?"
    with pytest.raises(FileNotFoundError, match=message):
        open_split("folder", folder, "trian")


@pytest.mark.parametrize("split", ["", ".", "..", "./"])
def test_folder_of_all_splits_is_no_split(folder, split):
    with pytest.raises(FileNotFoundError, match=rf"split must be a folder below {folder}; got "):
        open_split("folder", folder, split)


def test_hidden_dead_link_is_hidden(tmp_path):
    write_image(tmp_path / "train/ant/1.png", (1, 2, 3))
    for place in (tmp_path, tmp_path / "train", tmp_path / "train/ant"):
        (place / ".cache").symlink_to("gone")
    assert len(open_split("folder", tmp_path)) == 1


def test_folder_without_folders_of_classes(tmp_path):
    write_image(tmp_path / "train" / "1.png", (1, 2, 3))
    message = (
        r"train must hold a folder of images for each class; got 1 in no such folder\. Move each "
        r"image into the folder of its class, SPLIT/CLASS/image\.jpg\.$"
    )
    with pytest.raises(ValueError, match=message):
        open_split("folder", tmp_path)


def test_data_dir_without_any_split(tmp_path):
    message = (
        r"; got train\. There is none\. Set --config\.data\.train_split and "
        r"--config\.data\.eval_split, or --split\.$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_split("folder", tmp_path)


def test_folder_without_images(tmp_path):
    (tmp_path / "train/ant").mkdir(parents=True)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"train must hold examples; it is empty\. Choose another"):
        open_split("folder", tmp_path)


@pytest.mark.parametrize("dataset", ["folder", "digits", "mnist"])
def test_data_dir_that_does_not_exist(dataset, tmp_path):
    missing = tmp_path / "missing"
    message = rf"data\.data_dir must be an existing directory; got {missing}\. Set --config\.data"
    with pytest.raises(FileNotFoundError, match=message):
        open_split(dataset, missing)
    assert not missing.exists()


# --- synthetic ------------------------------------------------------------------------------------


def test_synthetic_images_are_a_function_of_the_index():
    a = open_split("synthetic", None, "train", shape=(4, 6, 3), classes=7)
    b = open_split("synthetic", None, "anything", shape=(4, 6, 3), classes=7)
    assert len(a) == 100_000
    assert (a.num_classes, a.name, b.name) == (7, "synthetic/train", "synthetic/anything")
    for i in (0, 1, 99_999):
        one, other = a.examples[i], b.examples[i]
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["label"] == other["label"]
        assert (one["image"].shape, one["image"].dtype) == ((4, 6, 3), np.uint8)
    assert (a.examples[0]["image"] != a.examples[1]["image"]).any()
    labels = np.bincount([a.examples[i]["label"] for i in range(700)], minlength=7)
    assert len(labels) == 7 and labels.min() > 60  # 100 each; three standard deviations are 28
    mean = np.mean([a.examples[i]["image"].mean() for i in range(200)])
    assert abs(mean - 127.5) < 3  # of 14,400 uniform bytes: standard error 0.6


def test_synthetic_reads_no_directory(tmp_path):
    assert len(open_split("synthetic", tmp_path / "missing")) == 100_000


# --- TFDS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """Where digits are prepared as array_record."""
    root = tmp_path_factory.mktemp("tfds")
    open_split("digits", root, "test")
    return root


def copy_dataset(digits_dir, root, name, *, file_format=None, drop_feature=None):
    """Digits under another name, and with another file format or one feature less if asked."""
    old, new = digits_dir / "digits/1.0.0", root / name / "1.0.0"
    new.mkdir(parents=True)
    for path in old.iterdir():
        target = path.name.replace("digits-", f"{name}-")
        shutil.copy(path, new / target.replace("array_record", file_format or "array_record"))
    info = json.loads((new / "dataset_info.json").read_text())
    info["name"] = name
    if name != "digits":
        del info["moduleName"]  # there is no code for it: TFDS reads it by its files alone
    if file_format:
        info["fileFormat"] = file_format
    (new / "dataset_info.json").write_text(json.dumps(info))
    if drop_feature:
        features = json.loads((new / "features.json").read_text())
        del features["featuresDict"]["features"][drop_feature]
        (new / "features.json").write_text(json.dumps(features))
    return root


@pytest.mark.parametrize("name", ["digits", "my_scans"])
def test_prepared_dataset_is_opened_by_name(digits_dir, tmp_path, name):
    root = digits_dir if name == "digits" else copy_dataset(digits_dir, tmp_path, name)
    source = open_split(name, root, "test")
    assert (len(source), source.num_classes, source.name) == (297, 10, f"{name}/test")
    original = open_split("digits", None, "test")
    for i in (0, 296):
        example = source.examples[i]
        assert example["image"].startswith(b"\x89PNG")  # encoded still: decoding is ours
        assert example["image"] == original.examples[i]["image"]
        assert example["label"] == original.examples[i]["label"]


def test_unknown_dataset_suggests_the_nearest_name(tmp_path):
    message = r"data\.dataset must be .* a TFDS name; got cifar1O\. Did you mean cifar10\?"
    with pytest.raises(KeyError, match=message):
        open_split("cifar1O", tmp_path)
    with pytest.raises(KeyError, match=r"got sinthetic\. Did you mean synthetic\?"):
        open_split("sinthetic", tmp_path)


@pytest.mark.parametrize("name", ["cifar10/nope", "cifar10:9.9.9", "my scans"])
def test_malformed_dataset_name(tmp_path, name):
    message = rf"data\.dataset must be a TFDS name, or .*; got {name} \(.*\)\. Set --config"
    with pytest.raises(ValueError, match=message) as caught:
        open_split(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_known_dataset_that_is_not_prepared_is_not_downloaded(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def download(self, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    message = (
        rf"data\.dataset must be prepared; cifar10 is not in {tmp_path}/cifar10/\S+\. "
        r"Set --config\.data\.data_dir, .* to where it is, or .*: --config\.data\.download=True\."
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_split("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_version_that_is_there_is_named_and_read(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    example = {"image": cv2.imencode(".png", pixels)[1].tobytes(), "label": np.int64(7)}
    write_tfds(tmp_path, "cifar10", "3.0.1", features, {"train": [example]})
    message = (
        r"cifar10 is not in .*/cifar10/3\.0\.2\. There is 3\.0\.1: set "
        r"--config\.data\.dataset=cifar10:3\.0\.1, or let train have TFDS download"
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_split("cifar10", tmp_path)
    source = open_split("cifar10:3.0.1", tmp_path)
    assert source.examples[0]["label"] == 7
    found = decode_image(source.examples[0]["image"], channels=3)
    np.testing.assert_array_equal(found, pixels[:, :, ::-1])


def test_download_prepares_as_array_record(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from crate_jax.data.stores.digits import Digits

    asked = []

    def builder(name, **kwargs):  # stands in for a data set of the network
        asked.append(name)
        return Digits(**kwargs)

    monkeypatch.setattr(tfds, "builder", builder)
    source = open_split("far_away", tmp_path, "test", download=True)
    assert set(asked) == {"far_away"}
    assert (len(source), source.name) == (297, "far_away/test")
    assert (tmp_path / "digits/1.0.0/digits-test.array_record-00000-of-00001").exists()


def test_package_that_preparing_needs_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def prepare(self, **kwargs):
        import no_such_package  # noqa: F401

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    message = (
        r"TFDS needs a package to prepare cifar10 \(No module named 'no_such_package'\)\. Install "
        r"it \(pip install tensorflow-cpu, if that is the one\) for this once; .* docs/data\.md\."
    )
    with pytest.raises(ValueError, match=message):
        open_split("cifar10", tmp_path, download=True)


@pytest.mark.parametrize("split", ["tset", "test[", "test[:1000]", "test[:200%]"])
def test_unknown_split(digits_dir, split):
    message = "split must be one of train, test, or part of one; got "
    with pytest.raises(FileNotFoundError) as caught:
        open_split("digits", digits_dir, split)
    assert str(caught.value) == (
        f"{message}{split}. Did you mean test? Set --config.data.train_split and "
        "--config.data.eval_split, or --split."
    )


def test_empty_split(digits_dir):
    message = r"digits/train\[:0\] must hold examples; it is empty\. Choose another split\."
    with pytest.raises(ValueError, match=message):
        open_split("digits", digits_dir, "train[:0]")


@pytest.mark.parametrize("name", ["digits", "my_scans"])
def test_other_file_formats_are_refused(digits_dir, tmp_path, name):
    root = copy_dataset(digits_dir, tmp_path, name, file_format="riegeli")
    message = (
        rf"data\.dataset must be prepared as array_record, parquet or tfrecord; {name}/train is "
        r"riegeli\. Prepare it again with file_format='array_record'\."
    )
    with pytest.raises(ValueError, match=message):
        open_split(name, root)


@pytest.mark.parametrize("feature", ["image", "label"])
def test_dataset_without_images_or_labels_is_refused(digits_dir, tmp_path, feature):
    root = copy_dataset(digits_dir, tmp_path, "my_scans", drop_feature=feature)
    message = r"data\.dataset must have the features image and label; got my_scans\."
    with pytest.raises(ValueError, match=message):
        open_split("my_scans", root)


def test_integer_labels_need_a_number_of_classes(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    )
    png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    write_tfds(tmp_path, "ages", "1.0.0", features, {"train": [{"image": png, "label": 7}]})
    message = r"model\.num_classes must be set if labels are integers; label of ages is a Scalar"
    with pytest.raises(ValueError, match=message):
        open_split("ages", tmp_path, classes=None)
    assert open_split("ages", tmp_path, classes=100).num_classes == 100
