"""What is wrong with one example stops a run with its name, or is left out and counted."""

import itertools
import shutil
import struct
from contextlib import closing

import cv2
import numpy as np
import pytest
from stored import convert, encode_crops, write_array_record, write_folder

from crate_jax.config import DataConfig
from crate_jax.data.images.labelled import LabelledImages, open_labelled_images
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.loader import eval_batches, train_batches
from crate_jax.data.rows import BadExampleError
from crate_jax.data.stores.sources import Source, open_source

SHAPE, COUNT = (16, 20, 3), 24


def config(**options):
    defaults = {
        "train_transforms": "random_resized_crop((16, 20))|random_flip()",
        "eval_transforms": "resize((16, 20))",
        "num_threads": 2,
        "max_bad_share": 0.5,
    }
    return DataConfig(**defaults | options)


def bomb(jpeg):
    """A JPEG whose header says 20,000 x 20,000 pixels."""
    data = bytearray(jpeg)
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def no_rows(jpeg):
    """A PNG whose header says that it is 0 pixels high."""
    data = bytearray(cv2.imencode(".png", np.zeros((4, 5, 3), np.uint8))[1].tobytes())
    data[20:24] = bytes(4)
    return bytes(data)


def line(jpeg):
    """An image of one row, for a pipeline that would make the row as high as the others."""
    return cv2.imencode(".png", np.zeros((1, 30_000, 3), np.uint8))[1].tobytes()


DAMAGE = {
    "truncated": (lambda jpeg: jpeg[: len(jpeg) // 2], r"must be an image; its \d+ bytes do not"),
    "cut short": (lambda jpeg: jpeg[:-30], r"must be an image; its \d+ bytes do not decode"),
    "empty": (lambda jpeg: b"", r"must be an image; its 0 bytes do not decode"),
    "text": (lambda jpeg: b"this is no picture\n" * 9, r"must be an image; its 171 bytes do not"),
    "bomb": (bomb, r"must have 1 … 134217728 pixels; its header says 20000x20000\. Remove"),
    "no rows": (no_rows, r"must have 1 … 134217728 pixels; its header says 0x5\. Remove"),
}


@pytest.fixture(scope="module")
def crops(photographs):
    return encode_crops(photographs, COUNT)


def folder_with(crops, root, kind, damaged):
    """A folder in which one file has a damage."""
    files = {f"{'ab'[i % 2]}/{i:02d}.jpg": crop for i, crop in enumerate(crops)}
    name = sorted(files)[damaged]
    files[name] = DAMAGE[kind][0](files[name])
    write_folder(root, "train", files)
    return name


def opened(dataset, data_dir, data, split="train"):
    data.dataset, data.data_dir = dataset, str(data_dir)
    return open_source(data, split, image_shape=SHAPE, num_classes=2)


def train(source, data, count, batch_size=8, **options):
    """Some training batches, one after the other, and how many were skipped."""
    rows = LabelledImages(source, make_pipeline(data, SHAPE, train=True))
    stream = train_batches(rows, data, batch_size=batch_size, seed=1, **options)
    with closing(stream):
        batches = list(itertools.islice(stream, count))
        assert set(batches[0]) == {"image", "label"}
        return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, stream.skipped


def evaluation(source, data, batch_size=8):
    rows = LabelledImages(source, make_pipeline(data, SHAPE, train=False))
    with closing(eval_batches(rows, data, batch_size=batch_size)) as stream:
        batches = list(stream)
        return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, stream.skipped


# In threads every damage is seen, in two processes each once more.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_raise_names_data_set_split_index_and_file(crops, tmp_path, kind, workers):
    name = folder_with(crops, tmp_path, kind, damaged=5)
    data = config(num_workers=workers)
    source = opened("folder", tmp_path, data)
    message = rf"{tmp_path}/train\[5\] \({tmp_path}/train/{name}\) {DAMAGE[kind][1]}"
    with pytest.raises(ValueError, match=message):
        train(source, data, 3)


@pytest.mark.parametrize("kind", DAMAGE)
def test_skip_takes_the_next_good_one_and_counts(crops, tmp_path, kind, caplog):
    folder_with(crops, tmp_path, kind, damaged=5)
    data = config(on_bad_example="skip")
    source = opened("folder", tmp_path, data)
    whole = Source(source.name, [e for e in map(source.examples.__getitem__, range(COUNT))], 2)
    whole.examples[5] = whole.examples[6]
    rows, skipped = train(source, data, 6)  # two epochs
    expected, none = train(whole, data, 6)
    assert (skipped, none) == (2, 0)
    for key in rows:
        np.testing.assert_array_equal(rows[key], expected[key])
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2 and lines[0].startswith(f"skipped: {tmp_path}/train[5] ("), lines


def test_image_that_a_transform_cannot_take_is_a_bad_example(crops, tmp_path):
    files = {f"{'ab'[i % 2]}/{i:02d}.jpg": crop for i, crop in enumerate(crops)}
    files["a/04.png"] = line(crops[0])
    write_folder(tmp_path, "train", files)
    spec = {"train_transforms": "resize_shorter(128)|center_crop((16, 20))"}
    source = opened("folder", tmp_path, data := config(**spec))
    message = r"train\[3\] \(.*a/04\.png\): resize_shorter\(128\) must give at most 134217728 pix"
    with pytest.raises(ValueError, match=message):
        train(source, data, 4)
    assert train(source, config(**spec, on_bad_example="skip"), 3)[1] == 1


def test_share_of_bad_examples_is_judged_alike_in_any_processes(crops, tmp_path):
    """Of 24 examples six are bad: just allowed, in any number of epochs and processes, or not."""
    files = {f"a/{i:02d}.jpg": crop if i % 4 else b"" for i, crop in enumerate(crops)}
    write_folder(tmp_path, "train", files)
    for share, fails in ((0.25, False), (0.24, True)):
        data = config(on_bad_example="skip", max_bad_share=share)
        source = opened("folder", tmp_path, data)
        for count in (1, 2, 4):
            for i in range(count):
                run = {"process_index": i, "process_count": count}
                if fails:
                    with pytest.raises(
                        ValueError, match=r"a share of 0\.24 of bad .*; 6 of 24 are"
                    ):
                        train(source, data, 200, **run)
                else:
                    train(source, data, 30, **run)  # ten epochs


def test_skip_is_the_same_in_any_processes(crops, tmp_path):
    folder_with(crops, tmp_path, "truncated", damaged=COUNT - 1)  # the next one is the first
    data = config(on_bad_example="skip")
    source = opened("folder", tmp_path, data)
    expected, skipped = train(source, data, 6)
    assert skipped == 2
    found, again = train(source, config(on_bad_example="skip", num_workers=2), 6)
    assert again == skipped
    parts = [train(source, data, 6, process_index=i, process_count=2) for i in (0, 1)]
    assert sum(count for _, count in parts) == skipped
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])
        rows = np.stack([part[key] for part, _ in parts], axis=1)
        np.testing.assert_array_equal(rows.reshape(expected[key].shape), expected[key])
    resumed, _ = train(source, config(on_bad_example="skip"), 4, examples_seen=16)
    np.testing.assert_array_equal(resumed["image"], expected["image"][16:])


