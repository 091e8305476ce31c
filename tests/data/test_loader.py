"""Batches are a function of the seed and of the examples seen before, and of nothing else."""

import dataclasses
import itertools
import time
import types
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from stored import encode_crops

from crate_jax.config import DataConfig
from crate_jax.data import loader
from crate_jax.data.images.labelled import LabelledImages, open_labelled_images
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.loader import eval_batches, read_ahead, to_device, train_batches
from crate_jax.data.rows import BadExampleError
from crate_jax.data.stores.sources import Source
from crate_jax.data.stores.synthetic import SyntheticImages
from crate_jax.errors import is_mistake
from crate_jax.parallel import batch_sharding, make_mesh

SHAPE = (6, 5, 3)
RANDOM = "random_affine(degrees=30, shift=0.2)|random_flip()"
EXAMPLES = 60


def config(**changes):
    return DataConfig(train_transforms=RANDOM, num_threads=2, **changes)


def numbered(length=EXAMPLES):
    """Examples whose label is their number."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (length, *SHAPE), np.uint8)
    examples = [{"image": image, "label": i} for i, image in enumerate(images)]
    return Source("numbered/all", examples, num_classes=length)


def labelled(source, data, shape=SHAPE, *, train=True):
    return LabelledImages(source, make_pipeline(data, shape, train=train))


def train(count, *, source=None, data=None, batch_size=8, seed=3, **options):
    """The first batches, as (images, labels) of all of them one after the other."""
    data = data or config()
    rows = labelled(source or numbered(), data)
    with closing(train_batches(rows, data, batch_size=batch_size, seed=seed, **options)) as stream:
        batches = list(itertools.islice(stream, count))
    for batch in batches:
        assert set(batch) == {"image", "label"}
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        assert batch["image"].shape == (len(batch["label"]), *SHAPE)
        assert len(batch["label"]) == batch_size // options.get("process_count", 1)
    return tuple(np.concatenate([b[name] for b in batches]) for name in ("image", "label"))


def evaluation(source, data=None, **options):
    """All evaluation batches, one after the other, and how many they are."""
    data = data or config()
    rows = labelled(source, data, train=False)
    with closing(eval_batches(rows, data, **options)) as stream:
        batches = list(stream)
    sizes = {len(v) for batch in batches for v in batch.values()}
    assert sizes == {options["batch_size"] // options.get("process_count", 1)}
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, len(batches)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def reference():
    """Twenty batches of eight: two epochs of sixty and forty more."""
    return train(20)


def test_the_loader_sees_shapes_and_rows_and_nothing_else():
    text = Path(loader.__file__).read_text().lower()
    for word in ("image", "label", "model", "task", "pixel", "class_", "cv2"):
        assert word not in text, word


@dataclasses.dataclass(frozen=True)
class Words:
    """Rows of text: what the loader serves is not its business."""

    name = "words/all"
    shapes = types.MappingProxyType(
        {"tokens": jax.ShapeDtypeStruct((4,), np.int16), "weight": jax.ShapeDtypeStruct((), float)}
    )

    def __len__(self):
        return 10

    def row(self, index, rng):
        if index == 7:
            raise BadExampleError("words/all[7] must be words; got none.")
        return {"tokens": np.full(4, index, np.int16), "weight": np.array(index / 2)}


@pytest.mark.parametrize("workers", [0, 1])
def test_any_rows_are_served(workers):
    data = DataConfig(on_bad_example="skip", max_bad_share=0.1, num_workers=workers)
    with closing(eval_batches(Words(), data, batch_size=4)) as stream:
        batches = list(stream)
    rows = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    good = np.array([1] * 7 + [0] + [1] * 2 + [0] * 2, np.float32)
    assert rows.keys() == {"tokens", "weight", "mask"}
    np.testing.assert_array_equal(rows["mask"], good)
    np.testing.assert_array_equal(rows["weight"], np.arange(12) / 2 * good)
    np.testing.assert_array_equal(rows["tokens"], (np.arange(12) * good)[:, None].repeat(4, 1))
    assert rows["tokens"].dtype == np.int16 and stream.skipped == 1
    with closing(train_batches(Words(), data, batch_size=10, seed=0)) as stream:
        weights = sorted(next(stream)["weight"].tolist())
    assert weights == [0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 4, 4.5]  # 8 stands in for 7


# --- order ----------------------------------------------------------------------------------------


def test_every_example_once_per_epoch_and_another_order_each(reference):
    _, labels = reference
    first, second = labels[:60], labels[60:120]  # epochs end within a batch
    assert sorted(first) == sorted(second) == list(range(60))
    assert sorted(set(labels[120:])) == sorted(labels[120:])
    assert (first != second).mean() > 0.9
    assert (first != np.arange(60)).mean() > 0.9


def test_augmentation_differs_from_epoch_to_epoch(reference):
    images, labels = reference
    twice = [images[:120][labels[:120] == n] for n in range(60)]
    assert sum((a != b).any() for a, b in twice) >= 55


def test_augmented_pixels_are_of_the_example(reference):
    data = config()
    data.train_transforms = "random_flip()"
    images, labels = train(8, data=data)
    source, flipped = numbered(), 0
    for image, label in zip(images, labels, strict=True):
        stored = source.examples[label]["image"]
        assert (image == stored).all() or (image == stored[:, ::-1]).all()
        flipped += bool((image != stored).any())
    assert 15 < flipped < 49  # of 64


def test_same_seed_same_batches(reference):
    assert_same(train(20), reference)


def test_other_seeds_differ(reference):
    images, labels = reference
    for seed in (0, 4, 2**32 - 1):
        other_images, other_labels = train(3, seed=seed)
        assert (other_labels != labels[:24]).mean() > 0.7
        assert (other_images != images[:24]).any()


# --- what batches do not depend on ----------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_change_nothing(reference, threads):
    data = config()
    data.num_threads = threads
    assert_same(train(20, data=data), reference)


@pytest.mark.parametrize("batch_size", [4, 20, 80])
def test_batch_size_only_cuts_the_stream(reference, batch_size):
    found = train(160 // batch_size, batch_size=batch_size)
    assert_same(found, reference)


@pytest.mark.parametrize("seen", [8, 56, 64, 128])
def test_resumed_stream_goes_on(reference, seen):
    found = train((160 - seen) // 8, examples_seen=seen)
    assert_same(found, [part[seen:] for part in reference])


def test_start_far_on_costs_nothing():
    far = 10**9 // 8 * 8
    images, labels = train(2, examples_seen=far)
    again_images, again_labels = train(1, examples_seen=far + 8)
    assert_same((images[8:], labels[8:]), (again_images, again_labels))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("seen", [0, 24])
def test_processes_share_each_batch(reference, count, seen):
    parts = [
        train(4, examples_seen=seen, process_index=i, process_count=count) for i in range(count)
    ]
    for k, expected in enumerate(reference):
        rows = np.stack([part[k] for part in parts], axis=1)  # one of each process in turn
        np.testing.assert_array_equal(rows.reshape(-1, *rows.shape[2:]), expected[seen : seen + 32])


def test_worker_processes_change_nothing_and_need_no_flags():
    # Grain's workers want parsed absl flags, which a notebook or a test has not got.
    synthetic = Source("synthetic/all", SyntheticImages(SHAPE, 10, length=50), num_classes=10)
    expected = train(12, source=synthetic)
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.unparse_flags()
    try:
        found = train(6, source=synthetic, data=config(num_workers=2))
        assert_same(found, [part[:48] for part in expected])
        # A run goes on with the batches it would have had, whatever loads them now.
        resumed = train(6, source=synthetic, data=config(num_workers=1), examples_seen=48)
        assert_same(resumed, [part[48:] for part in expected])
    finally:
        if was_parsed:
            flags.FLAGS.mark_as_parsed()
        else:
            flags.FLAGS.unparse_flags()


# --- repeated augmentation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeated():
    """Fifteen batches of eight, each example seven times in a row: two epochs of sixty."""
    return train(15, data=config(repeats=7))


def test_each_example_comes_so_often_in_a_row(repeated):
    _, labels = repeated
    epochs = labels.reshape(2, 60)
    for epoch in epochs:
        first = epoch[::7]
        np.testing.assert_array_equal(epoch, first.repeat(7)[:60])  # the last of nine, four times
        assert len(set(first)) == 9
    assert len(set(epochs[0]) & set(epochs[1])) < 6  # another order
    plain = train(15)[1].reshape(2, 60)
    np.testing.assert_array_equal(epochs[:, ::7], plain[:, :9])  # the first of the epoch's order


def test_copies_are_augmented_each_in_its_own_way(repeated):
    images, _ = repeated
    copies = images[:56].reshape(8, 7, *SHAPE)
    assert np.mean([(a != b).any() for row in copies for a, b in itertools.pairwise(row)]) > 0.9


@pytest.mark.parametrize("count", [2, 4])
def test_copies_go_to_the_processes_in_turn(repeated, count):
    data = config(repeats=7)
    parts = [train(15, data=data, process_index=i, process_count=count) for i in range(count)]
    for k, expected in enumerate(repeated):
        rows = np.stack([part[k] for part in parts], axis=1)
        np.testing.assert_array_equal(rows.reshape(expected.shape), expected)
    shares = [
        [list(part[1][: 28 // count]).count(label) for part in parts]
        for label in repeated[1][:28:7]
    ]
    assert all(7 // count <= n <= -(-7 // count) for share in shares for n in share)


@pytest.mark.parametrize("seen", [8, 40, 56, 64])
def test_resumed_among_the_copies_it_goes_on(repeated, seen):
    """Within an epoch, at its end, and within the copies of an example."""
    found = train((120 - seen) // 8, data=config(repeats=7), examples_seen=seen)
    assert_same(found, [part[seen:] for part in repeated])


def test_copies_are_the_same_with_workers_and_in_other_batches(repeated):
    synthetic = Source("synthetic/all", SyntheticImages(SHAPE, 10, length=60), num_classes=10)
    expected = train(8, source=synthetic, data=config(repeats=7))
    found = train(4, source=synthetic, data=config(repeats=7, num_workers=2), examples_seen=32)
    assert_same(found, [part[32:] for part in expected])
    assert_same(train(6, data=config(repeats=7), batch_size=20), repeated)


def test_an_epoch_of_fewer_examples_than_copies_is_of_one():
    _, labels = train(3, source=numbered(5), data=config(repeats=7), batch_size=5)
    assert [len(set(epoch)) for epoch in labels.reshape(3, 5)] == [1, 1, 1]


# --- photographs, through everything that is random ----------------------------------------------

EVERYTHING = (
    "random_resized_crop((24, 30))|random_flip()|randaugment(2, 14)|timm_randaugment(2, 9, 0.5)"
    "|color_jitter(0.4, 0.4, 0.4, 0.1)|random_blur()|random_solarize(probability=0.2)"
    "|random_erasing(0.25, value='noise')|random_erasing(0.25, deviation=58)"
)


@pytest.fixture(scope="module")
def photos(photographs):
    crops = encode_crops(photographs, 40, size=(90, 120))
    examples = [{"image": crop, "label": i} for i, crop in enumerate(crops)]
    return Source("photos/train", examples, num_classes=40)


def train_photos(photos, count, **options):
    data = DataConfig(train_transforms=EVERYTHING, num_workers=options.pop("num_workers", 0))
    rows = labelled(photos, data, (24, 30, 3))
    options = {"batch_size": 8, "seed": 5} | options
    with closing(train_batches(rows, data, **options)) as stream:
        batches = list(itertools.islice(stream, count))
    return [np.concatenate([b[k] for b in batches]) for k in ("image", "label")]


@pytest.mark.parametrize("workers", [1, 2])
def test_photographs_are_the_same_bits_with_any_workers(photos, workers):
    expected = train_photos(photos, 12)
    assert_same(train_photos(photos, 12, num_workers=workers), expected)
    # Stopped after four batches and started again with another number of workers.
    resumed = train_photos(photos, 8, examples_seen=32, num_workers=2 - workers)
    assert_same(resumed, [part[32:] for part in expected])


def test_photographs_are_the_same_bits_in_any_processes(photos):
    expected = train_photos(photos, 6)
    for count in (2, 4):
        parts = [
            train_photos(photos, 6, process_index=i, process_count=count) for i in range(count)
        ]
        for k in (0, 1):
            rows = np.stack([part[k] for part in parts], axis=1)
            np.testing.assert_array_equal(rows.reshape(expected[k].shape), expected[k])


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    return numbered(297)


@pytest.mark.parametrize("batch_size, batches", [(8, 38), (100, 3), (304, 1)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_example_once_in_order(many, count, batch_size, batches):
    parts = []
    for i in range(count):
        part, found = evaluation(many, batch_size=batch_size, process_index=i, process_count=count)
        assert found == batches  # equally many on every process, or one would wait for ever
        parts.append(part)
    joined = {
        k: np.stack([p[k] for p in parts], axis=1).reshape(-1, *parts[0][k].shape[1:])
        for k in ("image", "label", "mask")
    }
    assert (joined["mask"].dtype, joined["label"].dtype) == (np.float32, np.int32)
    filling = batches * batch_size - 297
    np.testing.assert_array_equal(joined["mask"], [1.0] * 297 + [0.0] * filling)
    np.testing.assert_array_equal(joined["label"], list(range(297)) + [0] * filling)
    stored = np.stack([e["image"] for e in many.examples])
    np.testing.assert_array_equal(joined["image"][:297], stored)
    assert not joined["image"][297:].any()


def test_evaluation_of_full_batches_is_not_filled(many):
    rows, batches = evaluation(many, batch_size=27)
    assert batches == 11
    assert rows["mask"].sum() == len(rows["mask"]) == 297


def test_evaluation_in_a_worker_process(many):
    expected, _ = evaluation(many, batch_size=100)
    found, batches = evaluation(many, config(num_workers=1), batch_size=100)
    assert batches == 3
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)


def test_evaluation_uses_the_eval_transforms(many):
    data = config(eval_transforms="random_flip(1.0)")
    rows, _ = evaluation(many, data, batch_size=27)
    expected = np.stack([e["image"][:, ::-1] for e in many.examples])
    np.testing.assert_array_equal(rows["image"], expected)


# --- one example ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_pipeline", [True, False])
def test_wrong_shape_names_field_and_remedy(train_pipeline):
    field = "train_transforms" if train_pipeline else "eval_transforms"
    data = DataConfig(**{field: "resize(4)"})
    rows = labelled(numbered(), data, (6, 6, 3), train=train_pipeline)
    with pytest.raises(ValueError) as caught:
        rows.row(0, np.random.default_rng(0))
    assert str(caught.value) == (
        f"data.{field} must give the 6x6x3 images that the model takes; got 4x4x3. "
        "End it with resize((6, 6))."
    )


def test_error_of_an_example_reaches_the_consumer():
    data = config()
    rows = labelled(numbered(), data, (7, 7, 3))
    with (
        closing(train_batches(rows, data, batch_size=8, seed=0)) as stream,
        pytest.raises(ValueError, match=r"data\.train_transforms must give the 7x7x3 images"),
    ):
        next(stream)


def test_misspelt_pipeline_fails_before_anything_is_read():
    with pytest.raises(KeyError, match=r"data\.eval_transforms must name known transforms; got re"):
        open_labelled_images(
            DataConfig(dataset="nowhere", eval_transforms="resise(8)"),
            "test",
            train=False,
            image_shape=SHAPE,
            num_classes=1,
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_images_are_decoded(channels):
    data = DataConfig(dataset="digits", eval_transforms="resize(16)")
    rows = open_labelled_images(
        data, "test", train=False, image_shape=(16, 16, channels), num_classes=3
    )
    assert (rows.name, rows.num_classes, len(rows)) == ("digits/test", 10, 297)
    assert rows.class_names == tuple("0123456789")
    example = rows.row(5, np.random.default_rng(0))
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        k: (v.shape, v.dtype) for k, v in rows.shapes.items()
    }
    assert (example["image"].shape, example["image"].dtype) == ((16, 16, channels), np.uint8)
    assert example["label"] == rows.source.examples[5]["label"]
    assert (example["image"] == example["image"][:, :, :1]).all()  # grey
    assert example["image"].max() > 200


# --- to the devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["data:-1", "data:2,fsdp:4"])
def test_to_device_deals_rows_out(spec):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, *SHAPE), np.uint8),
        "label": np.arange(16, dtype=np.int32),
    }
    mesh = make_mesh(spec)
    arrays = to_device(batch, batch_sharding(mesh))
    for name, rows in batch.items():
        array = arrays[name]
        assert (array.shape, array.dtype) == (rows.shape, rows.dtype)
        assert len(array.addressable_shards) == 8
        for shard, device in zip(array.addressable_shards, jax.devices(), strict=True):
            assert shard.device == device
            start = 2 * device.id
            np.testing.assert_array_equal(shard.data, rows[start : start + 2])


def test_batches_arrive_on_the_devices_and_waiting_is_counted():
    data = config()
    sharding = batch_sharding(make_mesh("data:-1"))
    images, labels = train(3)
    rows = labelled(numbered(), data)
    stream = train_batches(rows, data, batch_size=8, seed=3, sharding=sharding)
    with closing(stream):
        assert stream.waited_s == 0
        waited = []
        for k in range(3):
            batch = next(stream)
            assert all(isinstance(x, jax.Array) and x.sharding == sharding for x in batch.values())
            np.testing.assert_array_equal(batch["image"], images[8 * k : 8 * k + 8])
            np.testing.assert_array_equal(batch["label"], labels[8 * k : 8 * k + 8])
            waited.append(stream.waited_s)
        assert 0 < waited[0] <= waited[1] <= waited[2] < 60


def test_a_slow_source_is_what_is_waited_for():
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    source = Source("slow", Slow(numbered().examples), EXAMPLES)
    data = DataConfig(num_threads=1, prefetch_mib=1)
    rows = labelled(source, data)
    with closing(train_batches(rows, data, batch_size=4, seed=0)) as stream:
        for _ in range(5):
            next(stream)
        assert 0.3 < stream.waited_s < 3  # five batches of four times 20 ms


# --- how far ahead --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2, 16])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rows", [4, 96, 100, 2048])
@pytest.mark.parametrize("mib", [32, 256, 2048])
def test_read_ahead_fits_into_its_memory(workers, threads, rows, mib):
    row_bytes = 224 * 224 * 3
    data = DataConfig(num_workers=workers, num_threads=threads, prefetch_mib=mib)
    piece, ahead = read_ahead(data, rows, row_bytes)
    assert 1 <= piece <= rows and ahead >= 1
    in_transit = 4 if workers else 1
    made = max(1, workers) * (ahead + in_transit) * piece * row_bytes
    least = max(1, workers) * (threads + in_transit) * row_bytes  # of a row for each thread
    assert made <= max(mib * 2**20, least)
    assert ahead >= threads or piece * ahead * max(1, workers) >= 32 * rows  # none is idle
    if (threads + in_transit) * rows * row_bytes * max(1, workers) <= mib * 2**20:
        assert piece == rows  # nothing to cut where whole batches fit


def test_batch_of_a_prime_number_is_not_handed_over_row_by_row():
    data = DataConfig(num_workers=2, num_threads=4, prefetch_mib=32)
    assert read_ahead(data, 127, 224 * 224 * 3) == (13, 4)
    assert read_ahead(DataConfig(prefetch_mib=1), 2, 2**21) == (1, 1)  # less than a row


@dataclasses.dataclass(frozen=True)
class CountedReads:
    """Black images; each read adds a byte to a file, whichever process reads."""

    path: str
    shape: tuple[int, int, int]

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        with open(self.path, "ab") as file:
            file.write(b"x")
        return {"image": np.zeros(self.shape, np.uint8), "label": 0}


@pytest.mark.parametrize("workers, mib, least", [(0, 1, 8), (0, 7, 48), (2, 4, 16), (2, 16, 96)])
def test_no_more_is_read_than_fits(tmp_path, workers, mib, least):
    """Rows are of 64 KiB, a batch of eight of half a MiB."""
    shape, path = (256, 256, 1), tmp_path / "reads"
    data = DataConfig(num_threads=2, num_workers=workers, prefetch_mib=mib)
    rows = labelled(Source("counted", CountedReads(str(path), shape), 1), data, shape)
    with closing(train_batches(rows, data, batch_size=8, seed=0)) as stream:
        next(stream)
        before = -1
        while before != (reads := path.stat().st_size):  # until the loader rests
            before = reads
            time.sleep(0.5)
    assert least <= reads <= 16 * mib + 8  # the batch that was handed out, and what fits


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_in_pieces_are_the_same(photos, workers):
    expected = train_photos(photos, 20, batch_size=24)
    data = DataConfig(train_transforms=EVERYTHING, num_workers=workers, prefetch_mib=1)
    shape = (24, 30, 3)
    assert 230 % read_ahead(data, 230, 24 * 30 * 3 + 4)[0]  # a piece goes into two batches
    rows = labelled(photos, data, shape)
    with closing(train_batches(rows, data, batch_size=230, seed=5)) as stream:
        batches = [next(stream), next(stream)]
    for name, part in zip(("image", "label"), expected, strict=True):
        assert [len(batch[name]) for batch in batches] == [230, 230]
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches]), part[:460])


@dataclasses.dataclass(frozen=True)
class Unmade:
    """Rows that fail as a line of the package does."""

    lines: str
    name = "unmade/train"

    @property
    def shapes(self):
        return {"x": jax.ShapeDtypeStruct((1,), np.float32)}

    def __len__(self):
        return 4

    def row(self, index, rng):
        names = {"__name__": "crate_jax.somewhere"}
        exec(f"def f():\n {self.lines}", names)
        return names["f"]()


@pytest.mark.parametrize(
    ("lines", "workers", "mistake"),
    [
        ("{4: 0}[8]", 1, False),
        ("with open('/dev/null'): {4: 0}[8]", 0, False),
        ("with open('/dev/null'): raise ValueError('data.x must be y')", 0, True),
    ],
)
def test_a_bug_in_a_worker_is_no_mistake(lines, workers, mistake):
    """Grain raises an error again in other frames, each of which has a ``raise``."""
    data = DataConfig(num_threads=1, num_workers=workers)
    with (
        closing(train_batches(Unmade(lines), data, batch_size=2, seed=0)) as batches,
        pytest.raises((KeyError, ValueError)) as caught,
    ):
        next(batches)
    assert is_mistake(caught.value) == mistake
    assert any(entry.name == "f" for entry in caught.traceback)  # which a bug shows
