"""Which features of a TFDS data set are read, under which names, and as which pixels."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from stored import write_tfds

from crate_jax.config import DataConfig, ModelConfig, TrainConfig, differences, from_dict, to_dict
from crate_jax.data.images.labelled import open_labelled_images
from crate_jax.data.stores.sources import open_source
from crate_jax.tasks.classify import Classify

LEVELS = np.random.default_rng(0).integers(0, 256, (6, 5, 1), np.uint8)
LEVELS[0, 0], LEVELS[0, 1] = 0, 255
UNIT = (LEVELS / 255).astype(np.float32)


def features():
    import tensorflow_datasets as tfds

    return tfds.features


def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, image_feature, image, label_feature=None, label=1, **others):
    """A data set ``set`` of one example; `others` are (feature, value) by name."""
    f = features()
    known = {"image": image_feature, "label": label_feature or f.ClassLabel(num_classes=2)}
    known |= {name: feature for name, (feature, _) in others.items()}
    example = {"image": image, "label": label} | {name: v for name, (_, v) in others.items()}
    if image_feature is None:
        del known["image"], example["image"]
    write_tfds(root, "set", "1.0.0", f.FeaturesDict(known), {"train": [example]})


def opened(root, shape=(6, 5, 1), num_classes=None, **options):
    data = DataConfig(dataset="set", data_dir=str(root), **options)
    return open_labelled_images(
        data, "train", train=True, image_shape=shape, num_classes=num_classes
    )


def pixels_of(root, **options):
    row = opened(root, **options).row(0, np.random.default_rng(0))
    assert row["image"].dtype == np.uint8
    return row["image"]


# A float image is stored as the PNG of its four bytes a pixel, as RGBA.
KINDS = {
    "Image of uint8": lambda f: (f.Image(shape=(6, 5, 1)), png(LEVELS[:, :, 0])),
    "Image of uint16": lambda f: (
        f.Image(shape=(6, 5, 1), dtype=np.uint16),
        png(LEVELS[:, :, 0].astype(np.uint16) * 257),
    ),
    "Image of float32": lambda f: (
        f.Image(shape=(6, 5, 1), dtype=np.float32),
        png(UNIT.view(np.uint8).reshape(6, 5, 4)),
    ),
    "uint8": lambda f: (f.Tensor(shape=(6, 5, 1), dtype=np.uint8), LEVELS),
    "any size": lambda f: (
        f.Tensor(shape=(None, None, 1), dtype=np.uint8),
        {"shape": np.array(LEVELS.shape, np.int32), "value": LEVELS},
    ),
    "no channel axis": lambda f: (f.Tensor(shape=(6, 5), dtype=np.uint8), LEVELS[:, :, 0]),
    "uint16": lambda f: (
        f.Tensor(shape=(6, 5, 1), dtype=np.uint16),
        LEVELS.astype(np.uint16) * 257,
    ),
    "float32": lambda f: (f.Tensor(shape=(6, 5, 1), dtype=np.float32), UNIT),
    "float64": lambda f: (
        f.Tensor(shape=(6, 5, 1), dtype=np.float64),
        UNIT.astype(np.float64),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_type_have_the_same_levels(tmp_path, kind):
    write(tmp_path, *KINDS[kind](features()))
    np.testing.assert_array_equal(pixels_of(tmp_path), LEVELS)


def test_false_is_black_and_true_white(tmp_path):
    mask = LEVELS > 99
    write(tmp_path, features().Tensor(shape=(6, 5, 1), dtype=np.bool_), mask)
    np.testing.assert_array_equal(pixels_of(tmp_path), mask * np.uint8(255))


def test_an_array_becomes_rgb_as_a_file_does(tmp_path):
    write(tmp_path, features().Tensor(shape=(6, 5, 1), dtype=np.uint8), LEVELS)
    found = pixels_of(tmp_path, shape=(6, 5, 3))
    np.testing.assert_array_equal(found, LEVELS.repeat(3, axis=2))


REFUSED = {
    "int32": lambda f: (f.Tensor(shape=(6, 5, 1), dtype=np.int32), LEVELS.astype(np.int32)),
    "int64": lambda f: (f.Tensor(shape=(6, 5, 1), dtype=np.int64), LEVELS.astype(np.int64)),
    "rank 1": lambda f: (f.Tensor(shape=(30,), dtype=np.uint8), LEVELS.ravel()),
    "frames": lambda f: (f.Tensor(shape=(1, 6, 5, 1), dtype=np.uint8), LEVELS[None]),
    "gif": lambda f: (f.Image(shape=(None, None, None, 3)), b"GIF89a"),
    "sequence": lambda f: (f.Sequence(f.Image(shape=(6, 5, 1))), [png(LEVELS[:, :, 0])]),
    "text": lambda f: (f.Text(), b"image.png"),
}
NAMED = {
    "int32": "Tensor of int32 (6, 5, 1)",
    "int64": "Tensor of int64 (6, 5, 1)",
    "rank 1": "Tensor of uint8 (30,)",
    "frames": "Tensor of uint8 (1, 6, 5, 1)",
    "gif": "Image of uint8 (None, None, None, 3)",
    "sequence": "Sequence of Image of uint8 (6, 5, 1)",
    "text": "Text of object",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_where_it_is_opened(tmp_path, kind):
    write(tmp_path, *REFUSED[kind](features()))
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, on_bad_example="skip")
    message = str(caught.value)
    start = "data.image_key must name an image of uint8, uint16 or floats, of one frame; image of "
    assert message.startswith(f"{start}set is a {NAMED[kind]}. Choose another of "), message
    assert "tfds.features.Image" in message and "\n" not in message


@pytest.mark.parametrize(
    "factor, offset, got", [(255, 0, "0 … 255"), (2, -1, "-1 … 1"), (np.nan, 0, "nan … nan")]
)
def test_floats_beyond_0_and_1_are_refused(tmp_path, factor, offset, got):
    image = (UNIT * factor + offset).astype(np.float32)
    write(tmp_path, features().Tensor(shape=(6, 5, 1), dtype=np.float32), image)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path)
    start = f"set/train[0] must hold floats from 0 to 1; got {got} (float32). Scale them, or "
    assert str(caught.value).startswith(start)


def test_other_channels_are_refused(tmp_path):
    image = LEVELS.repeat(4, axis=2)
    write(tmp_path, features().Tensor(shape=(6, 5, 4), dtype=np.uint8), image)
    message = r"set/train\[0\] must have 3 channels, as model\.in_channels says; got 4\. Set --co"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, shape=(6, 5, 3))
    np.testing.assert_array_equal(pixels_of(tmp_path, shape=(6, 5, 4)), image)


def test_a_damaged_float_image_is_a_bad_example(tmp_path):
    write(tmp_path, features().Image(shape=(6, 5, 1), dtype=np.float32), b"no png")
    with pytest.raises(ValueError, match=r"set/train\[0\] must be readable; .* does not decode"):
        opened(tmp_path)


def test_a_video_is_refused(tmp_path):
    """TFDS reads such a feature only with TensorFlow, whose absence it reports as a bug."""
    write(tmp_path, *KINDS["uint8"](features()))
    path = tmp_path / "set/1.0.0/features.json"
    described = json.loads(path.read_text())
    described["featuresDict"]["features"]["image"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"shape": {"dimensions": ["-1", "6", "5", "3"]}, "dtype": "uint8"},
    }
    path.write_text(json.dumps(described))
    with (
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(ValueError, match=r"data\.(dataset|image_key) must .* ([Vv]ideo)"),
    ):
        opened(tmp_path)


# --- keys -----------------------------------------------------------------------------------------


def test_image_and_label_by_other_keys(tmp_path):
    f = features()
    others = {
        "img": (f.Image(shape=(6, 5, 1)), png(LEVELS[:, :, 0])),
        "fine_label": (f.ClassLabel(names=["ant", "bee", "cat"]), 2),
        "file_name": (f.Text(), b"7.png"),
        "box": (f.BBoxFeature(), [0, 0, 1, 1]),
    }
    write(tmp_path, f.Tensor(shape=(3,), dtype=np.float32), [0, 1, 2], **others)
    source = open_source(
        DataConfig(dataset="set", data_dir=str(tmp_path), image_key="img", label_key="fine_label"),
        "train",
        image_shape=(6, 5, 1),
        num_classes=None,
    )
    assert (source.num_classes, source.class_names) == (3, ("ant", "bee", "cat"))
    assert source.examples[0] == {
        "image": others["img"][1],
        "label": 2,
        "name": "7.png",
    }


def test_a_feature_within_another(tmp_path):
    f = features()
    inner = {"photo": f.Image(shape=(6, 5, 1)), "kind": f.ClassLabel(num_classes=3)}
    example = {"photo": png(LEVELS[:, :, 0]), "kind": 2}
    write(tmp_path, None, None, seen=(f.FeaturesDict(inner), example))
    rows = opened(tmp_path, image_key="seen/photo", label_key="seen/kind")
    row = rows.row(0, np.random.default_rng(0))
    np.testing.assert_array_equal(row["image"], LEVELS)
    assert (row["label"], rows.num_classes) == (2, 3)


def test_a_key_that_is_not_there_lists_those_that_are(tmp_path):
    f = features()
    write(tmp_path, None, None, img=(f.Image(shape=(6, 5, 1)), png(LEVELS[:, :, 0])))
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, label_key="lable")
    message = str(caught.value)
    assert message.startswith("data.dataset must have the features image and lable; got set. It ")
    assert "It has img (Image of uint8 (6, 5, 1)), label (ClassLabel of int64). Set" in message
    assert "Set --config.data.image_key=img and --config.data.label_key=label (" in message


@pytest.mark.parametrize("kind", ["several", "text", "float", "array"])
def test_what_is_no_label_is_refused(tmp_path, kind):
    f = features()
    feature, value, named = {
        "several": (f.Sequence(f.ClassLabel(num_classes=2)), [0, 1], "Sequence of ClassLabel"),
        "text": (f.Text(), b"bee", "Text of object"),
        "float": (f.Scalar(np.float32), 0.5, "Scalar of float32"),
        "array": (f.Tensor(shape=(2,), dtype=np.int64), [0, 1], r"Tensor of int64 \(2,\)"),
    }[kind]
    write(tmp_path, *KINDS["uint8"](f), feature, value)
    message = rf"data\.label_key must name a ClassLabel or an integer, .*label of set is a {named}"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, num_classes=2)


def test_integer_labels_have_the_models_classes(tmp_path):
    write(tmp_path, *KINDS["uint8"](features()), features().Scalar(np.int64), 3)
    rows = opened(tmp_path, num_classes=5)
    assert (rows.num_classes, rows.class_names) == (5, ())
    assert rows.row(0, np.random.default_rng(0))["label"] == 3
    with pytest.raises(ValueError, match=r"set/train\[0\] must have a label of 0 … 1; got 3\."):
        opened(tmp_path, num_classes=2)

    def open_run(num_classes):
        model = ModelConfig(
            image_size=(6, 5), patch_size=(6, 5), in_channels=1, width=8, depth=1, num_heads=1,
            num_classes=num_classes,
        )  # fmt: skip
        data = DataConfig(dataset="set", data_dir=str(tmp_path))
        return Classify.open(TrainConfig(model=model, data=data), ("train", True))[0]

    assert open_run(5).model.num_classes == 5
    message = r"model\.num_classes must be set if labels are integers; label of set is a Scalar"
    with pytest.raises(ValueError, match=message):
        open_run(None)


@pytest.mark.parametrize("dataset", ["digits", "folder", "tar", "synthetic"])
def test_keys_of_what_has_none_are_refused(dataset):
    data = DataConfig(dataset=dataset, label_key="kind")
    with pytest.raises(ValueError, match=rf"data\.label_key must be label for {dataset}; got kind"):
        open_source(data, "train", image_shape=(8, 8, 1), num_classes=1)


def test_runs_of_before_had_the_usual_keys():
    recorded = to_dict(TrainConfig())
    del recorded["data"]["image_key"], recorded["data"]["label_key"]
    assert differences(from_dict(recorded), TrainConfig()) == {}
    other = TrainConfig(data=DataConfig(label_key="coarse_label"))
    found = differences(from_dict(recorded), other, identity=True)
    assert found == {"data.label_key": ("label", "coarse_label")}