def test_evaluation_leaves_bad_examples_out(crops, tmp_path):
    folder_with(crops, tmp_path, "truncated", damaged=5)
    data = config(on_bad_example="skip")
    rows, skipped = evaluation(opened("folder", tmp_path, data), data, batch_size=10)
    assert skipped == 1
    mask = np.array([1.0] * COUNT + [0.0] * 6)
    mask[5] = 0
    np.testing.assert_array_equal(rows["mask"], mask)
    assert not rows["image"][5].any()
    with pytest.raises(ValueError, match=r"train\[5\] .* must be an image"):
        evaluation(opened("folder", tmp_path, config()), config(), batch_size=10)


@pytest.mark.parametrize("label, workers", [(-1, 1), (2, 0), (7, 0)])
def test_label_out_of_range(crops, label, workers):
    examples = [{"image": c, "label": label if i == 3 else i % 2} for i, c in enumerate(crops)]
    source = Source("mine/train", examples, num_classes=2)
    data = config(num_workers=workers)
    message = rf"mine/train\[3\] must have a label of 0 … 1; got {label}\. Correct it\."
    with pytest.raises(ValueError, match=message):
        train(source, data, 3)
    rows, skipped = train(source, config(on_bad_example="skip", num_workers=workers), 3)
    assert skipped == 1 and set(rows["label"]) == {0, 1}


def test_too_many_bad_examples_stop_the_run(crops):
    examples = [{"image": b"" if i % 3 == 0 else c, "label": 0} for i, c in enumerate(crops)]
    source = Source("mine/train", examples, num_classes=2)
    allowed = config(on_bad_example="skip", max_bad_share=8 / 24)
    assert train(source, allowed, 3)[1] == 8
    message = (
        r"mine/train must have at most a share of 0\.3 of bad examples; 8 of 24 are\. "
        r"Restore its files, or raise data\.max_bad_share\."
    )
    with pytest.raises(ValueError, match=message):
        train(source, config(on_bad_example="skip", max_bad_share=0.3), 3)
    all_bad = Source("mine/train", [{"image": b"", "label": 0}] * 24, num_classes=2)
    with pytest.raises(ValueError, match=r"mine/train must hold good examples; none can be read\."):
        train(all_bad, config(on_bad_example="skip", max_bad_share=1.0), 1)


