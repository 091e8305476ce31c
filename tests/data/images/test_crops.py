"""Several views of an image: what each is, what draws it, and views that do not fit."""

import dataclasses

import numpy as np
import pytest
from stored import encode_crops, write_folder

from crate_jax.config import DataConfig, SimDinoConfig, TrainConfig
from crate_jax.data.images.crops import open_crops, open_views
from crate_jax.data.images.decode import decode_image
from crate_jax.data.images.transform_spec import parse_transforms
from crate_jax.data.loader import train_batches

GLOBAL = "random_resized_crop(16, min_area=0.5, max_area=1.0)"
VIEWS = SimDinoConfig(
    local_crops=3,
    local_size=8,
    second_transforms=f"{GLOBAL}|random_solarize(0, probability=1.0)",
    local_transforms="random_resized_crop(8, min_area=0.1, max_area=0.4)",
)
DATA = DataConfig(train_transforms=GLOBAL, eval_transforms="resize(16)", num_threads=1)


def crops(views=VIEWS, data=DATA, shape=(16, 16, 1)):
    return open_crops(data, views, "train", image_shape=shape, num_classes=10)


def test_a_row_is_what_the_transforms_make_of_one_image():
    rows = crops()
    row = rows.row(7, np.random.default_rng(3))
    assert {name: (x.shape, x.dtype) for name, x in row.items()} == {
        name: (shape.shape, np.dtype(shape.dtype)) for name, shape in rows.shapes.items()
    }
    assert row["global"].shape == (2, 16, 16, 1) and row["local"].shape == (3, 8, 8, 1)
    rng = np.random.default_rng(3)
    image = decode_image(rows.source.examples[7]["image"], channels=1)
    specs = [GLOBAL, VIEWS.second_transforms, *[VIEWS.local_transforms] * 3]
    expected = []
    for spec in specs:  # one after the other, with one generator
        pixels = image
        for transform in parse_transforms(spec, "spec"):
            pixels = transform(pixels, rng)
        expected.append(pixels)
    np.testing.assert_array_equal(row["global"], expected[:2])
    np.testing.assert_array_equal(row["local"], expected[2:])
    assert row["label"] == rows.source.examples[7]["label"]


def test_views_differ_and_hang_on_the_generator_alone():
    rows = crops(dataclasses.replace(VIEWS, second_transforms=""))
    first, again, other = (rows.row(0, np.random.default_rng(seed)) for seed in (0, 0, 1))
    for name in ("global", "local"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()
        assert (first[name][0] != first[name][1]).any()


def test_without_small_views_there_are_none():
    rows = crops(dataclasses.replace(VIEWS, local_crops=0, local_size=999))
    assert set(rows.shapes) == set(rows.row(0, np.random.default_rng(0))) == {"global", "label"}


def test_an_encoded_image_is_decoded_once(tmp_path, photographs, monkeypatch):
    files = {f"ant/{i}.jpg": data for i, data in enumerate(encode_crops(photographs, 2))}
    write_folder(tmp_path, "train", files)
    data = dataclasses.replace(DATA, dataset="folder", data_dir=str(tmp_path))
    rows = crops(data=data, shape=(16, 16, 3))
    from crate_jax.data.images import labelled as module

    decoded, original = [], module.EncodedImage

    def counted(*args, **options):
        decoded.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, "EncodedImage", counted)
    row = rows.row(1, np.random.default_rng(0))
    assert len(decoded) == 1 and row["global"].shape == (2, 16, 16, 3)
    assert row["global"].std() > 10 and row["local"].std() > 10


def test_the_loader_hands_out_batches_of_views():
    batches = train_batches(crops(), DATA, batch_size=4, seed=0, examples_seen=0)
    batch = next(batches)
    batches.close()
    shapes = {name: x.shape for name, x in batch.items()}
    assert shapes == {"global": (4, 2, 16, 16, 1), "local": (4, 3, 8, 8, 1), "label": (4,)}


def test_evaluation_has_whole_images():
    config = TrainConfig(data=DATA, simdino=VIEWS)
    train, test = open_views(config, [("train", True), ("test", False)], image_shape=(16, 16, 1))
    assert set(train.shapes) == {"global", "local", "label"} and len(train) == 1500
    assert set(test.shapes) == {"image", "label"} and len(test) == 297


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(local_size=24),
            "simdino.local_size must be at most the side of a global crop; got 24 and 16x16. Set "
            "--config.simdino.local_size, or model.image_size.",
        ),
        (
            dict(local_transforms="resize(9)"),
            "simdino.local_transforms must give the 8x8x1 images that the model takes; got 9x9x1. "
            "End it with resize((8, 8)).",
        ),
        (
            dict(second_transforms="resize(20)"),
            "simdino.second_transforms must give the 16x16x1 images that the model takes; got "
            "20x20x1. End it with resize((16, 16)).",
        ),
    ],
)
def test_crops_that_do_not_fit(changes, message):
    with pytest.raises(ValueError) as caught:
        crops(dataclasses.replace(VIEWS, **changes))
    assert str(caught.value) == message


def test_a_crop_that_is_larger_than_the_image():
    views = dataclasses.replace(VIEWS, local_size=16, local_transforms="center_crop(16)")
    message = r"^digits/train\[0\].*: center_crop must get images of at least 16x16; got 8x8"
    with pytest.raises(ValueError, match=message):
        crops(views)


def test_misspelt_transforms():
    with pytest.raises(KeyError, match=r"simdino.local_transforms must name known transforms"):
        crops(dataclasses.replace(VIEWS, local_transforms="random_resize_crop(8)"))