def test_first_ten_are_logged(crops, caplog):
    examples = [{"image": b"" if i < 20 else c, "label": 0} for i, c in enumerate(crops)]
    source = Source("mine/train", examples, num_classes=2)
    assert train(source, config(on_bad_example="skip", max_bad_share=1.0), 3)[1] == 20
    assert len(caplog.records) == 10
    assert len({r.getMessage() for r in caplog.records}) == 10


# --- shards that end in the middle ----------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(crops, tmp_path_factory):
    """An array_record data set of four shards of six."""
    root = tmp_path_factory.mktemp("prepared")
    write_folder(root / "from", "train", {f"{'ab'[i % 2]}/{i}.jpg": c for i, c in enumerate(crops)})
    return write_array_record(root / "from", root / "to", "photos", shard_examples=6)


def cut(dataset_dir, share=0.55):
    """End the second file after a share of it."""
    path = sorted(dataset_dir.glob("photos-train.*"))[1]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_truncated_tfrecord(prepared, tmp_path):
    path = cut(convert(prepared, tmp_path, "tfrecord"))
    message = (
        rf"photos/train must have whole files; {path} ends before its last example\. Restore it, "
        r"or set data\.on_bad_example=skip to go on without\."
    )
    with pytest.raises(ValueError, match=message):
        opened("photos", tmp_path, config())
    for workers in (0, 2):
        data = config(on_bad_example="skip", num_workers=workers)
        source = opened("photos", tmp_path, data)
        missing = int((source.examples.examples.offset < 0).sum())
        assert len(source) == COUNT and 2 <= missing <= 4
        rows, skipped = train(source, data, 3)
        assert skipped == missing and rows["image"].any(axis=(1, 2, 3)).all()


def test_truncated_tar(crops, tmp_path):
    from stored import tar_bytes

    data = tar_bytes({f"{'ab'[i % 2]}/{i:02d}.jpg": c for i, c in enumerate(crops)})
    (tmp_path / "train.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ValueError, match=r"train\.tar must be whole; it ends after \d+ images\. Re"
    ):
        opened("tar", tmp_path, config())
    for workers in (0, 1):
        data = config(on_bad_example="skip", num_workers=workers)
        source = opened("tar", tmp_path, data)
        assert 10 < len(source) < COUNT
        train(source, data, 2)


def test_truncated_array_record(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "photos/1.0.0")
    cut(tmp_path / "photos/1.0.0")
    for workers in (0, 1):
        data = config(num_workers=workers)
        with pytest.raises(ValueError, match=r"photos/train\[\d+\] must be readable; got \w+: .*"):
            train(opened("photos", tmp_path, data), data, 3)
        data = config(on_bad_example="skip", num_workers=workers)
        _, skipped = train(opened("photos", tmp_path, data), data, 3)
        assert skipped == 6  # the whole file


def test_truncated_parquet(prepared, tmp_path):
    cut(convert(prepared, tmp_path, "parquet"))
    for on_bad_example in ("raise", "skip"):  # it is read at once: there is no going on without
        with pytest.raises(
            ValueError, match=r"photos/train must have whole files; .* does not open"
        ):
            opened("photos", tmp_path, config(on_bad_example=on_bad_example))


def test_opening_makes_a_row(crops, tmp_path):
    folder_with(crops, tmp_path, "truncated", damaged=0)

    def rows(**options):
        data = config(dataset="folder", data_dir=str(tmp_path), **options)
        return open_labelled_images(data, "train", train=True, image_shape=SHAPE, num_classes=9)

    with pytest.raises(BadExampleError, match=r"train\[0\] \(.*\) must be an image"):
        rows()
    assert rows(on_bad_example="skip").num_classes == 2
    message = r"data\.train_transforms must give the 16x20x3 images that the model takes; got 9x9x3"
    with pytest.raises(ValueError, match=message):
        rows(on_bad_example="skip", train_transforms="resize(9)")


def test_missing_file(crops, tmp_path):
    name = folder_with(crops, tmp_path, "empty", damaged=5)
    data = config(on_bad_example="skip")
    source = opened("folder", tmp_path, data)
    (tmp_path / "train" / name).unlink()
    assert train(source, data, 3)[1] == 1
    with pytest.raises(ValueError, match=r"train\[5\] must be readable; got FileNotFoundError: .*"):
        train(source, config(), 3)


def test_a_mistake_in_the_transforms_is_no_bad_example(crops):
    source = Source("mine/train", [{"image": c, "label": 0} for c in crops], num_classes=2)
    data = config(on_bad_example="skip")
    data.train_transforms = "resize(9)"
    with pytest.raises(ValueError, match=r"data\.train_transforms must give the 16x20x3") as caught:
        train(source, data, 1)
    assert not isinstance(caught.value, BadExampleError)
